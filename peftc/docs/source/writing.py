"""What the writers of the pages share: tables, and docstrings as Markdown."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from peftc.methods import registry

NOTE = "<!-- `make docs` writes this page; {} -->"
PROSE = "prose and examples stand in peftc/docs/source/{}.md"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a bar in a cell is escaped, and empty where there is no row."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return "\n".join(f"| {line} |" for line in [*head, *lines]) if lines else ""


def page(source: str, *parts: str) -> str:
    """Return a page of parts that are not empty; ``source`` says where they stand."""
    return "\n\n".join([NOTE.format(source), *(part for part in parts if part)]) + "\n"


def arguments(function: Callable[..., Any], heading: str = "Args") -> dict[str, str]:
    """Return parameter -> what the docstring says of it; `as for` another method is looked up there."""
    text = inspect.cleandoc(function.__doc__ or "").partition(f"{heading}:\n")[2]
    lines = text.split("\n\n")[0].splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if match := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif names and line.startswith("        "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    for name, text in found.items():
        if other := re.match(r"as for `(\w+)`", text):
            for kind in (kind for kind, known in registry.METHODS.items() if other[1] in known):
                found[name] = arguments(registry.find(kind, other[1], kind)).get(name, text)
    return found


def prose(text: str) -> str:
    """Return a docstring as Markdown: each paragraph a line, code between single backticks."""
    return re.sub(r"``(.+?)``", r"`\1`", "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")))
