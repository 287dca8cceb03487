"""A `--data` spec taken apart: what it names, the columns of a table, and the split.

``tweets.csv?text=tweet&label=sentiment@train``: the columns and the split may be left out. A name of a file that holds
one of these characters is taken as it is, and in the name of a column ``%40`` stands for ``@``, ``%26`` for ``&``.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from peftc.errors import UsageError, one_of
from peftc.options import COLUMNS
from peftc.store.commands import is_given

GENERATED = "generated:"  # a spec of texts that are drawn from a model


@dataclass(frozen=True)
class Columns:
    """Which columns the user named; ``text`` may name two, with a comma between."""

    image: str | None = None
    text: str | None = None
    label: str | None = None

    def names(self) -> list[str]:
        """Return every column named."""
        return [name for name in (self.image, self.label) if name] + halves(self.text)


def halves(text: str | None) -> list[str]:
    """Split `sentence1,sentence2`."""
    return [name.strip() for name in text.split(",")] if text else []


def parts_of(spec: str | Path) -> tuple[str, str]:
    """Return what a `--data` spec names, with its columns, and the split that it picks, or no text."""
    name = str(spec)
    bare, mark, query = name.partition("?")
    if "@" not in name or _exists(name) or (mark and "@" not in query and _exists(bare)):
        return name, ""
    name, _, end = name.rpartition("@")
    split, mark, query = end.partition("?")
    return name + mark + query, split


def columns_of(name: str) -> tuple[str, Columns]:
    """Return what a spec without its split names, and its columns; one of no kind or no name is refused."""
    bare, mark, query = name.partition("?")
    if not mark or "=" not in query or _exists(name):
        return name, Columns()
    found: dict[str, str] = {}
    for part in query.split("&"):
        kind, _, column = part.partition("=")
        one_of(f"--data {name}", kind, list(COLUMNS))
        if not column or kind in found:
            why = "names no column" if not column else "names one again"
            raise UsageError(f"`{part}` in `--data {name}` {why}", hint="write it as `text=NAME`, of pairs `text=A,B`")
        found[kind] = unquote(column)
    return bare, Columns(**found)


def naming(name: str, *kinds: str) -> str:
    """Return how columns of data are named: behind its spec, or in Python, where it has none that can be typed."""
    if is_given(name):
        more = "; to tensors and lists give labels as `(input, label)`" if kinds == ("label",) else ""
        return ", ".join(f"`{kind}_column=NAME`" for kind in kinds) + more
    return f"`--data '{name}?{'&'.join(f'{kind}=NAME' for kind in kinds)}'`"


def _exists(name: str) -> bool:
    return os.path.exists(name)  # noqa: PTH110  it takes any text, as a name that is too long
