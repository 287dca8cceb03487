"""A table with named columns: which of them hold what, as the user says or by usual names, and what is in them."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftc.data import limits, remembered
from peftc.data.dataset import Each
from peftc.data.remembered import Identity
from peftc.data.spec import Columns, naming
from peftc.errors import DataError, named

IMAGE = ("image", "img", "images", "picture", "jpg", "png")
FILE = ("file_name", "filename", "image_path", "image_file", "filepath", "file_path", "file", "path")
CAPTION = ("caption", "captions", "text", "sentence", "description", "title", "alt_text")
TEXT = "text sentence content document review query question utterance comment input story".split()
PAIRED = (
    "sentence1/sentence2 sentence_1/sentence_2 sentence_a/sentence_b text1/text2 text_a/text_b premise/hypothesis "
    "question1/question2 question/sentence"
)
PAIRS = [pair.split("/") for pair in PAIRED.split()]
LABEL = (
    "label labels category class intent target y score similarity similarity_score relatedness_score stars rating "
    "fine_label coarse_label sentiment"
).split()
Look = Callable[[], Identity | None]  # tells without reading them whether rows are what they were
# the bytes of a row's image, what tells it from others, and what tells all of them from what they may become
Cells = tuple[Callable[[int], bytes], Callable[[int], str], Look | None]
USUAL = {*IMAGE, *FILE, *CAPTION, *TEXT, *LABEL, *(name for pair in PAIRS for name in pair)}


@dataclass(frozen=True)
class Rows:
    """A table, and what is asked of it."""

    table: Any  # of the `datasets` library
    name: str
    split: str
    columns: Columns  # that the user named
    task: str | None  # that the samples are for; None where nothing tells it
    notes: list[str]  # what people should know about how it was read
    folder: Path | None = None  # from which relative paths start; None where the library knows
    look: Look | None = None  # at a large table; None for a small one

    def usual(self, names: Sequence[str], but: str | None = None) -> str | None:
        """Return the first column of a usual name, other than ``but``."""
        known = {column.strip().lower(): column for column in reversed(self.table.column_names) if column != but}
        return next((known[name] for name in names if name in known), None)

    def image_column(self) -> str | None:
        """Return the column of images, by its type or a usual name."""
        typed = [column for column, feature in self.table.features.items() if type(feature).__name__ == "Image"]
        return typed[0] if typed else self.usual(IMAGE)

    def need(self, column: str | None, what: str, kind: str, more: str = "") -> str:
        """Return a column that has to be there, or say how to name it."""
        if column is not None:
            return column
        why = f"its columns are {named(self.table.column_names, 20)}"
        hint = f"name it: {naming(self.name, kind)}{more}"
        raise DataError(f"`{self.name}` has no column of a usual name for {what}", why=why, hint=hint)

    def values(
        self, column: str, what: str = "", fits: Callable[[Any], bool] = lambda value: True, hint: str | None = None
    ) -> list[Any]:
        """Return the values of a column, each of which has to be what ``fits`` says."""
        from pyarrow import ArrowException

        with limits.refused(self.name, f"column `{column}`: ", ArrowException):
            found = list(self.table[column])
        for row, value in enumerate(found):
            if not fits(value):
                why = f"it holds {value!r}"[:200]
                raise DataError(f"row {row} of `{self.name}` has no {what} in column `{column}`", why=why, hint=hint)
        return found

    def texts(self, column: str) -> Sequence[Any]:
        """Return the values of a column of texts, or of numbers; of a large table they are read when needed."""
        cells = self.table.data.column(column)
        plain = str(cells.type) in ("string", "large_string") and not cells.null_count
        if self.look is None or not plain or getattr(self.table, "_indices", None) is not None:
            return self.values(column, "text", lambda cell: isinstance(cell, str | int | float))
        name = self.name

        def cell(row: int) -> str:
            try:
                return cells[row].as_py()  # type: ignore[no-any-return]
            except UnicodeDecodeError as error:
                raise DataError(f"cannot read `{name}`", why=f"column `{column}`: row {row}: {error}") from None

        return Each(len(cells), cell)

    def of(self, *more: object) -> Look | None:
        """Return what tells whether what is made of the table in one of several ways is what it was."""
        if (look := self.look) is None:
            return None
        return lambda: found.of(*more) if (found := look()) else None

    def images(self, column: str) -> Cells:
        """Return the readers of a column of images: of paths, or of what the `datasets` library calls images."""
        import datasets
        from pyarrow import ArrowException

        name, folder = self.name, self.folder
        if folder is not None and getattr(self.table.features[column], "dtype", None) in ("string", "large_string"):
            return _files([str(cell) if cell else "" for cell in self.values(column)], column, name, folder)
        with limits.refused(name, f"column `{column}` holds no images: ", ArrowException):
            stored = self.table.cast_column(column, datasets.Image(decode=False))

        def content(row: int) -> bytes:
            with limits.refused(name, f"row {row}: ", ArrowException):
                value = stored[row][column]
            if value is None or not (value["bytes"] or value["path"]):
                raise DataError(f"row {row} of `{name}` has no image in column `{column}`")
            if value["bytes"] is not None:
                return bytes(value["bytes"])
            return _read((folder or Path()) / (value["path"]), row, name)

        inside = all(chunk.field("bytes").null_count == 0 for chunk in stored.data.column(column).chunks)
        look = self.of("images", column) if inside else None  # else they lie in files that nothing looks at
        return content, lambda row: hashlib.sha256(content(row)).hexdigest(), look


def _files(paths: list[str], column: str, name: str, folder: Path) -> Cells:
    with limits.refused(name, f"column `{column}`: "):
        missing = [row for row, path in enumerate(paths) if not path or not (folder / path).is_file()]
    if missing:
        path = paths[missing[0]]
        why = f"row {missing[0]} names `{path}` as its `{column}`, and there is no file `{folder / path}`"
        hint = f"paths start from the folder of the table; name another column: `--data '{name}?image=NAME'`"
        raise DataError(f"{len(missing)} of {len(paths)} images of `{name}` are missing", why=why, hint=hint)
    look = partial(remembered.identity, folder, paths) if len(paths) >= remembered.MANY else None
    return lambda row: _read(folder / paths[row], row, name), lambda row: paths[row], look


def _read(path: Path, row: int, name: str) -> bytes:
    with limits.refused(f"row {row} of {name}"), limits.opened(path) as file:
        return limits.whole(file, limits.IMAGE_BYTES, f"{name}, row {row}")


def is_number(value: Any) -> bool:
    """Return whether a value, or what a text says, is a number."""
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def is_score(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return is_number(value) and math.isfinite(float(value))


def is_label(value: Any) -> bool:
    """Return whether a value can stand for a class: a text that is not empty, or a number."""
    return isinstance(value, str | int | float) and bool(str(value).strip()) and value == value
