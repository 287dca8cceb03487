"""Images of a table, alone or each with a caption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftc.data import limits
from peftc.data.dataset import Dataset, Pairs
from peftc.data.images import decode
from peftc.errors import DataError, named

IMAGE = ("image", "img", "images", "picture", "jpg", "png")
FILE = ("file_name", "filename", "image_path", "image_file", "filepath", "file_path", "file", "path")
CAPTION = ("caption", "captions", "text", "sentence", "description", "title", "alt_text")
STEMS = ("metadata", "captions")  # of a table that lies beside the images

Cells = tuple[Callable[[int], bytes], Callable[[int], str]]  # the bytes of a row's image, and what tells it from others


def is_asked(image: str | None, text: str | None, task: str | None) -> bool:
    """Return whether a table is read as images with captions: for retrieval, or where both columns are named."""
    return task == "image-text-retrieval" or (image is not None and text is not None)


def tables(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Return the table that lies beside the images of a folder, by its usual names."""
    return [path for path in sorted(folder.iterdir()) if path.stem.lower() in STEMS and path.suffix in endings]


def image_column(table: Any) -> str | None:
    """Return the column of images, by its type or a usual name."""
    typed = [column for column, feature in table.features.items() if type(feature).__name__ == "Image"]
    return typed[0] if typed else _usual(table.column_names, IMAGE)


def _usual(columns: Sequence[str], names: Sequence[str]) -> str | None:
    known = {column.strip().lower(): column for column in reversed(columns)}
    return next((known[name] for name in names if name in known), None)


def column_of(table: Any, column: str, name: str) -> list[Any]:
    """Return the values of a column.

    Raises:
        DataError: they are no text, or damaged otherwise.
    """
    from pyarrow import ArrowException

    with limits.refused(name, f"column `{column}`: ", ArrowException):
        return list(table[column])


def cells(table: Any, column: str, name: str, folder: Path | None) -> Cells:
    """Return the readers of a column of images.

    Args:
        table: of the `datasets` library.
        column: of paths, or of what the library calls images.
        name: of the data, for refusals.
        folder: from which relative paths start; None where the library knows.

    Raises:
        DataError: a file is not there.
    """
    import datasets
    from pyarrow import ArrowException

    if folder is not None and getattr(table.features[column], "dtype", None) in ("string", "large_string"):
        return _files([str(cell) if cell else "" for cell in column_of(table, column, name)], column, name, folder)
    with limits.refused(name, f"column `{column}` holds no images: ", ArrowException):
        stored = table.cast_column(column, datasets.Image(decode=False))

    def content(row: int) -> bytes:
        with limits.refused(name, f"row {row}: ", ArrowException):
            value = stored[row][column]
        if value is None or not (value["bytes"] or value["path"]):
            raise DataError(f"row {row} of `{name}` has no image in column `{column}`")
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        return _read((folder or Path()) / (value["path"]), row, name)

    return content, lambda row: hashlib.sha256(content(row)).hexdigest()


def _files(paths: list[str], column: str, name: str, folder: Path) -> Cells:
    with limits.refused(name, f"column `{column}`: "):
        missing = [row for row, path in enumerate(paths) if not path or not (folder / path).is_file()]
    if missing:
        first = missing[0]
        raise DataError(
            f"{len(missing)} of {len(paths)} images of `{name}` are missing",
            why=f"row {first} names `{paths[first]}` as its `{column}`, and there is no file `{folder / paths[first]}`",
            hint=f"paths start from the folder of the table; name another column: `--data '{name}?image=NAME'`",
        )
    return lambda row: _read(folder / paths[row], row, name), lambda row: paths[row]


def _read(path: Path, row: int, name: str) -> bytes:
    with limits.refused(f"row {row} of {name}"), limits.opened(path) as file:
        return limits.whole(file, limits.IMAGE_BYTES, f"{name}, row {row}")


def pairs(
    table: Any, name: str, split: str, *, image: str | None, text: str | None, folder: Path | None, notes: list[str]
) -> Dataset:
    """Return the rows of a table as pairs of an image and a text.

    Args:
        table: of the `datasets` library.
        name, split: of the data.
        image, text: columns; guessed when None.
        folder: from which relative paths start.
        notes: to hand on.

    Raises:
        DataError: a column, an image or a caption is missing.
    """
    image = image or image_column(table) or _usual(table.column_names, FILE)
    text = text or _usual([column for column in table.column_names if column != image], CAPTION)
    for column, what, kind in ((image, "images", "image"), (text, "captions", "text")):
        if column is None:
            raise DataError(
                f"`{name}` has no column of a usual name for {what}",
                why=f"its columns are {named(table.column_names, 20)}",
                hint=f"name it: `--data '{name}?{kind}=NAME'`",
            )
    assert image is not None and text is not None
    captions = column_of(table, text, name)
    bad = next((row for row, value in enumerate(captions) if not isinstance(value, str) or not value.strip()), None)
    if bad is not None:
        raise DataError(
            f"row {bad} of `{name}` has no caption in column `{text}`", why=f"it holds {captions[bad]!r}"[:200]
        )
    content, identity = cells(table, image, name, folder)
    known: dict[str, int] = {}
    return Dataset(
        kind="image-text",
        name=name,
        split=split,
        rows=range(len(captions)),
        read=lambda row: (decode(content(row), f"{name}, row {row}"), captions[row]),
        content=lambda row: content(row) + b"\0" + captions[row].encode("utf-8", "surrogatepass"),
        pairs=Pairs(captions, [known.setdefault(identity(row), row) for row in range(len(captions))]),
        notes=notes,
    )
