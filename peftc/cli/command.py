"""From parsed options to a step and its report: the same way for every command."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer import Context, Exit

from peftc import processes
from peftc.cli import console
from peftc.cli.options import OUTPUT, PUSH, SOURCE, of_group, settings
from peftc.errors import ArtifactError, ChainError, UsageError, refuse_not_utf8, shown
from peftc.project import config
from peftc.report import Report
from peftc.store.source import MANIFEST, Source

Step = Callable[..., Report]
KEYWORD = inspect.Parameter.KEYWORD_ONLY
COLUMNS = ("image_column", "text_column", "label_column")
SHAPE = ("arch", "arch_set", "weights", "revision", "preprocess")  # say how to build a model that is no artifact


def command(
    *, source: bool = True, writes: bool = False, pushes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., Report]]:
    """Make a command of a function that declares its options; it runs the step of that name.

    Args:
        source: add the options that describe a model.
        writes: the step writes an artifact, and so has a place in the project's chain.
        pushes: what it writes may be pushed to the hub; an artifact always may.
    """
    extra = {**(SOURCE if source else {}), **(PUSH if writes or pushes else {}), **OUTPUT}

    def make(declare: Callable[..., None]) -> Callable[..., Report]:
        own = inspect.signature(declare, eval_str=True)

        def find() -> Step:
            module = importlib.import_module(f"peftc.steps.{declare.__name__}")
            return getattr(module, declare.__name__)  # type: ignore[no-any-return]

        @functools.wraps(declare)
        def call(ctx: Context, **given: Any) -> Report:
            given = {name: _at_home(value) for name, value in given.items()}
            _check_names(given)
            shared = {name: given.pop(name) for name in extra}
            placed = ctx.obj.place is not None  # by a recipe, which prints what comes of it
            if not placed:
                console.setup(quiet=shared["quiet"] or processes.rank() > 0, verbose=shared["verbose"])
            repo = shared.get("push_to_hub")
            _check_push(repo, shared, given)
            outcome = _run(ctx, find, _tidy(ctx, given), shared, writes=writes)
            _push(outcome, repo, private=bool(shared.get("private")))
            if not placed:
                if processes.rank() == 0:
                    console.report(outcome, json=shared["json"], quiet=shared["quiet"])
                if not processes.agreed(lambda: outcome.passed):
                    raise Exit(3)
            return outcome

        parameters = [inspect.Parameter("ctx", KEYWORD, annotation=Context)]
        for name, parameter in own.parameters.items():
            parameters += _parameters(
                of_group(parameter.annotation) or {name: (parameter.annotation, parameter.default)}
            )
        parameters += _parameters(extra)
        call.__signature__ = own.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        call.writes = writes  # type: ignore[attr-defined]
        return call

    return make


def _parameters(options: dict[str, tuple[Any, Any]]) -> list[inspect.Parameter]:
    return [inspect.Parameter(name, KEYWORD, default=d, annotation=a) for name, (a, d) in options.items()]


def _at_home(value: Any) -> Any:
    """Expand `~` in a path, typed or from a file: no shell does that for what stands in a file or behind a `=`."""
    if isinstance(value, list | tuple):
        return type(value)(_at_home(each) for each in value)
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value  # noqa: PTH111


def _check_names(given: dict[str, Any]) -> None:
    """Refuse names that are not UTF-8 before any work, wherever they came from."""
    for name, value in given.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str | Path):
                option = "MODEL" if name in ("model", "models") else f"`--{name.replace('_', '-')}`"
                refuse_not_utf8(f"the value of {option},", each)


def _tidy(ctx: Context, given: dict[str, Any]) -> dict[str, Any]:
    """Return options as the step takes them; a budget that was typed replaces that of the file."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "settings" in options:
        options["settings"] = settings("--set", options["settings"] or ()) or None
    lower = {name: value for name, value in options.items() if _came_from(ctx, name) == "DEFAULT_MAP"}
    typed = {name: value for name, value in options.items() if _came_from(ctx, name) == "COMMANDLINE"}
    dropped = lower.keys() - config.override(str(ctx.info_name), lower, typed).keys()
    return {name: None if name in dropped else value for name, value in _own_columns(ctx, options).items()}


