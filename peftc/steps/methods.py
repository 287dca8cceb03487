"""The table of methods, with what their files and their pages say > Report: no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peftc.errors import UsageError, nearest, one_of
from peftc.methods import registry
from peftc.report import Report, Table


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
DASHED = str.maketrans("_", "-")


def methods(command: str | None = None, name: str | None = None) -> Report:
    """Return the methods, losses, scores and formats to choose from.

    Args:
        command: of which command, as ``finetune``; all when None.
        name: one of these alone.

    Raises:
        UsageError: there is no such command, or none of that name.
    """
    found = chosen(command)
    if name is not None:
        word = name.replace("-", "_")
        one_of(f"peftc methods {command}", word.translate(DASHED), [each.translate(DASHED) for each in names_of(found)])
        found = {kind: {word: names[word]} for kind, names in found.items() if word in names}
    details = {kind: {each: details_of(kind, each) for each in names} for kind, names in found.items()}
    report = Report("methods", data={"methods": found, "details": details})
    for kind, names in details.items():
        rows = [
            [each.translate(DASHED), told["summary"], first_sentence(told["when"]), told["paper"]]
            for each, told in names.items()
        ]
        columns = list(zip(["name", "what it is", "when to take it", "paper"], *rows, strict=True))
        names_of_columns, *lines = zip(*(column for column in columns if any(column[1:])), strict=True)
        report.tables.append(Table(KINDS[kind].heading, names_of_columns, lines))
    return report


def names_of(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the names of all kinds."""
    return [name for names in found.values() for name in names]


def chosen(command: str | None) -> dict[str, dict[str, str]]:
    """Return the methods that a command takes, or of the kind of that name; refuse any other word."""
    found = known()
    if command is None:
        return found
    word = command.translate(DASHED)
    word = "decompose" if word in ("analyze", "calibrate") else word
    kinds = [kind for kind, one in KINDS.items() if word in (one.command, kind.translate(DASHED))]
    if not kinds:
        commands = list(dict.fromkeys(one.command for one in KINDS.values()))
        where = next((kind for kind, names in found.items() if word.replace("-", "_") in names), None)
        near = f"{KINDS[where].command} {word}" if where else nearest(word, commands)
        why = f"these take methods: {', '.join(f'`{each}`' for each in commands)}"
        hint = f"did you mean `peftc methods {near}`?" if near else "`peftc methods` lists all"
        raise UsageError(f"`{command}` is no command that takes methods", why=why, hint=hint)
    return {kind: found[kind] for kind in kinds}


def details_of(kind: str, name: str) -> dict[str, Any]:
    """Return what a method is; of another package's, nothing is known before it is imported."""
    if name not in registry.METHODS[kind]:
        return {"source": "", "summary": "", "when": "", "paper": "", "settings": {}, "recipe": {}}
    found = registry.described(kind, name)
    summary = re.sub(r" \([^()]*arXiv[^()]*\)", "", found["source"]).replace("``", "`").rstrip(".")
    return {**found, "summary": summary, "when": _when(kind, name)}


def _when(kind: str, name: str) -> str:
    """Return when to take a method: the paragraph of its page below how it is typed."""
    paragraphs = page(kind, name).split("\n\n")
    at = next((at for at, text in enumerate(paragraphs) if text.startswith(f"`peftc {KINDS[kind].command} ")), None)
    return "" if at is None else plain_text(" ".join(paragraphs[at + 1].split()))


def page_of(kind: str, name: str) -> str:
    """Return where the page of a method stands, among all pages."""
    return f"methods/{kind.translate(DASHED)}/{name.translate(DASHED)}.md"


def page(kind: str, name: str) -> str:
    """Return the page of a method as Markdown; empty where there is none."""
    try:
        return (PAGES / page_of(kind, name)).read_text(encoding="utf-8")
    except OSError:  # another package's, or pages were left out
        return ""


def plain_text(text: str) -> str:
    """Return Markdown without its links and the files that figures are from."""
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text).replace("\\|", "|")
    return re.sub(r" \(`tests/[^()]*\)", "", text)


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, without its full stop."""
    return re.split(r"(?<=[.])\s+(?=[A-Z])", text)[0].rstrip(".")


def known() -> dict[str, dict[str, str]]:
    """Return every method by kind and name with the module it lives in, those of other packages included."""
    return {
        kind: {
            **{name: registry.home(kind, name) for name in own},
            **{name: point.value for name, point in registry.outsiders(kind).items() if name not in own},
        }
        for kind, own in registry.METHODS.items()
    }
