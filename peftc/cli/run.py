"""peftc run."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Exit

from peftc import processes
from peftc.cli import console, defaults
from peftc.cli import options as o
from peftc.errors import PeftcError, UsageError, did_you_mean
from peftc.project import config, ledger
from peftc.project.ledger import Asked, Ledger
from peftc.report import GUESSED, Gate, Report, Table, count

Recipe = Annotated[
    Path | None, Argument(metavar="[RECIPE]", help=f"a project file with a chain (default: {config.FILE})")
]
DONE, STANDS, FAILED, LEFT, WILL, MAY = "done", "up to date", "gate not met", "not run", "would run", "may run"


@dataclass
class Stage:
    """One step of a recipe, with its options parsed."""

    name: str  # as in the chain, `finetune.again`
    context: Any  # of its command
    state: str = LEFT  # what became of it
    why: str = ""  # why it runs, or does not
    report: dict[str, Any] | None = None  # what came of it, JSON-ready
    seconds: float = 0.0  # that it took

    @property
    def word(self) -> str:
        """The command."""
        return config.word_of(self.name)

    @property
    def writes(self) -> bool:
        """Whether it writes an artifact, which the steps after it read."""
        return bool(self.context.command.callback.writes)

    @property
    def artifact(self) -> str | None:
        """The folder that it wrote."""
        return None if self.report is None or not self.writes else self.report["artifact"]


def run(
    ctx: Context,
    recipe: Recipe = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Run the chain of a project file, only what has changed.

    \b
    Example:
      peftc run peftc.toml --dry-run
    """
    silent = quiet or processes.rank() > 0
    console.setup(quiet=silent, verbose=verbose)
    outcome = chain(ctx.parent, recipe, dry_run=dry_run, quiet=silent)
    if processes.rank() == 0:
        console.tell(replace(outcome, gates=[]), quiet=quiet)
        console.deliver(outcome, json=json)
        steps = outcome.data["steps"]
        failed = [step["step"] for step in steps if step["state"] == FAILED]
        left = ", ".join(f"`{step['step']}`" for step in steps if step["state"] == LEFT)
        for gate in (each for each in outcome.gates if not each.passed):
            text = f"`{failed[0]}` ends the chain: {console.gate_text(gate)}"
            console.error(f"{text}; not run: {left}" if left else text)
    if not processes.agreed(lambda: outcome.passed):
        raise Exit(3)


def chain(parent: Any, recipe: Path | None, *, dry_run: bool, quiet: bool, verbose: bool = False) -> Report:
    """Run the chain of a project file, or say what of it would run.

    Args:
        parent: a context of the program, whose commands the steps are.
        recipe: the file; the one of the working folder when None.
        dry_run: run nothing.
        quiet: print nothing of what each step says.
        verbose: print all of it.
    """
    stages, project = _read(parent, recipe)
    book = ledger.read(project.runs)
    if dry_run:
        _foresee(stages, project, book)
    else:
        _run(stages, project, book, quiet=quiet, verbose=verbose)
    return _report(stages, str(recipe or config.FILE), dry_run=dry_run)


def _read(parent: Any, recipe: Path | None) -> tuple[list[Stage], config.Project]:
    """Parse every step before any of them runs; refuse what is no recipe, or no step of a chain."""
    group = parent.command
    known = defaults.known(group)
    file = recipe or Path(config.FILE)
    if not file.is_file():
        hint = f"name one, as in `peftc run recipe.toml`, or write a `{config.FILE}`: `{config.INIT}`"
        raise UsageError(f"there is no recipe at `{file}`", hint=did_you_mean(file, hint) if recipe else hint)
    project = config.load("run", known, file)
    for text in project.warnings:
        console.warn(text)
    chainable = [word for word, one in group.commands.items() if any(p.name in ("model", "models") for p in one.params)]
    if not project.chain or project.model is None:
        lacks = config.RECIPE if project.model else "model"
        line = 'chain = ["decompose", "evaluate"]' if project.model else 'model = "..."'
        raise UsageError(f"`{file}` names no `{lacks}`, so there is nothing to run", hint=f"add `{line}` at its top")
    stages = []
    for name in project.chain:
        word = config.word_of(name)
        if word not in chainable or word == "init":
            raise UsageError(f"`{word}` is no step of a chain", why="it reads no model", hint="take it out of `chain`")
        own = replace(config.load(name, known, file), place=config.Place(project.model), warnings=())
        stages.append(Stage(name, group.commands[word].make_context(word, [], parent=parent, obj=own)))
    return stages, project


