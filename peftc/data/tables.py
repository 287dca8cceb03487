"""Rows with named columns: .csv .tsv .jsonl .parquet .txt files and hub data sets, read by the `datasets` library."""

import glob
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from peftc.data import delimited, jsonl, limits, remembered, stored
from peftc.data.classes import is_index
from peftc.data.dataset import Dataset, Pairs, Splits, split_word
from peftc.data.images import decode
from peftc.data.rows import CAPTION, FILE, LABEL, PAIRS, TEXT, Look, Rows, is_label, is_number, is_score
from peftc.data.spec import Columns, halves, naming
from peftc.errors import DataError, named, reason_of
from peftc.store import pointers

WHOLE = re.compile(r"-?\d{1,19}\.0*")
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
STEMS = ("metadata", "captions")  # of a table that lies beside the images


def in_folder(folder: Path, columns: Columns, task: str | None) -> list[Path]:
    """Return the tables that are named by the split in them, else the one beside images by its usual names."""
    there = [path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS]
    named_by_split = [path for path in there if split_word(path.stem)]
    beside_images = [path for path in there if path.stem.lower() in STEMS and is_captioned(columns, task)]
    return named_by_split or beside_images


def is_captioned(columns: Columns, task: str | None) -> bool:
    """Return whether a table is read as images with captions: for retrieval, or where both columns are named."""
    return task == "image-text-retrieval" or (columns.image is not None and columns.text is not None)


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
    pointers.refuse(path, DataError)
    ending, notes = path.suffix.lower(), list[str]()
    if ending == ".txt":
        return _text(path, split)
    begun, look = remembered.identity(path), None
    if begun is not None and begun.is_settled and _is_large(path):
        look = partial(remembered.identity, path)
    if ending == ".parquet":
        _refuse_parquet(path)
        table = _load("parquet", path, look)
    elif ending == ".jsonl":
        table = jsonl.table(path, look)
    else:
        options, notes = delimited.options_of(path, columns, look)
        table = _load("csv", path, look, **options)
    return dataset(Rows(table, str(path), split, columns, task, notes, path.parent, look))


def _is_large(path: Path) -> bool:
    with limits.refused(path):
        return path.stat().st_size >= remembered.LARGE


def _text(path: Path, split: str) -> Dataset:
    """Return a file of text as one sample; a large one is read when it is asked for."""
    if not _is_large(path):
        text = delimited.text_of(path)
        return Dataset("text", str(path), split, lambda row: text, lambda row: text.encode(), range(1), has_lines=True)
    return Dataset(
        kind="text",
        name=str(path),
        split=split,
        read=lambda row: delimited.text_of(path),
        content=lambda row: delimited.text_of(path).encode(),
        rows=range(1),
        has_lines=True,
        identity=partial(remembered.identity, path),
        pieces=partial(delimited.pieces, path),
    )


def _load(builder: str, path: Path, look: Look | None, **options: Any) -> Any:
    """Read a file: a small one into memory, with nothing left in a cache, and a large one into the library's cache."""
    with limits.opened(path) as file:
        if not file.read(1):
            raise DataError(f"`{path}` is empty")
    begun = look() if look else None
    if look is not None and begun is not None:
        place = stored.home() / begun.of(builder, repr(options)).key
        while True:  # a damaged one is made anew; what cannot be kept is read below, and refused there if it has to be
            was_there = place.is_dir()
            with suppress(OSError, ValueError, DataError):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = _built(builder, path, place, in_memory=False, **options)
                remembered.refuse_change(str(path), begun, look)
                if len(found) == found.info.splits["train"].num_examples:
                    return found
            shutil.rmtree(place, ignore_errors=True)
            if not was_there or place.is_dir():
                break
    with tempfile.TemporaryDirectory() as cache:
        return _built(builder, path, Path(cache), in_memory=True, **options)


def _built(builder: str, path: Path, cache: Path, *, in_memory: bool, **options: Any) -> Any:
    import datasets
    from pyarrow import ArrowException

    damaged = (datasets.exceptions.DatasetsError, ArrowException)
    with limits.refused(path, "", *damaged), silent(datasets):
        where = {"data_files": glob.escape(str(path)), "split": "train", "cache_dir": str(cache)}
        try:
            return datasets.load_dataset(builder, **where, keep_in_memory=in_memory, **options)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None


@contextmanager
def silent(datasets: Any) -> Iterator[None]:
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


