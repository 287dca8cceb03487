"""From parsed options to a step and its report: the same way for every command."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer import Context, Exit

from peftc import processes, progress
from peftc.cli import console
from peftc.cli.options import OUTPUT, PUSH, SOURCE, of_group
from peftc.cli.texts import settings
from peftc.errors import ArtifactError, ChainError, PeftcError, UsageError, refuse_not_utf8
from peftc.options import COLUMNS
from peftc.project import config, ledger
from peftc.report import Report
from peftc.store.source import MANIFEST, Source

SHAPE = ("arch", "arch_set", "weights", "revision", "preprocess")  # say how to build a model that is no artifact


def command(
    example: str, *, source: bool = True, writes: bool = False, pushes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., Report]]:
    """Make a command of a function that declares its options; it runs the step of that name.

    Args:
        example: what may be typed after the word, for the help.
        source: add the options that describe a model.
        writes: the step writes an artifact, and so has a place in the project's chain.
        pushes: what it writes may be pushed to the hub; an artifact always may.
    """
    extra = {**(SOURCE if source else {}), **(PUSH if writes or pushes else {}), **OUTPUT}

    def make(declare: Callable[..., None]) -> Callable[..., Report]:
        own = inspect.signature(declare)

        @functools.wraps(declare)
        def call(ctx: Context, **given: Any) -> Report:
            given = {name: _sound(name, value) for name, value in given.items()}
            shared = {name: given.pop(name) for name in extra}
            placed = ctx.obj.place is not None  # by a recipe, which prints what comes of it
            if not placed:
                console.setup(quiet=shared["quiet"] or processes.rank() > 0, verbose=shared["verbose"])
            repo = shared.get("push_to_hub")
            _check_push(repo, shared, given)
            try:
                given = _piped(given)  # the terminal is that of the command before until it is done
                with progress.track(f"peftc {ctx.info_name}"):
                    outcome = _run(ctx, _tidy(ctx, given), shared)
            except PeftcError as refusal:
                refusal.why = "; ".join(filter(None, (refusal.why, _not_typed(ctx, refusal))))
                raise
            _push(outcome, repo, private=bool(shared.get("private")))
            if not placed:
                if processes.rank() == 0:
                    quiet, verbose = shared["quiet"], bool(shared["verbose"])
                    console.report(outcome, json=shared["json"], quiet=quiet, verbose=verbose)
                if not processes.agreed(lambda: outcome.passed):
                    raise Exit(3)
            return outcome

        options: dict[str, tuple[Any, Any]] = {"ctx": (Context, inspect.Parameter.empty)}
        for name, one in own.parameters.items():
            options |= of_group(one.annotation) or {name: (one.annotation, one.default)}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in (options | extra).items()
        ]
        call.__signature__ = own.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        word = declare.__name__.replace("_", "-")
        call.__doc__ = f"{inspect.getdoc(declare)}\n\n\b\nExample:\n  peftc {word} {example}".rstrip()
        call.writes = writes  # type: ignore[attr-defined]
        return call

    return make


def _step(ctx: Context) -> Callable[..., Report]:
    """Return the step that a command runs; to import it takes seconds."""
    word = str(ctx.info_name).replace("-", "_")
    with progress.track("starting"):
        return getattr(importlib.import_module(f"peftc.steps.{word}"), word)  # type: ignore[no-any-return]


def _sound(name: str, value: Any) -> Any:
    """Return a value with `~` expanded, as no shell does in a file or behind a `=`; refuse what is not UTF-8."""
    if isinstance(value, list | tuple):
        return tuple(_sound(name, each) for each in value)
    if isinstance(value, str | Path):
        option = "MODEL" if name in ("model", "models") else f"`--{name.replace('_', '-')}`"
        refuse_not_utf8(f"the value of {option},", value)
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value  # noqa: PTH111


def _tidy(ctx: Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return options as the step takes them.

    A budget that was typed replaces that of the file, and columns that `--data` names itself those of the project.
    """
    if "settings" in options:
        options["settings"] = settings("--set", options["settings"] or ()) or None
    lower = {name: value for name, value in options.items() if _came_from(ctx, name) == "DEFAULT_MAP"}
    typed = {name: value for name, value in options.items() if _came_from(ctx, name) == "COMMANDLINE"}
    dropped = lower.keys() - config.override(str(ctx.info_name), lower, typed).keys()
    given = {kind: f"{kind}_column" for kind in COLUMNS}
    columns = {kind: name for kind, name in given.items() if options.get(name) and name not in typed}
    if columns and options.get("data"):
        from peftc.data.spec import columns_of, parts_of

        _, own = columns_of(parts_of(options["data"])[0])
        dropped |= {name for kind, name in columns.items() if getattr(own, kind)}
    return options | dict.fromkeys(dropped)


