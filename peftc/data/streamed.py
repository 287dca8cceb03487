"""Data sets of the hub that are read as they come: no copy is kept on disk, and nothing counts their rows.

A stream is read in blocks of rows, each of which is a small data set like any other. So columns, labels and kinds are
found as elsewhere, and a block can be shuffled as a whole. Where a block begins the library's state of the stream says
all that is needed to read on from there.
"""

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peftc.data import limits, tables
from peftc.data.dataset import Dataset, Splits, Stream
from peftc.data.remembered import key_of
from peftc.data.rows import Rows as Table
from peftc.data.spec import Columns
from peftc.errors import DataError, UsageError
from peftc.models.hub import failures

Rows = dict[str, list[Any]]  # by column
HEAD = 512  # rows from the start that stand for all where nothing is learnt from them
CLASSIFYING = "classification"  # how tasks end that need to know all classes


def hub(name: str, columns: Columns, task: str | None, number: int | None) -> Splits:
    """Return the splits of a data set of the hub, each as its first rows, with the stream that they begin."""
    if not name.startswith("hf:"):
        why = f"`{name}` lies here, and is read piece by piece where it is large"
        raise UsageError("`--streaming` reads data sets of the hub", why=why, hint="leave it out")
    if tables.is_captioned(columns, task):
        why = "they are paired over all rows"
        hint = "leave it out"
        raise UsageError(f"`--streaming` reads no images with captions, as of `{name}`", why=why, hint=hint)
    builder, splits = tables.builder_of(name.removeprefix("hf:"))
    return {split: partial(_head, builder, name, split, columns, task, number or HEAD) for split in splits}


def _head(builder: Any, name: str, split: str, columns: Columns, task: str | None, number: int) -> Dataset:
    """Return the first rows of a split as a data set in memory, which says how to read on."""
    import datasets
    from pyarrow import ArrowException

    with limits.refused(name, "", datasets.exceptions.DatasetsError, *failures()):
        source = builder.as_streaming_dataset(split=split)
        for column, feature in (source.features or {}).items():
            if type(feature).__name__ == "Image":
                source = source.cast_column(column, datasets.Image(decode=False))
    _, rows = next(_read(source, name, number), (None, {}))
    if not rows:
        raise DataError(f"`{name}` has no rows")
    features = source.features or datasets.Dataset.from_dict(rows).features

    def of(rows: Rows) -> Dataset:
        with limits.refused(name, "", ArrowException):
            table = datasets.Dataset.from_dict(rows, features=features)
        return tables.dataset(Table(table, name, split, columns, task, []))

    def blocks(size: int, skip: int, state: str | None) -> Iterator[tuple[str | None, Dataset]]:
        return ((began, of(rows)) for began, rows in _read(source, name, size, skip, state))

    found = of(rows)
    if task is not None and task.endswith(CLASSIFYING) and found.classes is not None:
        _refuse_unnamed(features, found)
    found.notes.append(f"data: read as it comes; its first {len(found):,} rows stand for split `{split}` in figures")
    found.stream = Stream(_key(builder, name, split, columns), blocks, is_whole=len(found) < number)
    return found


def _refuse_unnamed(features: Any, found: Dataset) -> None:
    """Refuse classes that no column names, but are those that happen to stand in the first rows (DataError)."""
    if not any(getattr(each, "names", None) == found.classes for each in features.values()):
        why = "the column of labels is no `ClassLabel`, so only all rows together tell which classes there are"
        raise DataError(f"`--streaming` cannot tell the classes of `{found.name}`", why=why, hint="leave it out")


def _read(
    source: Any, name: str, size: int, skip: int = 0, state: str | None = None
) -> Iterator[tuple[str | None, Rows]]:
    """Yield blocks of rows, each with the state from which it is read again.

    Args:
        source: the stream of the library, which is left as it is.
        name: of the data set.
        size: rows of a block; the last one has what is left.
        skip: rows at the start to leave out.
        state: where to begin; at the start when None.
    """
    import datasets
    from pyarrow import ArrowException

    source = copy.deepcopy(source).skip(skip)
    damaged = (datasets.exceptions.DatasetsError, ArrowException, *failures())
    if state is not None:  # it is of blocks of this size
        source.load_state_dict(json.loads(state))
    blocks = source.iter(batch_size=size)  # and not row by row, which in a process of torch's gives a part of them
    while True:
        with limits.refused(name, "", *damaged), tables.silent(datasets):
            rows = next(blocks, None)
        if rows is None:
            return
        yield state, rows
        state = json.dumps(source.state_dict())


def _key(builder: Any, name: str, split: str, columns: Columns) -> str:
    """Return what tells a stream apart: which files it is of, as the library names them, and how they are read."""
    return key_of("stream", name, split, columns, *Path(builder.cache_dir).parts[-3:])