def _run(stages: list[Stage], project: config.Project, book: Ledger, *, quiet: bool, verbose: bool) -> None:
    """Run the steps whose answer does not stand, each on the artifact of the one before, until a gate is not met."""
    model, index, said = str(project.model), 0, set[str]()
    for number, stage in enumerate(stages, 1):
        asked, why = processes.agreed(partial(_question, stage, model, book))
        if why is None:
            stage.state, stage.report = STANDS, book.entries[stage.name]["report"]
        else:
            if not quiet:
                console.note(f"step {number} of {len(stages)}, `{stage.name}`: {why}")
            stage.why, chain = why, config.read_chain(project.runs)
            place = config.place_at(chain, index, stage.word, model) if stage.writes else config.Place(model)
            outcome = _carry_out(stage, place, asked, book)
            if not quiet:
                told = {*outcome.told, *said}
                console.tell(replace(outcome, summary=_without_next(outcome), told=told), verbose=verbose)
                console.say()
            said |= {note for note in outcome.notes if note.startswith(GUESSED)}
        if stage.writes and stage.artifact is not None:
            model = stage.artifact
            if processes.rank() == 0 and why is None:
                config.read_chain(project.runs).record(index, config.Link(stage.word, Path(model)))
            index += 1
        if stage.state == FAILED:
            return


def _question(stage: Stage, model: str, book: Ledger) -> tuple[Asked, str | None]:
    """Return what a step is asked, and why it has to run, if it has to."""
    asked = ledger.asked(stage.word, model, stage.context.params)
    return asked, book.reason(stage.name, asked)


def _carry_out(stage: Stage, place: config.Place, asked: Asked, book: Ledger) -> Report:
    """Run one step as if it had been typed, and keep what came of it."""
    context = stage.context
    context.obj = replace(context.obj, place=place)
    started = time.monotonic()
    try:
        with context:
            outcome: Report = context.command.invoke(context)
    except PeftcError:
        console.say(f"`{stage.name}` ends the chain:")
        raise
    stage.seconds = round(time.monotonic() - started, 3)
    stage.report = processes.agreed(outcome.to_json)  # the first process knows what was written
    stage.state = DONE if outcome.passed else FAILED
    if processes.rank() == 0:
        book.note(stage.name, asked, stage.report, passed=outcome.passed)
    return outcome


def _without_next(outcome: Report) -> dict[str, str]:
    return {word: text for word, text in outcome.summary.items() if word != "next"}  # the chain itself goes on


def _foresee(stages: list[Stage], project: config.Project, book: Ledger) -> None:
    """Say of each step whether it would run, and why; what comes after a step that would run may change with it."""
    model = str(project.model)
    changing: dict[str, str] = {}  # what a step that would run writes -> the step
    for stage in stages:
        asked, why = _question(stage, model, book)
        after = [step for name, step in changing.items() if name in (model, *asked.options.values())]
        stage.state = STANDS if why is None else WILL
        if after:
            stage.state, stage.why = MAY, f"it reads what `{after[0]}` writes"
        elif why is not None:
            stage.why = why
        if stage.state != STANDS:
            changing |= dict.fromkeys(asked.written, stage.name)
        entry = book.entries.get(stage.name)
        if stage.writes:
            if stage.state != STANDS:
                changing[model := f"<{stage.name}>"] = stage.name
            elif entry is not None:
                model = entry["artifact"]


def _report(stages: list[Stage], recipe: str, *, dry_run: bool) -> Report:
    written = [stage.artifact for stage in stages if stage.artifact is not None]
    report = Report("run", {"recipe": recipe, "steps": []}, artifact=Path(written[-1]) if written else None)
    rows: list[list[Any]] = []
    for stage in stages:
        entry = {"step": stage.name, "state": stage.state, "why": stage.why or None}
        report.data["steps"].append(entry | {"seconds": stage.seconds, "report": stage.report})
        took = f"{stage.seconds:.1f} s" if stage.state in (DONE, FAILED) else ""
        rows.append([stage.name, stage.state, stage.why if dry_run else stage.artifact or "", took])
        report.gates += [Gate(**each) for each in (stage.report or {}).get("gates", [])]
    columns = ["step", "", "why" if dry_run else "artifact", ""]
    report.tables.append(Table(f"chain of {recipe}", columns, rows))
    if all(stage.state == STANDS for stage in stages):
        report.notes.append(f"nothing to do: all {count(len(stages))} steps are up to date")
    if dry_run:
        report.notes.append("dry run: nothing was run")
    return report