def _came_from(ctx: Context, name: str) -> str:
    return str(getattr(ctx.get_parameter_source(name), "name", ""))


def _run(ctx: Context, options: dict[str, Any], shared: dict[str, Any]) -> Report:
    """Find the model and the folder, run the step, and note its place in the chain."""
    project: config.Project = ctx.obj
    for text in project.warnings:
        console.warn(text)
    if shared.get("offline"):
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read when those libraries are imported
    if "models" in options:
        named = list(options.pop("models"))
        return _step(ctx)(named or config.artifacts(project, str(ctx.info_name)), **options)
    if "model" not in options:
        return _step(ctx)(**options)
    model = options.pop("model")
    from_file = {name for name in project.from_file if _came_from(ctx, name) != "COMMANDLINE"}
    writes = ctx.command.callback.writes  # type: ignore[union-attr]
    place = config.place(project, str(ctx.info_name), model, writes=writes)
    if place.chain and place.chain.gone:
        console.warn(f"`{place.chain.gone}` is gone: the chain ends before it")
    if model is not None or (place.model == project.model and "model" not in from_file):
        from_file.discard("model")
    else:
        from_file.add("model")  # also what the list of the chain names
    sources: dict[str, Any] = {"model": place.model, "against": options.get("against")}
    if "arch" in shared:
        sources = _sources(ctx, sources, shared, from_file)
    if "against" in options:
        options["against"] = sources["against"]
    if isinstance(options.get("teacher"), str) and "teacher" in from_file:
        options["teacher"] = Source(options["teacher"], from_file=True, **_trusted(shared))
    if place.folder is None or place.chain is None:
        outcome = _step(ctx)(sources["model"], **options)
    else:
        outcome = _in_place(ctx, sources["model"], options, place.chain, place.index, place.folder)
    if project.place is None and (model is None or place.folder is not None) and not options.get("dry_run"):
        _tell_the_recipe(ctx, project, place.model, outcome)
    return outcome


def _tell_the_recipe(ctx: Context, project: config.Project, model: str, outcome: Report) -> None:
    """Note what a step has done that was typed, where that is what the project's chain asks: `peftc run` goes on."""
    word = str(ctx.info_name)
    typed = {name for name in ctx.params if _came_from(ctx, name) == "COMMANDLINE"} - {*ledger.UNIMPORTANT}
    if word not in project.chain or typed or processes.rank():
        return
    try:
        book = ledger.read(project.runs)
    except ChainError:  # `peftc run` says so; the work that was asked for is done
        return
    book.note(word, ledger.asked(word, model, ctx.params), outcome.to_json(), passed=outcome.passed)


def _not_typed(ctx: Context, refusal: PeftcError) -> str | None:
    """Say of a value that a refusal is about where it comes from, if nobody typed it."""
    project: config.Project = ctx.obj
    options = {param.name: param.opts[-1] for param in ctx.command.params}
    values = {name: value for name, value in ctx.params.items() if _came_from(ctx, name) == "DEFAULT_MAP"}
    if ctx.params.get("model", ...) is None and project.model:
        values["model"] = project.model
    for name, value in values.items():
        texts = {str(value), str(value).rpartition("@")[0], str(value).partition("?")[0]} - {""}
        is_named = isinstance(value, str | Path) and any(f"`{text}`" in str(refusal) for text in texts)
        if name in project.origins and (is_named or f"`{options[name]}" in refusal.what):
            return f"`{value}` comes from {project.origin(name)}"
    return None


