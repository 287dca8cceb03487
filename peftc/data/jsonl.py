"""Rows of .jsonl files: an object of JSON per line.

They are read here, and not by pyarrow as `datasets` does it: its reader ends the process on some damaged files.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from peftc.data import limits, remembered, stored
from peftc.data.remembered import Identity
from peftc.data.rows import Look
from peftc.errors import DataError, shown

AT_ONCE = 10_000  # rows of a large file
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')  # a string, which may hold brackets, or a bracket


def table(path: Path, look: Look | None = None) -> Any:
    """Return the rows of a file, each an object of JSON, as a table of the `datasets` library.

    Where ``look`` tells whether a large file is as it was, they are read once, some at a time, and lie on disk.
    """
    begun = look() if look else None
    if look is not None and begun is not None:
        try:
            return _on_disk(path, begun, look)
        except _MixedError:
            pass  # which a look at all values of a column settles
    import datasets
    from pyarrow import ArrowException

    _, full = next(_blocks(path, None), (0, None))
    if full is None:
        raise DataError(f"`{path}` is empty")
    with limits.refused(path, "", ArrowException):
        return datasets.Dataset.from_dict({key: _typed(values) for key, values in full.items()})


class _MixedError(Exception):
    """The values of a column are not of one type."""


def _on_disk(path: Path, begun: Identity, look: Look) -> Any:
    import datasets
    import pyarrow
    from datasets.table import InMemoryTable

    @functools.cache
    def schema() -> Any:
        found = []
        try:
            for _, block in _blocks(path, AT_ONCE):
                found.append(pyarrow.schema([(key, pyarrow.array(values).type) for key, values in block.items()]))
                found = [pyarrow.unify_schemas(found, promote_options="permissive")]
        except (pyarrow.ArrowException, *limits.DAMAGED):
            raise _MixedError from None
        if not found:
            raise DataError(f"`{path}` is empty")
        return found[0]

    def blocks() -> Iterator[Any]:
        for count, block in _blocks(path, AT_ONCE):
            full = {name: block.get(name, [None] * count) for name in schema().names}
            yield pyarrow.RecordBatch.from_pydict(full, schema=schema())
        remembered.refuse_change(str(path), begun, look)

    return datasets.Dataset(InMemoryTable(stored.table(begun.of("jsonl").key, schema, blocks)))


def _blocks(path: Path, most: int | None) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yield a number of rows, at most so many or all, and the values of each column; None where a row has none."""
    columns: dict[str, list[Any]] = {}
    count, length = 0, path.stat().st_size
    for found in _objects(path):
        for key, value in found.items():
            if key not in columns:
                limits.refuse_bomb(str(path), length, 8 * count * len(columns))
            values = columns.setdefault(key, [])
            values += [None] * (count - len(values))
            values.append(value)
        count += 1
        limits.refuse_columns(path, len(columns))
        if count == most:
            yield count, {key: [*values, *[None] * (count - len(values))] for key, values in columns.items()}
            columns, count = {}, 0
    limits.refuse_bomb(str(path), length, 8 * count * len(columns))
    if count:
        yield count, {key: [*values, *[None] * (count - len(values))] for key, values in columns.items()}


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the object of each line, or those of the one list that the file is."""
    with limits.opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            is_list = number == 1 and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            found = _parsed(line + file.read() if is_list else line, path, number)
            for each in found if is_list else [found]:
                if not isinstance(each, dict):
                    why = f'row {number} is no object of JSON, as `{{"text": ...}}`'
                    raise DataError(f"cannot read `{path}`", why=why)
                yield each


def _parsed(text: bytes, path: Path, number: int) -> Any:
    """Return what a text of JSON holds, which starts in some row."""
    steps = ({b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0) for token in TOKEN.finditer(text))
    if text.count(b"[") + text.count(b"{") > limits.NESTING and max(accumulate(steps), default=0) > limits.NESTING:
        why = f"in row {number} JSON lies in JSON more than {limits.NESTING} times"
        raise DataError(f"cannot read `{path}`", why=why)

    def no_number(word: str) -> float:
        raise ValueError(f"`{word}` is no number")

    with limits.refused(path, f"row {number}: "):
        return json.loads(text.decode("utf-8-sig"), parse_constant=no_number)


def _typed(values: list[Any]) -> list[Any]:
    """Return the values of a column as one type: as texts where they mix, and nested ones as what is no text."""
    from pyarrow import ArrowException, array

    try:
        array(values)
    except (ArrowException, *limits.DAMAGED):
        cells = [value for value in values if value is not None]
        if all(isinstance(cell, str | int | float) and shown(cell) == str(cell) for cell in cells):
            return [value if value is None else str(value) for value in values]
        return [["of several types, or not UTF-8", json.dumps(value)] for value in values]
    return values
