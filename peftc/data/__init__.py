"""`--data` specs to samples."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

from peftc.data import arrays, captioned, images, limits, tables
from peftc.data.dataset import Dataset, Splits, choose, split_word
from peftc.data.spec import Columns, columns_of, merged, parts_of
from peftc.errors import DataError, refuse_not_utf8

__all__ = ["Dataset", "open_data", "parts_of", "split_names"]

FORMS = (
    "a folder or .zip of class folders, a .csv .tsv .jsonl .parquet .txt .npz .safetensors or IDX file, "
    "`hf:NAME[:CONFIG]`, or `sklearn:digits`"
)
WINDOWED = ("masked-lm", "causal-lm")  # their samples are windows of tokens, counted after reading


def open_data(
    spec: str | Path,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    task: str | None = None,
    role: str = "evaluation",
) -> Dataset:
    """Return the samples that a `--data` spec names.

    Args:
        spec: what the user typed; `?text=NAME` names a column of a table, and `@SPLIT` at its end picks a split.
        num_samples: keep so many, seeded, the classes as even as they allow; None keeps all.
        seed: of the subset.
        image_column, text_column, label_column: overrule the guess from usual names; two text columns as `one,two`;
            an image and a text column make pairs.
        task: for `sentence-similarity` labels are scores; for language models rows are never dropped; for
            `image-text-retrieval` a table holds pairs of an image and a text.
        role: ``evaluation`` or ``calibration``, which prefer different splits.

    Raises:
        DataError: nothing is there, it cannot be read, or it does not hold what was asked for.
    """
    refuse_not_utf8("`--data`", spec)
    name, at = parts_of(spec)
    name, own = columns_of(name)
    splits, is_table = _splits(name, merged(name, own, Columns(image_column, text_column, label_column)), task)
    if own.names() and not is_table:
        raise DataError(f"`{name}` has no columns", why="it is no table", hint="leave what follows the `?` out")
    chosen, note = choose(name, splits, at or None, role)
    dataset = splits[chosen]()
    dataset = replace(dataset, notes=[note, *dataset.notes])
    return dataset if task in WINDOWED else dataset.take(num_samples, seed=seed)


def split_names(spec: str | Path) -> list[str]:
    """Return all splits of what a `--data` spec names."""
    return list(_splits(columns_of(parts_of(spec)[0])[0], Columns(), None)[0])


def _splits(name: str, columns: Columns, task: str | None) -> tuple[Splits, bool]:
    """Return the splits of what a name stands for, and whether it is a table."""
    if name.startswith("hf:"):
        return tables.hub(name.removeprefix("hf:"), columns, task), True
    if name.startswith("sklearn:"):
        return arrays.sklearn(name.removeprefix("sklearn:")), False
    with limits.refused(name):
        path = Path(name).expanduser()
        is_folder, is_file, is_there = path.is_dir(), path.is_file(), path.exists()
    if is_folder:
        return _folder(path, columns, task)
    if not is_file:
        why = "it is no file, but a pipe or a device" if is_there else "the path does not exist"
        raise DataError(f"there is no data at `{name}`", why=why, hint=f"`--data` takes {FORMS}")
    ending = path.suffix.lower()
    if "-ubyte" in path.name:
        return arrays.idx(arrays.idx_pair(path), name), False
    if ending == ".npz":
        return arrays.npz(path), False
    if ending == ".safetensors":
        return arrays.safetensors(path), False
    if ending in tables.ENDINGS:
        return tables.files([path], name, columns, task), ending != ".txt"
    if ending == ".zip" or zipfile.is_zipfile(path):
        return images.class_folders(images.zip_tree(path)), False
    raise DataError(
        f"cannot read data from `{name}`", why=f"`{ending}` is no known ending", hint=f"`--data` takes {FORMS}"
    )


def _folder(path: Path, columns: Columns, task: str | None) -> tuple[Splits, bool]:
    """Read IDX files, or tables named by split or beside images, in the folder itself; else class folders."""
    with limits.refused(path):
        found = arrays.idx_files(path)
    if found:
        return arrays.idx(found, str(path)), False
    if found := [file for file in sorted(path.iterdir()) if file.suffix in tables.ENDINGS and split_word(file.stem)]:
        return tables.files(found, str(path), columns, task), True
    if captioned.is_asked(columns.image, columns.text, task) and (found := captioned.tables(path, tables.ENDINGS)):
        return tables.files(found, str(path), columns, task), True
    return images.class_folders(images.folder_tree(path)), False