def _own_columns(ctx: Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the columns of the project that `--data` names itself."""
    columns = [name for name in COLUMNS if options.get(name) and _came_from(ctx, name) != "COMMANDLINE"]
    if not columns or not options.get("data"):
        return options
    from peftc.data.spec import columns_of, parts_of

    _, own = columns_of(parts_of(options["data"])[0])
    return {**options, **{name: None for name in columns if getattr(own, name.removesuffix("_column"))}}


def _came_from(ctx: Context, name: str) -> str:
    return str(getattr(ctx.get_parameter_source(name), "name", ""))


def _run(
    ctx: Context, find: Callable[[], Step], options: dict[str, Any], shared: dict[str, Any], *, writes: bool
) -> Report:
    """Find the model and the folder, run the step, and note its place in the chain."""
    project: config.Project = ctx.obj
    for text in project.warnings:
        console.warn(text)
    if shared.get("offline"):
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read when those libraries are imported
    if "models" in options:
        named = [_standard_input() if model == "-" else model for model in options.pop("models")]
        return find()(named or config.artifacts(project, str(ctx.info_name)), **options)
    if "model" not in options:
        return find()(**options)
    model = options.pop("model")
    from_file = {name for name in project.from_file if _came_from(ctx, name) != "COMMANDLINE"}
    place = config.place(project, str(ctx.info_name), _standard_input() if model == "-" else model, writes=writes)
    if place.chain and place.chain.gone:
        console.warn(f"`{place.chain.gone}` is gone: the chain ends before it")
    if model is not None or (place.model == project.model and "model" not in from_file):
        from_file.discard("model")
    else:
        from_file.add("model")  # also what the list of the chain names
    sources: list[Any] = [place.model]
    if "arch" in shared:
        specs = {"model": place.model, "against": options.get("against")}
        sources = _sources(ctx, specs, shared, from_file)
    if "against" in options:
        options["against"] = sources[1]
    if isinstance(options.get("teacher"), str) and "teacher" in from_file:
        options["teacher"] = Source(options["teacher"], from_file=True, **_trusted(shared))
    return _in_place(find, sources[0], options, place, str(ctx.info_name))


def _in_place(find: Callable[[], Step], model: Any, options: dict[str, Any], place: config.Place, word: str) -> Report:
    """Run a step where it belongs in the chain, beside the result of another request if one is there."""
    step = find()
    folder = place.folder
    if folder is None or place.chain is None:
        return step(model, **options)
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
        link = config.Link(word, Path(outcome.artifact))
        dropped = place.chain.record(place.index, link, rewritten=before != _manifest(link.folder))
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


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ChainError("standard input names no artifact", why="nothing is piped in", hint="name MODEL by its path")
    text = os.fsdecode(sys.stdin.buffer.read())
    if shown(text) != text:
        raise ChainError("standard input names no artifact", why=f"`{shown(text.strip()[:80])}` is not UTF-8")
    return config.artifact_from(text)


def _trusted(shared: dict[str, Any]) -> dict[str, Any]:
    """Return what of the options for sources holds for any model, however it is built."""
    return {name: shared[name] for name in SOURCE if name not in SHAPE and name in shared}


def _sources(ctx: Context, named: dict[str, str | None], shared: dict[str, Any], from_file: set[str]) -> list[Any]:
    """Return a source per model; how to build one applies to those that are no artifacts."""
    specs = list(named.values())
    given = {name: shared[name] for name in SOURCE}
    given["arch_set"] = settings("--arch-set", given["arch_set"] or ())
    given["preprocess"] = settings("--preprocess", given["preprocess"] or (), lists=True)
    trusted = _trusted(given)
    built = [spec is not None and spec != "base" and not Path(spec, MANIFEST).is_file() for spec in specs]
    asked = [name for name in SHAPE if _came_from(ctx, name) == "COMMANDLINE"]
    if asked and not any(built):
        raise UsageError(
            f"`--{asked[0].replace('_', '-')}` says how to build a model, but `{specs[0]}` is an artifact",
            hint="leave the option out: an artifact knows how it is built",
        )
    return [
        spec
        if spec is None or spec == "base"
        else Source(spec, from_file=name in from_file, **(given if new else trusted))
        for (name, spec), new in zip(named.items(), built, strict=True)
    ]
