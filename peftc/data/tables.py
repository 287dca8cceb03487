"""Rows with named columns: .csv .tsv .jsonl .parquet .txt files and hub data sets, read by the `datasets` library."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peftc.data import captioned, jsonl, limits
from peftc.data.classes import is_index
from peftc.data.dataset import Dataset, Splits, split_word
from peftc.data.images import decode
from peftc.data.spec import Columns, halves
from peftc.errors import DataError, named, reason_of
from peftc.report import GUESSED

SAMPLE = 1000  # rows of a file that tell whether the first is a header
WHOLE = re.compile(r"-?\d{1,19}\.0*")
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
TEXT = (
    "text",
    "sentence",
    "content",
    "document",
    "review",
    "query",
    "question",
    "utterance",
    "comment",
    "input",
    "story",
)
PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
LABEL = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "target",
    "y",
    "score",
    "similarity",
    "similarity_score",
    "relatedness_score",
    "stars",
    "rating",
    "fine_label",
    "coarse_label",
    "sentiment",
)


def files(paths: Sequence[Path], name: str, columns: Columns, task: str | None) -> Splits:
    """Return one split per file, named by the split word in its name."""
    found: Splits = {}
    for path in paths:
        split = split_word(path.stem) or path.stem
        if split in found:
            raise DataError(f"`{name}` has two files for split `{split}`", hint=f"name one: `--data {path}`")
        found[split] = partial(_file, path, split, columns, task)
    return found


def _file(path: Path, split: str, columns: Columns, task: str | None) -> Dataset:
    if path.suffix.lower() == ".txt":
        text = _text(path)
        return Dataset(
            kind="text",
            name=str(path),
            split=split,
            rows=range(1),
            read=lambda row: text,
            content=lambda row: text.encode(),
        )
    notes: list[str] = []
    if path.suffix.lower() == ".parquet":
        _refuse_parquet(path)
        table = _load("parquet", path)
    elif path.suffix.lower() == ".jsonl":
        table = jsonl.table(path)
    else:
        text = _text(path)
        sep, sample = _first_rows(path, text[:100_000])
        if sep == ";":
            notes.append(f"data: the cells of `{path.name}` are separated by `;`")
        header = _header(path, sample, columns)
        if header is not None:
            notes.append(
                f"{GUESSED}the first row of `{path.name}` is data, so its columns are called {named(header)}; if it "
                f"names them, say so: `--data '{path}?text=NAME&label=NAME'`"
            )
        # "NA" and "null" are words here; QUOTE_NONE where a quote is only a character, as in GLUE's .tsv files
        quoting = csv.QUOTE_NONE if sep == "\t" and not _is_quoted(text) else csv.QUOTE_MINIMAL
        as_texts = dict.fromkeys(range(len(sample[0])), str)  # of numbers `01` and `1` would be one
        table = _load(
            "csv", path, sep=sep, column_names=header, keep_default_na=False, quoting=quoting, converters=as_texts
        )
    return rows(table, str(path), split, columns, task, notes, path.parent)


def _text(path: Path) -> str:
    with limits.opened(path) as file:
        content = file.read()
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read `{path}`", why=str(error), hint="peftc reads UTF-8 text") from None
    if "\0" in text:
        raise DataError(
            f"cannot read `{path}`", why="it holds zero bytes, so it is no text", hint="peftc reads UTF-8 text"
        )
    if not text.strip():
        raise DataError(f"`{path}` is empty")
    return text


def _load(builder: str, path: Path, **options: Any) -> Any:
    """Read a file into memory and leave nothing in a cache."""
    import datasets
    from pyarrow import ArrowException

    with limits.opened(path) as file:
        if not file.read(1):
            raise DataError(f"`{path}` is empty")
    damaged = (datasets.exceptions.DatasetsError, ArrowException)
    with limits.refused(path, "", *damaged), tempfile.TemporaryDirectory() as cache, _silent(datasets):
        try:
            return datasets.load_dataset(
                builder, data_files=_escaped(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Keep the library from drawing bars, and from logging what is raised anyway."""
    shown, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()


