"""A `--data` spec taken apart: what it names, the columns of a table, and the split.

``tweets.csv?text=tweet&label=sentiment@train``: the columns and the split may be left out. A name of a file that holds
one of these characters is taken as it is, and in the name of a column ``%40`` stands for ``@``, ``%26`` for ``&``.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from peftc.errors import UsageError, one_of
from peftc.options import COLUMNS, Reading

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


def named(spec: str | Path, reading: Reading) -> str:
    """Return a spec with the columns that options name; both may not name different ones of a kind."""
    options: dict[str, str | None] = {kind: getattr(reading, f"{kind}_column") for kind in COLUMNS}
    if not any(options.values()) or str(spec).startswith(GENERATED):  # what is drawn has no columns
        return str(spec)
    name, split = parts_of(spec)
    bare, own = columns_of(name)
    parts = []
    for kind, other in options.items():
        one: str | None = getattr(own, kind)
        if one and other and one != other:
            what = f"`--data {bare}` names `{one}` as the {kind} column, and `--{kind}-column` names `{other}`"
            raise UsageError(what, hint="name it once")
        if column := one or other:
            parts.append(f"{kind}={quote(column, safe=', ')}")
    return f"{bare}?{'&'.join(parts)}" + (f"@{split}" if split else "")


def _exists(name: str) -> bool:
    return os.path.exists(name)  # noqa: PTH110  it takes any text, as a name that is too long
