"""peftc methods."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Argument

from peftc.cli import console
from peftc.cli import options as o
from peftc.errors import UsageError, nearest, one_of


class Kind(NamedTuple):
    """Where a kind of method is taken."""

    heading: str
    command: str
    typed: str  # the option, with a place for the name


KINDS = {
    "decompose": Kind("How matrices are factored", "decompose", "--method {}"),
    "decompose_conv": Kind("How convolutions are factored", "decompose", "--conv-method {}"),
    "importance": Kind("How layers are scored", "prune-layers", "--score {}"),
    "loss": Kind("What healing pulls towards", "distill", "--loss {}=1"),
    "adapter": Kind("What learns in finetuning", "finetune", "--method {}"),
    "format": Kind("What an export is", "export", "--format {}"),
}
PAGES = Path(__file__).parents[1] / "docs"
NEAREST = 60  # columns that two explanations need beside each other
DASHED = str.maketrans("_", "-")

Word = Annotated[str | None, Argument(metavar="[COMMAND]", help="the command that takes them (default: all)")]
Name = Annotated[str | None, Argument(metavar="[NAME]", help="one of them, with its settings")]


def methods(command: Word = None, name: Name = None, json: o.Json = False) -> None:
    """List methods, losses, scores and formats to choose from.

    With a command also when to take which, and the paper that it is of; with a name its settings.

    \b
    Example:
      peftc methods finetune lora
    """
    found = _chosen(command)
    if name is not None:
        word = name.replace("-", "_")
        one_of(f"peftc methods {command}", word.translate(DASHED), [each.translate(DASHED) for each in names_of(found)])
        found = {kind: {word: names[word]} for kind, names in found.items() if word in names}
    if json:
        from peftc.report import Report

        details = {kind: {each: details_of(kind, each) for each in names} for kind, names in found.items()}
        console.report(Report("methods", data={"methods": found, "details": details}), json=True)
        return
    width = console.width(of_stdout=True) or 100
    if name is not None:
        lines = _about(*next((kind, each) for kind, names in found.items() for each in names), width)
    elif command is not None:
        lines = _tables(found, width)
    else:
        lines = _list(found, width)
    console.out("".join(f"{line}\n" for line in lines))


def names_of(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the names of all kinds."""
    return [name for names in found.values() for name in names]


def _chosen(command: str | None) -> dict[str, dict[str, str]]:
    """Return the methods that a command takes, or of the kind of that name; refuse any other word."""
    found = known()
    if command is None:
        return found
    word = command.translate(DASHED)
    word = "decompose" if word in ("analyze", "calibrate") else word
    kinds = [kind for kind, one in KINDS.items() if word in (one.command, kind.translate(DASHED))]
    if not kinds:
        commands = list(dict.fromkeys(one.command for one in KINDS.values()))
        home = next((kind for kind, names in found.items() if word.replace("-", "_") in names), None)
        near = f"{KINDS[home].command} {word}" if home else nearest(word, commands)
        why = f"these take methods: {', '.join(f'`{each}`' for each in commands)}"
        hint = f"did you mean `peftc methods {near}`?" if near else "`peftc methods` lists all"
        raise UsageError(f"`{command}` is no command that takes methods", why=why, hint=hint)
    return {kind: found[kind] for kind in kinds}


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
            rows.append((name.translate(DASHED), told["summary"], _first_sentence(told["when"]), told["paper"]))
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
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", _page(kind, name), re.M)
    yield ""
    if not rows:
        yield "It has no settings."
        return
    column = max(len(f"{key}={value}") for key, value, _ in rows) + 4
    yield f"Set by --set {name if kind == 'loss' else ''}{'.' if kind == 'loss' else ''}KEY=VALUE, with these defaults:"
    for key, value, meaning in rows:
        lines = textwrap.wrap(_plain(meaning), max(width - column, 30)) or [""]
        yield f"  {f'{key}={value}':<{column - 2}}{lines[0]}"
        yield from (f"{'':{column}}{line}" for line in lines[1:])


def _title(kind: str, name: str = "NAME") -> str:
    one = KINDS[kind]
    return console.title(f"{one.heading}: peftc {one.command} {one.typed.format(name.translate(DASHED))}")


def details_of(kind: str, name: str) -> dict[str, Any]:
    """Return what a method is; of another package's, nothing is known before it is imported."""
    from peftc.methods import METHODS, described

    if name not in METHODS[kind]:
        return {"source": "", "summary": "", "when": "", "paper": "", "settings": {}, "recipe": {}}
    found = described(kind, name)
    summary = re.sub(r" \([^()]*arXiv[^()]*\)", "", found["source"]).replace("``", "`").rstrip(".")
    return {**found, "summary": summary, "when": _when(kind, name)}


def _when(kind: str, name: str) -> str:
    """Return when to take a method: the paragraph of its page below how it is typed."""
    paragraphs = _page(kind, name).split("\n\n")
    at = next((at for at, text in enumerate(paragraphs) if text.startswith(f"`peftc {KINDS[kind].command} ")), None)
    return "" if at is None else _plain(" ".join(paragraphs[at + 1].split()))


def page_of(kind: str, name: str) -> str:
    """Return where the page of a method stands, among all pages."""
    return f"methods/{kind.translate(DASHED)}/{name.translate(DASHED)}.md"


def _page(kind: str, name: str) -> str:
    try:
        return (PAGES / page_of(kind, name)).read_text(encoding="utf-8")
    except OSError:  # another package's, or pages were left out
        return ""


def _plain(text: str) -> str:
    """Return Markdown without its links and the files that figures are from."""
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text).replace("\\|", "|")
    return re.sub(r" \(`tests/[^()]*\)", "", text)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s+(?=[A-Z])", text)[0].rstrip(".")


def known() -> dict[str, dict[str, str]]:
    """Return every method by kind and name with the module it lives in, those of other packages included."""
    from peftc.methods import METHODS, home, outsiders

    return {
        kind: {
            **{name: home(kind, name) for name in own},
            **{name: point.value for name, point in outsiders(kind).items() if name not in own},
        }
        for kind, own in METHODS.items()
    }
