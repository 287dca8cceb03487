"""Samples in arrays: .npz and .safetensors files, IDX files (the MNIST family), scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftc.data.dataset import Dataset, Splits, split_word
from peftc.data.images import named
from peftc.errors import DataError, one_of
from peftc.header import read_header

INPUTS = {"x", "images", "image", "data", "inputs", "input", "features"}
LABELS = {"y", "labels", "label", "targets", "target"}
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IDX_NAME = re.compile(r"(?P<split>.*?)[-_.]?(?P<role>images|labels)[-.]idx\d-ubyte(\.gz)?")

Arrays = dict[str, np.ndarray]


def npz(path: Path) -> Splits:
    """Read `x_train`, `y_train`, `x_test`, ... (or `train_images`, `images`, `target`, ...) from a .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise DataError(f"cannot read `{path}`", why=f"it is no whole .npz file of plain arrays: {error}") from None
    return _paired(str(path), arrays)


def safetensors(path: Path) -> Splits:
    """Read the same names from a .safetensors file."""
    from safetensors.torch import load_file

    read_header(path)
    tensors = load_file(path)
    return _paired(str(path), {key: (t.float() if t.is_floating_point() else t).numpy() for key, t in tensors.items()})


def _paired(name: str, arrays: Arrays) -> Splits:
    """Sort arrays into splits by the words in their names."""
    found: dict[str, Arrays] = {}
    unknown = []
    for key, array in arrays.items():
        parts = set(re.split(r"[^a-z0-9]+", key.lower()))
        role = "x" if parts & INPUTS else "y" if parts & LABELS else None
        if role is None:
            unknown.append(key)
        else:
            found.setdefault(split_word(key) or "all", {})[role] = array
    without = [split for split, pair in found.items() if "x" not in pair]
    if not found or without:
        raise DataError(
            f"`{name}` holds no samples" + (f" for split `{without[0]}`" if without else ""),
            why=f"its arrays are {named(sorted(arrays))}",
            hint="name them `x_train`, `y_train`, `x_test`, `y_test`, or `images` and `labels`",
        )
    notes = [f"data: arrays left unread: {named(unknown)}"] if unknown else []
    return _splits(name, found, notes)


def _splits(name: str, found: dict[str, Arrays], notes: list[str]) -> Splits:
    labels = {
        split: _labels(f"{name}@{split}", pair["y"], len(pair["x"])) for split, pair in found.items() if "y" in pair
    }
    values = sorted({value for column in labels.values() for value in column.tolist()})
    is_class = bool(values) and all(isinstance(value, int) for value in values)
    return {
        split: partial(_dataset, name, split, pair["x"], labels.get(split), values if is_class else None, notes)
        for split, pair in found.items()
    }


def _labels(name: str, array: np.ndarray, samples: int) -> np.ndarray:
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.shape != (samples,):
        raise DataError(
            f"the labels of `{name}` have shape {list(array.shape)}",
            why=f"there are {samples} samples, with one label each",
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise DataError(f"the labels of `{name}` contain NaN or infinite values")
        return array.astype(np.int64) if (array == array.astype(np.int64)).all() else array
    return array.astype(np.int64)


def _dataset(
    name: str, split: str, x: np.ndarray, y: np.ndarray | None, values: list[int] | None, notes: list[str]
) -> Dataset:
    labels: list[Any] | None = None if y is None else y.tolist()
    if labels is not None and values is not None:
        index = {value: number for number, value in enumerate(values)}
        labels = [index[label] for label in labels]
    is_image = x.dtype == np.uint8
    x = _channels_last(f"{name}@{split}", x) if is_image else x[:, None] if x.ndim == 3 else x
    return Dataset(
        kind="image" if is_image else "tensor",
        name=name,
        split=split,
        rows=range(len(x)),
        labels=labels,
        classes=None if values is None else [str(value) for value in values],
        read=(lambda row: x[row]) if is_image else (lambda row: _finite(name, x, row)),
        content=lambda row: x[row].tobytes(),
        notes=notes
        if is_image
        else [*notes, f"data: `{name}` holds {x.dtype} values, which the model reads as they are"],
    )


def _channels_last(name: str, x: np.ndarray) -> np.ndarray:
    """Return uint8 images as (n, h, w) or (n, h, w, 3 or 4)."""
    if x.ndim == 3:
        return x
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4):
        return x[..., 0] if x.shape[-1] == 1 else x
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return _channels_last(name, np.moveaxis(x, 1, -1))
    raise DataError(
        f"`{name}` holds uint8 values of shape {list(x.shape)}",
        why="images are (n, h, w), (n, h, w, c) or (n, c, h, w)",
    )


def _finite(name: str, x: np.ndarray, row: int) -> torch.Tensor:
    if not np.isfinite(x[row]).all():
        raise DataError(f"sample {row} of `{name}` contains NaN or infinite values")
    return torch.from_numpy(np.ascontiguousarray(x[row], dtype=np.float32))


def idx_files(folder: Path) -> list[Path]:
    """Return the IDX files of a folder, by their usual names (`t10k-images-idx3-ubyte`, with or without .gz)."""
    return [path for path in sorted(folder.iterdir()) if IDX_NAME.fullmatch(path.name)]


def idx(files: list[Path], name: str) -> Splits:
    """Read pairs of images and labels, for each split that the names tell."""
    found: dict[str, Arrays] = {}
    for path in files:
        match = IDX_NAME.fullmatch(path.name)
        if match:
            role = "x" if match["role"] == "images" else "y"
            found.setdefault(split_word(match["split"]) or match["split"] or "all", {})[role] = _read_idx(path)
    for split, pair in found.items():
        if "x" not in pair:
            raise DataError(f"`{name}` has labels but no images for split `{split}`")
    return _splits(name, found, [])


def idx_pair(path: Path) -> list[Path]:
    """Return an IDX file of images and the labels beside it."""
    match = IDX_NAME.fullmatch(path.name)
    if not match or match["role"] != "images":
        raise DataError(
            f"`{path}` is not named like a file of IDX images",
            hint="name the file of images, or the folder that holds both files",
        )
    return [other for other in idx_files(path.parent) if IDX_NAME.fullmatch(other.name)["split"] == match["split"]]  # type: ignore[index]


def _read_idx(path: Path) -> np.ndarray:
    """Read the IDX format: two zero bytes, a type, a number of axes, their big-endian sizes, the values."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read `{path}`", why=str(error)) from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise DataError(f"`{path}` is no IDX file", why=f"it starts with the bytes {content[:4].hex(' ')}")
    axes, dtype = content[3], np.dtype(IDX_TYPES[content[2]])
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(shape) * dtype.itemsize:
        raise DataError(
            f"`{path}` is no whole IDX file", why=f"its header says shape {shape}, but it has {len(content):,} bytes"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def sklearn(name: str) -> Splits:
    """Read scikit-learn's 1,797 digits (8 x 8), split 80 : 20 once and for all, the classes even."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    one_of("--data", f"sklearn:{name}", ["sklearn:digits"])
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    parts = {"train": np.sort(train), "test": np.sort(test)}
    return _splits(
        f"sklearn:{name}", {key: {"x": images[part], "y": digits.target[part]} for key, part in parts.items()}, []
    )