def _refuse_parquet(path: Path) -> None:
    """Refuse a file that unpacks to more than data would: a value that repeats is stored once."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_dictionary

    packed = path.stat().st_size
    with limits.opened(path) as raw, limits.refused(path, "", ArrowException), ParquetFile(raw) as file:
        about = file.metadata
        limits.refuse_columns(path, about.num_columns)
        sizes = [about.row_group(at).total_byte_size for at in range(about.num_row_groups)]
        limits.refuse_bomb(str(path), packed, sum(sizes))
        largest = max(sizes, default=0)
        if about.num_rows * largest <= limits.UNPACKED:
            return
        unpacked = 0
        for batch in file.iter_batches(max(1, min(1024, limits.UNPACKED // max(largest, 1)))):
            plain = [each.dictionary_decode() if is_dictionary(each.type) else each for each in batch.columns]
            unpacked += sum(max(each.nbytes, 8 * len(each)) for each in plain)
            limits.refuse_bomb(str(path), packed, unpacked)


def builder_of(spec: str) -> tuple[Any, list[str]]:
    """Return what reads `NAME[:CONFIG]` of the hub, or of its cache, and the names of its splits."""
    import datasets

    name, _, config = spec.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        return builder, list(builder.info.splits or datasets.get_dataset_split_names(name, config or None))
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        hint = f"it would have been downloaded from the hub as `{name}`"
        raise DataError(f"cannot read the data set `{name}`", why=reason_of(error), hint=hint) from None


def hub(spec: str, columns: Columns, task: str | None) -> Splits:
    """Return the splits of `NAME[:CONFIG]` on the hub, or in its cache."""
    import datasets

    name, _, config = spec.partition(":")
    _, splits = builder_of(spec)

    def split_of(split: str) -> Dataset:
        with limits.refused(f"hf:{spec}", "", datasets.exceptions.DatasetsError):
            table = datasets.load_dataset(name, config or None, split=split)
        known = remembered.Identity(remembered.key_of(spec, table._fingerprint), is_settled=True)
        look = (lambda: known) if table.data.nbytes >= remembered.LARGE else None
        return dataset(Rows(table, f"hf:{spec}", split, columns, task, [], None, look))

    return {split: partial(split_of, split) for split in splits}


def dataset(rows: Rows) -> Dataset:
    """Find the input and label columns of a table."""
    name, columns = rows.name, rows.columns
    if not len(rows.table):
        raise DataError(f"`{name}` has no rows")
    lacks = [column for column in columns.names() if column not in rows.table.column_names]
    if lacks:
        why = f"its columns are {named(rows.table.column_names, 20)}"
        hint = f"name them as {naming(name, 'text', 'label')}"
        raise DataError(f"`{name}` has no column `{lacks[0]}`", why=why, hint=hint)
    if is_captioned(columns, rows.task):
        return _pairs(rows)
    label = columns.label or rows.usual(LABEL)
    image = columns.image or (None if columns.text else rows.image_column())
    if image:
        content, _, look = rows.images(image)
        every = range(len(rows.table))
        found = Dataset(
            kind="image",
            name=name,
            split=rows.split,
            read=lambda row: decode(content(row), f"{name}, row {row}"),
            content=content,
            rows=every,
            identity=look,
        )
    else:
        found = _texts(rows)
    found.notes = rows.notes
    if label is not None:
        found.labels, found.classes = _labels(rows, label, found.kind)
    return found


def _pairs(rows: Rows) -> Dataset:
    name = rows.name
    image = rows.columns.image or rows.image_column() or rows.usual(FILE)
    text = rows.columns.text or rows.usual(CAPTION, but=image)
    image, text = rows.need(image, "images", "image"), rows.need(text, "captions", "text")
    captions = rows.values(text, "caption", lambda value: isinstance(value, str) and bool(value.strip()))
    content, identity, look = rows.images(image)
    known: dict[str, int] = {}
    own = remembered.key_of(captions) if look else ""
    return Dataset(
        kind="image-text",
        name=name,
        split=rows.split,
        rows=range(len(captions)),
        read=lambda row: (decode(content(row), f"{name}, row {row}"), captions[row]),
        content=lambda row: content(row) + b"\0" + captions[row].encode("utf-8", "surrogatepass"),
        pairs=Pairs(captions, [known.setdefault(identity(row), row) for row in range(len(captions))]),
        notes=rows.notes,
        identity=(lambda: found.of(own) if (found := look()) else None) if look else None,
    )


def _texts(rows: Rows) -> Dataset:
    pairs = ([column for half in pair if (column := rows.usual([half]))] for pair in PAIRS)
    columns = halves(rows.columns.text)[:2] or next((pair for pair in pairs if len(pair) == 2), [])
    if not columns:
        columns = [rows.need(rows.usual(TEXT), "text", "text", ", or `?text=FIRST,SECOND` for pairs")]
    values = [rows.texts(column) for column in columns]

    def read(row: int) -> Any:
        texts = tuple(str(cells[row]) for cells in values)
        return texts if len(texts) == 2 else texts[0]

    kind, every = "pairs" if len(columns) == 2 else "text", range(len(rows.table))
    look = rows.of("texts", columns)
    return Dataset(kind, rows.name, rows.split, read, lambda row: json.dumps(read(row)).encode(), every, identity=look)


def _labels(rows: Rows, column: str, kind: str) -> tuple[list[Any], list[str] | None]:
    """Return (indices, classes), or (scores, None) where a pair has a number that is no class."""
    values = rows.values(column, "label", is_label, "give it one, or take the row out")
    names = getattr(rows.table.features[column], "names", None)
    if names:
        if any(not 0 <= value < len(names) for value in values):
            why, hint = f"column `{column}` holds -1", "choose another split with `@SPLIT`"
            raise DataError(f"`{rows.name}` has rows without a label", why=why, hint=hint)
        return values, list(names)
    fractions = any(is_number(value) and not float(value).is_integer() for value in values)
    if kind == "pairs" and (rows.task == "sentence-similarity" or (rows.task is None and fractions)):
        return [float(value) for value in rows.values(column, "finite score", is_score)], None
    texts = [
        str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip() for value in values
    ]
    if all(WHOLE.fullmatch(text) for text in texts):  # as tables write whole numbers between others: `1.0`
        texts = [text.partition(".")[0] for text in texts]
    classes = sorted(set(texts), key=lambda text: (0, int(text), text) if is_index(text) else (1, 0, text))
    index = {text: number for number, text in enumerate(classes)}
    return [index[text] for text in texts], classes
