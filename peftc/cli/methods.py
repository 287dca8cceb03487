"""peftc methods."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated

from typer import Argument

from peftc.cli import console
from peftc.cli import options as o
from peftc.steps.methods import DASHED, KINDS, details_of, first_sentence, page, plain_text
from peftc.steps.methods import methods as step

NEAREST = 60  # columns that two explanations need beside each other

Word = Annotated[str | None, Argument(metavar="[COMMAND]", help="the command that takes them (default: all)")]
Name = Annotated[str | None, Argument(metavar="[NAME]", help="one of them, with its settings")]


def methods(command: Word = None, name: Name = None, json: o.Json = False) -> None:
    """List methods, losses, scores and formats to choose from.

    With a command also when to take which, and the paper that it is of; with a name its settings.

    \b
    Example:
      peftc methods finetune lora
    """
    report = step(command, name)
    if json:
        console.report(replace(report, tables=[]), json=True)
        return
    found = report.data["methods"]
    width = console.width(of_stdout=True) or 100
    if name is not None:
        lines = _about(*next((kind, each) for kind, names in found.items() for each in names), width)
    elif command is not None:
        lines = _tables(found, width)
    else:
        lines = _list(found, width)
    console.out("".join(f"{line}\n" for line in lines))


def _list(found: Mapping[str, Mapping[str, str]], width: int) -> Iterator[str]:
    """Yield every method with what it is."""
    column = max(len(name) for names in found.values() for name in names) + 4
    for kind, names in found.items():
        yield from (_title(kind), "")
        for name in names:
            told = textwrap.wrap(details_of(kind, name)["summary"], max(width - column, 20)) or [""]
            yield f"  {name.translate(DASHED):<{column - 2}}{told[0]}".rstrip()
            yield from (f"{'':{column}}{line}" for line in told[1:])
        yield ""
    last = "`peftc methods COMMAND` says when to take which, `peftc methods COMMAND NAME` what can be set."
    yield from textwrap.wrap(last, width)


def _tables(found: Mapping[str, Mapping[str, str]], width: int) -> Iterator[str]:
    """Yield a table of each kind: name, what it is, when to take it, paper."""
    for kind, names in found.items():
        rows = []
        for name in names:
            told = details_of(kind, name)
            rows.append((name.translate(DASHED), told["summary"], first_sentence(told["when"]), told["paper"]))
        yield from (_title(kind), "", *_laid_out(rows, width), "")
    command = KINDS[next(iter(found))].command
    yield f"`peftc methods {command} NAME` shows what can be set."


def _laid_out(rows: list[tuple[str, str, str, str]], width: int) -> Iterator[str]:
    head = ("name", "what it is", "when to take it", "paper")
    first, last = (max(len(row[index]) for row in (head, *rows)) for index in (0, 3))
    last = last if any(row[3] for row in rows) else 0
    free = width - first - last - 6
    if free < NEAREST:
        for name, what, when, paper in rows:
            yield f"{name}  {paper}".rstrip()
            yield from (f"  {line}" for text in (what, when) for line in textwrap.wrap(text, width - 2))
        return
    widths = (first, (free + 1) // 2, free // 2, last)
    yield from _row(head, widths)
    yield from _row(["-" * each for each in widths], widths)
    for row in rows:
        yield from _row(row, widths)


def _row(cells: Iterable[str], widths: tuple[int, ...]) -> Iterator[str]:
    wrapped = [textwrap.wrap(cell, max(width, 1)) for cell, width in zip(cells, widths, strict=True)]
    for at in range(max(map(len, wrapped))):
        parts = (lines[at] if at < len(lines) else "" for lines in wrapped)
        yield "  ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()


def _about(kind: str, name: str, width: int) -> Iterator[str]:
    """Yield what is known of one method."""
    told = details_of(kind, name)
    yield _title(kind, name)
    paper = "" if told["paper"] in told["source"] else f"Paper: {told['paper']}"
    for text in (told["source"], told["when"], paper):
        if text:
            yield ""
            yield from textwrap.wrap(text.replace("``", "`"), width)
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", page(kind, name), re.M)
    yield ""
    if not rows:
        yield "It has no settings."
        return
    column = max(len(f"{key}={value}") for key, value, _ in rows) + 4
    yield f"Set by --set {name if kind == 'loss' else ''}{'.' if kind == 'loss' else ''}KEY=VALUE, with these defaults:"
    for key, value, meaning in rows:
        lines = textwrap.wrap(plain_text(meaning), max(width - column, 30)) or [""]
        yield f"  {f'{key}={value}':<{column - 2}}{lines[0]}"
        yield from (f"{'':{column}}{line}" for line in lines[1:])


def _title(kind: str, name: str = "NAME") -> str:
    one = KINDS[kind]
    return console.title(f"{one.heading}: peftc {one.command} {one.typed.format(name.translate(DASHED))}")
