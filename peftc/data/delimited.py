"""Rows of .csv and .tsv files: what separates cells, whether a header stands above them, and what quotes mean."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peftc.data import limits, remembered
from peftc.data.rows import USUAL, Look, is_number
from peftc.data.spec import Columns
from peftc.errors import DataError, named
from peftc.report import GUESSED

SAMPLE = 1000  # rows of a file that tell whether the first is a header
HEAD = 100_000  # characters of a file in which they are looked for
PIECE = 1 << 17  # characters of a large file that are read at once


def text_of(path: Path) -> str:
    """Return the text of a file, which has to hold some, in UTF-8."""
    return "".join(pieces(path, None))


def pieces(path: Path, size: int | None = PIECE) -> Iterator[str]:
    """Yield the text of a file, which has to hold some, in UTF-8: all, or some characters at once, in whole lines."""
    is_blank, hint = True, "peftc reads UTF-8 text"
    with limits.opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:  # type: ignore[arg-type]
        while True:
            try:
                text = file.read(size) if size is None else file.read(size) + file.readline()
            except UnicodeDecodeError as error:
                raise DataError(f"cannot read `{path}`", why=str(error), hint=hint) from None
            if not text:
                break
            if "\0" in text:
                raise DataError(f"cannot read `{path}`", why="it holds zero bytes, so it is no text", hint=hint)
            is_blank = is_blank and text.isspace()
            yield text
    if is_blank:
        raise DataError(f"`{path}` is empty")


def options_of(path: Path, columns: Columns, look: Look | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return how pandas is to read a file, and notes on what was guessed; ``look`` tells whether it is as it was."""
    begun = look() if look else None
    read = partial(_layout, path, columns)
    known = [str(path), columns.names()]
    sep, header, width, is_quoted, notes = (
        remembered.digest(begun, look, ["layout", known], read) if look is not None else read()
    )
    # "NA" and "null" are words here; QUOTE_NONE where a quote is only a character, as in GLUE's .tsv files
    quoting = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    as_texts = dict.fromkeys(range(width), str)  # of numbers `01` and `1` would be one
    cells = {"keep_default_na": False, "quoting": quoting, "converters": as_texts}
    return {"sep": sep, "column_names": header, **cells}, notes


def _layout(path: Path, columns: Columns) -> list[Any]:
    """Return the separator, names of columns where none stand there, their number, whether quotes quote, and notes."""
    head, notes, sep = "", list[str](), "\t" if path.suffix.lower() == ".tsv" else ","
    is_quoted = True
    for piece in pieces(path):
        if len(head) < HEAD:
            head += piece
        if sep == "\t" and is_quoted:
            opened = [cell for line in piece.splitlines() for cell in line.split("\t") if cell.startswith('"')]
            is_quoted = all(len(cell) > 1 and cell.endswith('"') for cell in opened)
    sample = _sample(path, head, sep)
    if sep == "," and len(sample[0]) == 1:
        other = _sample(path, head, ";")
        if len({len(row) for row in other}) == 1 and len(other[0]) > 1:  # that alone makes a table
            sep, sample = ";", other
            notes.append(f"data: the cells of `{path.name}` are separated by `;`")
    header = _header(path, sample, columns)
    if header is not None:
        notes.append(
            f"{GUESSED}the first row of `{path.name}` is data, so its columns are called {named(header)}; if it "
            f"names them, say so: `--data '{path}?text=NAME&label=NAME'`"
        )
    return [sep, header, len(sample[0]), is_quoted, notes]


def _sample(path: Path, text: str, sep: str) -> list[list[str]]:
    """Return the first rows of a file, the last of which may be cut."""
    with limits.refused(path, "", csv.Error):
        sample = [row for row in csv.reader(io.StringIO(text[:HEAD]), delimiter=sep) if row][:SAMPLE]
    if not sample:
        raise DataError(f"`{path}` has no rows")
    limits.refuse_columns(path, len(sample[0]))
    return sample


def _header(path: Path, sample: list[list[str]], columns: Columns) -> list[str] | None:
    """Return names for the columns of a file without a header; None where the first row is one.

    A row is a header where it holds a usual or a given name; it is data where it holds a number. Otherwise columns
    tell: where one holds numbers under a word, or a few words again and again under one that never returns, the row is
    a header; where the word returns, it is data.
    """
    if len(sample) > 1 and len(sample[1]) > len(sample[0]):  # pandas would take the first cell for a name of the row
        why = f"its first row has {len(sample[0])} cells, and its second has {len(sample[1])}"
        raise DataError(f"cannot read `{path}`", why=why)
    first, rest = sample[0], [row for row in sample[1:-1] or sample[1:] if len(row) == len(sample[0])]
    if USUAL & {cell.strip().lower() for cell in first} or set(columns.names()) & {cell.strip() for cell in first}:
        if len(sample) == 1:
            raise DataError(f"`{path}` has no rows", why="it ends after its header")
        return None
    numeric = [bool(rest) and all(is_number(row[at]) for row in rest) for at in range(len(first))]
    counts = [Counter(row[at] for row in rest) for at in range(len(first))]
    few = [at for at, words in enumerate(counts) if words and min(words.values()) > 1]
    returns = any(first[at] in counts[at] for at in few)
    if not any(map(is_number, first)) and not returns and (any(numeric) or few):
        return None
    lengths = [sum(len(row[at]) for row in [first, *rest]) for at in range(len(first))]
    if len(lengths) == 1:
        return ["text"]
    if len(lengths) == 2:
        return ["text", "label"] if lengths[0] >= lengths[1] else ["label", "text"]
    if len(lengths) == 3 and sum(numeric) == 1:
        pair = iter(("sentence1", "sentence2"))
        return ["score" if is_score else next(pair) for is_score in numeric]
    return [f"column{number}" for number in range(1, len(lengths) + 1)]