def _escaped(path: Path) -> str:
    """Return a path in which the library sees no pattern."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def _refuse_parquet(path: Path) -> None:
    """Refuse a file that unpacks to more than data would: a value that repeats is stored once.

    Raises:
        DataError: with the limit.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_dictionary

    packed = path.stat().st_size
    with limits.opened(path) as raw, limits.refused(path, "", ArrowException), ParquetFile(raw) as file:
        about = file.metadata
        if about.num_columns > limits.COLUMNS:
            raise DataError(f"cannot read `{path}`", why=f"it has more than {limits.COLUMNS:,} columns")
        groups = [about.row_group(at) for at in range(about.num_row_groups)]
        limits.refuse_bomb(str(path), packed, sum(group.total_byte_size for group in groups))
        largest = max((group.total_byte_size for group in groups), default=0)
        if about.num_rows * largest <= limits.UNPACKED:
            return
        unpacked = 0
        for batch in file.iter_batches(max(1, min(1024, limits.UNPACKED // max(largest, 1)))):
            plain = [each.dictionary_decode() if is_dictionary(each.type) else each for each in batch.columns]
            unpacked += sum(max(each.nbytes, 8 * len(each)) for each in plain)
            limits.refuse_bomb(str(path), packed, unpacked)


def _is_quoted(text: str) -> bool:
    """Whether every cell that opens with a quote also closes with one."""
    cells = [cell for line in text.splitlines() for cell in line.split("\t") if cell.startswith('"')]
    return all(len(cell) > 1 and cell.endswith('"') for cell in cells)


def _first_rows(path: Path, start: str) -> tuple[str, list[list[str]]]:
    """Return what separates cells, and the first rows: a comma, or a semicolon where that alone makes a table."""
    if path.suffix.lower() == ".tsv":
        return "\t", _sample(path, start, "\t")
    sample = _sample(path, start, ",")
    if len(sample[0]) == 1:
        other = _sample(path, start, ";")
        if len({len(row) for row in other}) == 1 and len(other[0]) > 1:
            return ";", other
    return ",", sample


def _sample(path: Path, start: str, sep: str) -> list[list[str]]:
    """Return the first rows of a file, the last of which may be cut.

    Raises:
        DataError: there are none, or they are no table.
    """
    with limits.refused(path, "", csv.Error):
        sample = [row for row in csv.reader(io.StringIO(start), delimiter=sep) if row][:SAMPLE]
    if not sample:
        raise DataError(f"`{path}` has no rows")
    if len(sample[0]) > limits.COLUMNS:
        raise DataError(f"cannot read `{path}`", why=f"it has more than {limits.COLUMNS:,} columns")
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
    cells = {cell.strip().lower() for cell in first}
    usual = {*captioned.IMAGE, *captioned.FILE, *captioned.CAPTION, *TEXT, *LABEL}
    usual |= {name for pair in PAIRS for name in pair}
    if cells & usual or set(columns.names()) & {cell.strip() for cell in first}:
        if len(sample) == 1:
            raise DataError(f"`{path}` has no rows", why="it ends after its header")
        return None
    numeric = [bool(rest) and all(_is_number(row[at]) for row in rest) for at in range(len(first))]
    counts = [Counter(row[at] for row in rest) for at in range(len(first))]
    few = [at for at, words in enumerate(counts) if words and min(words.values()) > 1]
    returns = any(first[at] in counts[at] for at in few)
    if not any(map(_is_number, first)) and not returns and (any(numeric) or few):
        return None
    lengths = [sum(len(row[at]) for row in [first, *rest]) for at in range(len(first))]
    return _names(lengths, numeric)


def _names(lengths: list[int], numeric: list[bool]) -> list[str]:
    if len(lengths) == 1:
        return ["text"]
    if len(lengths) == 2:
        return ["text", "label"] if lengths[0] >= lengths[1] else ["label", "text"]
    if len(lengths) == 3 and sum(numeric) == 1:
        pair = iter(("sentence1", "sentence2"))
        return ["score" if is_number else next(pair) for is_number in numeric]
    return [f"column{number}" for number in range(1, len(lengths) + 1)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def hub(spec: str, columns: Columns, task: str | None) -> Splits:
    """Return the splits of `NAME[:CONFIG]` on the hub, or in its cache."""
    import datasets

    name, _, config = spec.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        splits = list(builder.info.splits or datasets.get_dataset_split_names(name, config or None))
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot read the data set `{name}`",
            why=reason_of(error),
            hint=f"it would have been downloaded from the hub as `{name}`",
        ) from None

    def split_of(split: str) -> Dataset:
        with limits.refused(f"hf:{spec}", "", datasets.exceptions.DatasetsError):
            table = datasets.load_dataset(name, config or None, split=split)
        return rows(table, f"hf:{spec}", split, columns, task, [])

    return {split: partial(split_of, split) for split in splits}


def rows(
    table: Any, name: str, split: str, columns: Columns, task: str | None, notes: list[str], folder: Path | None = None
) -> Dataset:
    """Find the input and label columns of a table; relative paths in it start from ``folder``.

    Raises:
        DataError: it has no rows, no column to read, or lacks a column that was named.
    """
    if not len(table):
        raise DataError(f"`{name}` has no rows")
    known = {column.strip().lower(): column for column in reversed(table.column_names)}
    for wanted in columns.names():
        if wanted not in table.column_names:
            raise DataError(
                f"`{name}` has no column `{wanted}`",
                why=f"its columns are {named(table.column_names, 20)}",
                hint=f"name them as `--data '{name}?text=NAME&label=NAME'`",
            )
    if captioned.is_asked(columns.image, columns.text, task):
        return captioned.pairs(table, name, split, image=columns.image, text=columns.text, folder=folder, notes=notes)
    label = columns.label or next((known[name] for name in LABEL if name in known), None)
    image = columns.image or (None if columns.text else captioned.image_column(table))
    if image:
        kind, read, content = _images(table, image, name, folder)
    else:
        kind, read, content = _texts(table, _text_columns(known, columns, name, table.column_names), name)
    labels, classes = (None, None) if label is None else _labels(table, label, name, kind, task)
    return Dataset(
        kind=kind,
        name=name,
        split=split,
        rows=range(len(table)),
        read=read,
        content=content,
        labels=labels,
        classes=classes,
        notes=notes,
    )


Readers = tuple[str, Callable[[int], Any], Callable[[int], bytes]]


def _text_columns(known: dict[str, str], columns: Columns, name: str, there: list[str]) -> list[str]:
    if columns.text:
        return halves(columns.text)[:2]
    for pair in PAIRS:
        if all(half in known for half in pair):
            return [known[half] for half in pair]
    found = next((known[word] for word in TEXT if word in known), None)
    if found is None:
        raise DataError(
            f"`{name}` has no column of a usual name for text",
            why=f"its columns are {named(there, 20)}",
            hint=f"name it: `--data '{name}?text=NAME'`, or `?text=FIRST,SECOND` for pairs",
        )
    return [found]


def _images(table: Any, column: str, name: str, folder: Path | None) -> Readers:
    content, _ = captioned.cells(table, column, name, folder)
    return "image", lambda row: decode(content(row), f"{name}, row {row}"), content


def _texts(table: Any, columns: list[str], name: str) -> Readers:
    values = [captioned.column_of(table, column, name) for column in columns]
    for column, cells in zip(columns, values, strict=True):
        bad = next((row for row, cell in enumerate(cells) if not isinstance(cell, str | int | float)), None)
        if bad is not None:
            raise DataError(
                f"row {bad} of `{name}` has no text in column `{column}`", why=f"it holds {cells[bad]!r}"[:200]
            )

    def read(row: int) -> Any:
        texts = tuple(str(cells[row]) for cells in values)
        return texts if len(texts) == 2 else texts[0]

    return "pairs" if len(columns) == 2 else "text", read, lambda row: json.dumps(read(row)).encode()


def _labels(table: Any, column: str, name: str, kind: str, task: str | None) -> tuple[list[Any], list[str] | None]:
    """Return (indices, classes), or (scores, None) where a pair has a number that is no class."""
    values = captioned.column_of(table, column, name)
    bad = next((row for row, value in enumerate(values) if not _is_label(value)), None)
    if bad is not None:
        raise DataError(
            f"row {bad} of `{name}` has no label in column `{column}`",
            why=f"it holds {values[bad]!r}"[:200],
            hint="give it one, or take the row out",
        )
    names = getattr(table.features[column], "names", None)
    if names:
        if any(not 0 <= value < len(names) for value in values):
            raise DataError(
                f"`{name}` has rows without a label",
                why=f"column `{column}` holds -1",
                hint="choose another split with `@SPLIT`",
            )
        return values, list(names)
    fractions = any(_is_number(str(value)) and not float(value).is_integer() for value in values)
    if kind == "pairs" and (task == "sentence-similarity" or (task is None and fractions)):
        return _scores(values, column, name), None
    texts = [_label_text(value) for value in values]
    if all(WHOLE.fullmatch(text) for text in texts):  # as tables write whole numbers between others: `1.0`
        texts = [text.partition(".")[0] for text in texts]
    classes = sorted(set(texts), key=lambda text: (0, int(text), text) if is_index(text) else (1, 0, text))
    index = {text: number for number, text in enumerate(classes)}
    return [index[text] for text in texts], classes


def _label_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int | float) and bool(str(value).strip()) and value == value


def _scores(values: list[Any], column: str, name: str) -> list[float]:
    bad = next(
        (row for row, value in enumerate(values) if not _is_number(str(value)) or not math.isfinite(float(value))), None
    )
    if bad is not None:
        raise DataError(
            f"row {bad} of `{name}` has no finite score in column `{column}`", why=f"it holds {values[bad]!r}"[:200]
        )
    return [float(value) for value in values]
