"""`--data` specs to samples."""

import zipfile
from dataclasses import replace
from pathlib import Path

from peftc.data import arrays, images, limits, streamed, tables
from peftc.data.dataset import Dataset, Splits, choose
from peftc.data.given import Given
from peftc.data.spec import Columns, columns_of, parts_of
from peftc.errors import DataError, did_you_mean, refuse_not_utf8
from peftc.store import pointers

__all__ = ["Dataset", "open_data", "parts_of", "split_names"]

FORMS = (
    "a folder or .zip of class folders, a .csv .tsv .jsonl .parquet .txt .npz .safetensors or IDX file, "
    "`hf:NAME[:CONFIG]`, or `sklearn:digits`"
)
READERS = {".npz": arrays.npz, ".safetensors": arrays.safetensors}
WINDOWED = ("masked-lm", "causal-lm")  # their samples are windows of tokens, counted after reading


def open_data(
    spec: str | Path,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    task: str | None = None,
    role: str = "evaluation",
    streaming: bool = False,
    rows: int | None = None,
) -> Dataset:
    """Return the samples that a `--data` spec names, or holds.

    Args:
        spec: what the user typed; `?text=NAME` names a column of a table, and `@SPLIT` at its end picks a split.
        num_samples: keep so many, seeded, the classes as even as they allow; None keeps all.
        task: for `sentence-similarity` labels are scores; for language models rows are never dropped; for
            `image-text-retrieval` a table holds pairs of an image and a text.
        role: ``evaluation`` or ``calibration``, which prefer different splits.
        streaming: read a data set of the hub as it comes, and return its head.
        rows: of the head; as many as samples, or as are usual, when None.

    Raises:
        DataError: nothing is there, it cannot be read, or it does not hold what was asked for.
    """
    refuse_not_utf8("`--data`", spec)
    name, at = parts_of(spec)
    name, own = columns_of(name)
    if streaming:
        splits = streamed.hub(name, own, task, rows or num_samples)
    else:
        splits = spec.splits(name, own, task) if isinstance(spec, Given) else _splits(name, own, task)
    chosen, note = choose(name, splits, at or None, role)
    dataset = splits[chosen]()
    dataset = replace(dataset, notes=[note, *dataset.notes])
    return dataset if task in WINDOWED else dataset.take(num_samples, seed=seed)


def split_names(spec: str | Path) -> list[str]:
    """Return all splits of what a `--data` spec names."""
    if isinstance(spec, Given):
        return list(spec.parts)
    return list(_splits(columns_of(parts_of(spec)[0])[0], Columns(), None))


def _splits(name: str, columns: Columns, task: str | None) -> Splits:
    """Return the splits of what a name stands for, read by the columns that the spec names."""
    if name.startswith("hf:"):
        return tables.hub(name.removeprefix("hf:"), columns, task)
    has_columns = False
    if name.startswith("sklearn:"):
        found = arrays.sklearn(name.removeprefix("sklearn:"))
    else:
        with limits.refused(name):
            path = Path(name).expanduser()
            is_folder, is_file, is_there = path.is_dir(), path.is_file(), path.exists()
            pairs = arrays.idx_files(path) if is_folder else []
        files = [path] if is_file and path.suffix.lower() in tables.ENDINGS else []
        if is_folder and not pairs:
            files = tables.in_folder(path, columns, task)
        if files:
            found, has_columns = tables.files(files, str(path), columns, task), path.suffix.lower() != ".txt"
        elif is_file:
            found = _file(path, name)
        elif is_folder:
            found = arrays.idx(pairs, str(path)) if pairs else images.class_folders(images.folder_tree(path))
        else:
            why = "it is no file, but a pipe or a device" if is_there else "the path does not exist"
            raise DataError(
                f"there is no data at `{name}`", why=why, hint=did_you_mean(name, f"`--data` takes {FORMS}")
            )
    if columns.names() and not has_columns:
        raise DataError(f"`{name}` has no columns", why="it is no table", hint="leave what follows the `?` out")
    return found


def _file(path: Path, name: str) -> Splits:
    """Return the splits of a file that is no table."""
    pointers.refuse(path, DataError)
    ending = path.suffix.lower()
    if "-ubyte" in path.name:
        return arrays.idx(arrays.idx_files(path), name)
    if ending in READERS:
        return READERS[ending](path)
    if ending == ".zip" or zipfile.is_zipfile(path):
        return images.class_folders(images.zip_tree(path))
    why = f"`{ending}` is no known ending"
    raise DataError(f"cannot read data from `{name}`", why=why, hint=f"`--data` takes {FORMS}")