def _in_place(
    ctx: Context, model: Any, options: dict[str, Any], chain: config.Chain, index: int, folder: Path
) -> Report:
    """Run a step where it belongs in the chain, beside the result of another request if one is there."""
    step = _step(ctx)
    free = options.get("output_dir") is None
    options["output_dir"] = options.get("output_dir") or folder
    before = _manifest(options["output_dir"])
    try:
        outcome = step(model, **options)
    except ArtifactError as refusal:
        if refusal.request is None or not free:
            raise
        options["output_dir"] = folder.with_name(f"{folder.name}-{refusal.request[:8]}")
        before = _manifest(options["output_dir"])
        outcome = step(model, **options)
    if outcome.artifact is not None and not options.get("dry_run"):
        link = config.Link(str(ctx.info_name), outcome.artifact)
        dropped = chain.record(index, link, rewritten=before != _manifest(link.folder))
        if dropped:
            names = ", ".join(f"`{one.folder}`" for one in dropped)
            outcome.notes.append(f"the chain goes on from `{link.folder}`; no longer part of it, and kept: {names}")
    return outcome


def _manifest(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        return None


def _check_push(repo: str | None, shared: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuse a push that is sure to fail before the work is done."""
    if repo is None:
        if shared.get("private"):
            raise UsageError("`--private` is of a repository", hint="name it: `--push-to-hub OWNER/NAME`")
        return
    if options.get("dry_run"):
        raise UsageError("a dry run writes nothing to push", hint="leave `--dry-run` or `--push-to-hub` out")
    if shared.get("offline"):
        raise UsageError("`--push-to-hub` asks the network", hint="leave `--offline` out")
    from peftc.steps.push import check

    if processes.rank() == 0:
        check(repo)


def _push(outcome: Report, repo: str | None, *, private: bool) -> None:
    """Push what was written, unless a gate says that it is not good enough."""
    if repo is None or outcome.artifact is None or processes.rank():
        return
    if not outcome.passed:
        outcome.warnings.append(f"not pushed to `{repo}`: a gate was not met")
        return
    from peftc.steps.push import push_to_hub

    pushed = push_to_hub(outcome.artifact, repo, private=private)
    outcome.data |= pushed.data
    outcome.notes += pushed.notes
    outcome.warnings += pushed.warnings


def _piped(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the artifact that standard input names in the place of `-`."""
    named = dict(options)
    if named.get("model") == "-":
        named["model"] = _standard_input()
    if "-" in (named.get("models") or ()):
        named["models"] = [_standard_input() if model == "-" else model for model in named["models"]]
    return named


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ChainError("standard input names no artifact", why="nothing is piped in", hint="name MODEL by its path")
    return config.artifact_from(os.fsdecode(sys.stdin.buffer.read()))


def _trusted(shared: dict[str, Any]) -> dict[str, Any]:
    """Return what of the options for sources holds for any model, however it is built."""
    return {name: shared[name] for name in SOURCE if name not in SHAPE and name in shared}


def _sources(ctx: Context, specs: dict[str, str | None], shared: dict[str, Any], from_file: set[str]) -> dict[str, Any]:
    """Return a source for each model; how to build one applies to those that are no artifacts."""
    given = {name: shared[name] for name in SOURCE}
    given["arch_set"] = settings("--arch-set", given["arch_set"] or ())
    given["preprocess"] = settings("--preprocess", given["preprocess"] or (), lists=True)
    trusted = _trusted(given)
    asked = [name for name in SHAPE if _came_from(ctx, name) == "COMMANDLINE"]
    named = {name: spec for name, spec in specs.items() if spec not in (None, "base")}
    built = [name for name, spec in named.items() if not Path(str(spec), MANIFEST).is_file()]
    if asked and not built:
        what = f"`--{asked[0].replace('_', '-')}` says how to build a model, but `{specs['model']}` is an artifact"
        raise UsageError(what, hint="leave the option out: an artifact knows how it is built")
    return specs | {
        name: Source(str(spec), from_file=name in from_file, **(given if name in built else trusted))
        for name, spec in named.items()
    }
