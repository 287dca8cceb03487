"""Rows of .jsonl files: an object of JSON per line.

They are read here, and not by pyarrow as `datasets` does it: its reader ends the process on some damaged files.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from peftc.data import limits
from peftc.errors import DataError, shown

TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')  # a string, which may hold brackets, or a bracket


def table(path: Path) -> Any:
    """Return the rows of a file, each an object of JSON, as a table of the `datasets` library."""
    import datasets
    from pyarrow import ArrowException

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
    limits.refuse_bomb(str(path), length, 8 * count * len(columns))
    if not count:
        raise DataError(f"`{path}` is empty")
    full = {key: _typed([*values, *[None] * (count - len(values))]) for key, values in columns.items()}
    with limits.refused(path, "", ArrowException):
        return datasets.Dataset.from_dict(full)


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
