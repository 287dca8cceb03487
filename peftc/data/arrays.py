"""Samples in arrays: .npz and .safetensors files, IDX files (the MNIST family), scikit-learn's digits."""

import gzip
import math
import re
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import torch

from peftc.data import limits
from peftc.data.dataset import Dataset, Splits, split_word
from peftc.data.limits import AXES, HEADER
from peftc.errors import DataError, named, one_of
from peftc.store.header import read_header

INPUTS = {"x", "images", "image", "data", "inputs", "input", "features"}
LABELS = {"y", "labels", "label", "targets", "target"}
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# as `t10k-images-idx3-ubyte`, with or without .gz
IDX_NAME = re.compile(r"(?P<split>.*?)[-_.]?(?P<role>images|labels)[-.]idx\d-ubyte(\.gz)?")

Arrays = dict[str, np.ndarray]


def npz(path: Path) -> Splits:
    """Read `x_train`, `y_train`, `x_test`, ... (or `train_images`, `images`, `target`, ...) from a .npz file."""
    why = "it is no whole .npz file of plain arrays: "
    with limits.opened(path) as raw:
        with limits.refused(path, why):
            archive = zipfile.ZipFile(raw)
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        limits.refuse_bomb(str(path), path.stat().st_size, sum(info.file_size for info in members.values()))

        def read(key: str) -> np.ndarray:
            with limits.refused(path, why), archive.open(members[key]) as file:
                return _read_npy(file, members[key].file_size, f"{path}: {key}")

        return _paired(str(path), members, read)


def _read_npy(file: IO[bytes], length: int, name: str) -> np.ndarray:
    """Read an array, whose header says how large it is: that is compared with the bytes that there are, and no more."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, is_transposed, dtype = header(file, max_header_size=HEADER)
    except (RecursionError, MemoryError, TokenError):  # it is a literal of Python, of at most 10,000 characters
        raise DataError(f"`{name}` is no plain array", why="its header is nested too deep") from None
    if dtype.kind not in "buif" or not len(shape) <= AXES:
        raise DataError(f"`{name}` is no plain array", why=f"its header says {len(shape)} axes of dtype `{dtype}`")
    promised, there = math.prod(shape) * dtype.itemsize, length - file.tell()
    if promised != there or min(shape, default=0) < 0:
        why = f"its header says shape {_shape(shape)} of `{dtype}`, {promised:,} bytes, and {there:,} bytes follow"
        raise DataError(f"`{name}` is no whole array", why=why)
    array: np.ndarray = np.empty(promised, np.uint8)
    for start in range(0, promised, limits.MIB):  # so that no second copy of it is made
        part = array[start : start + limits.MIB]
        part[:] = np.frombuffer(file.read(len(part)), np.uint8)
    return array.view(dtype).reshape(shape, order="F" if is_transposed else "C")


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(f"{side:,}" for side in [*shape][:AXES])


def safetensors(path: Path) -> Splits:
    """Read the same names from a .safetensors file."""
    import safetensors

    there = read_header(path)[0]
    with limits.refused(path, "", safetensors.SafetensorError):
        file = safetensors.safe_open(path, framework="pt")

    def read(key: str) -> np.ndarray:
        with limits.refused(path, "", safetensors.SafetensorError):
            tensor = file.get_tensor(key)
            return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    return _paired(str(path), there, read)


def _paired(name: str, keys: Iterable[str], read: Callable[[str], np.ndarray]) -> Splits:
    """Sort arrays into splits by the words in their names, and read those that have a place there."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        parts = set(re.split(r"[^a-z0-9]+", key.lower()))
        role = "x" if parts & INPUTS else "y" if parts & LABELS else None
        if role is None:
            unknown.append(key)
        else:
            found.setdefault(split_word(key) or "all", {})[role] = key
    without = [split for split, pair in found.items() if "x" not in pair]
    if not found or without:
        what = f"`{name}` holds no samples" + (f" for split `{without[0]}`" if without else "")
        hint = "name them `x_train`, `y_train`, `x_test`, `y_test`, or `images` and `labels`"
        raise DataError(what, why=f"its arrays are {named(sorted(keys))}", hint=hint)
    notes = [f"data: arrays left unread: {named(unknown)}"] if unknown else []
    arrays = {split: {role: read(key) for role, key in pair.items()} for split, pair in found.items()}
    return splits(name, arrays, notes)


def splits(name: str, found: dict[str, Arrays], notes: list[str]) -> Splits:
    """Return the samples of arrays by split and role: ``x`` and, where there are labels, ``y``."""
    labels = {}
    for split, pair in found.items():
        x = pair["x"]
        if x.ndim < 2 or not x.size or x.dtype.kind not in "buif":
            why = f"they have shape {list(x.shape)} and dtype `{x.dtype}`"
            raise DataError(f"the samples of `{name}@{split}` are none", why=why)
        if "y" in pair:
            labels[split] = _labels(f"{name}@{split}", pair["y"], len(x))
    values = sorted({value for column in labels.values() for value in column.tolist()})
    classes = {value: number for number, value in enumerate(values)}
    is_class = bool(values) and all(isinstance(value, int | str) for value in values)

    def dataset(split: str) -> Dataset:
        x, y = found[split]["x"], labels.get(split)
        known: list[Any] | None = None if y is None else y.tolist()
        where, is_image = f"{name}@{split}", x.dtype == np.uint8
        x = channels_last(where, x) if is_image else x[:, None] if x.ndim == 3 else x
        if is_image:
            limits.refuse_sides(where, x.shape[2], x.shape[1])

        def read(row: int) -> Any:
            if is_image:
                return x[row]
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
                sample = np.array(x[row], dtype=np.float32)
            if not np.isfinite(sample).all():
                raise DataError(f"sample {row} of `{name}` contains NaN or infinite values")
            return torch.from_numpy(sample)

        kind = "image" if is_image else "tensor"
        told = [] if is_image else [f"data: `{name}` holds {x.dtype} values, which the model reads as they are"]
        own = [classes[value] for value in known] if known is not None and is_class else known
        words = [str(value) for value in values] if is_class else None
        every = range(len(x))
        return Dataset(kind, name, split, read, lambda row: x[row].tobytes(), every, own, words, notes=[*notes, *told])

    return {split: partial(dataset, split) for split in found}


def _labels(name: str, array: np.ndarray, samples: int) -> np.ndarray:
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.shape != (samples,):
        why = f"there are {samples} samples, with one label each"
        raise DataError(f"the labels of `{name}` have shape {list(array.shape)}", why=why)
    if array.dtype.kind == "U":  # names of classes, given in Python
        return array
    if array.dtype.kind not in "buif":
        raise DataError(f"the labels of `{name}` are no numbers", why=f"their dtype is `{array.dtype}`")
    if not np.isfinite(array).all():
        raise DataError(f"the labels of `{name}` contain NaN or infinite values")
    if array.dtype.kind == "f" and (array % 1).any():
        return array
    if (array > 2**62).any() or (array < -(2**62)).any():
        raise DataError(f"the labels of `{name}` are too large", why=f"they go from {array.min()} to {array.max()}")
    return array.astype(np.int64)


def channels_last(name: str, x: np.ndarray) -> np.ndarray:
    """Return uint8 images as (n, h, w) or (n, h, w, 3 or 4)."""
    if x.ndim == 3:
        return x
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4):
        return x[..., 0] if x.shape[-1] == 1 else x
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return channels_last(name, np.moveaxis(x, 1, -1))
    why = "images are (n, h, w), (n, h, w, c) or (n, c, h, w)"
    raise DataError(f"`{name}` holds uint8 values of shape {list(x.shape)}", why=why)


IdxFiles = list[tuple[Path, re.Match[str]]]  # with the parts of their names


def idx_files(path: Path) -> IdxFiles:
    """Return the IDX files of a folder, by their usual names, or a file of images and that of the labels beside it."""
    if path.is_dir():
        return [(each, match) for each in sorted(path.iterdir()) if (match := IDX_NAME.fullmatch(each.name))]
    own = IDX_NAME.fullmatch(path.name)
    if not own or own["role"] != "images":
        hint = "name the file of images, or the folder that holds both files"
        raise DataError(f"`{path}` is not named like a file of IDX images", hint=hint)
    return [(each, match) for each, match in idx_files(path.parent) if match["split"] == own["split"]]


def idx(files: IdxFiles, name: str) -> Splits:
    """Read pairs of images and labels, for each split that the names tell."""
    found: dict[str, Arrays] = {}
    for path, match in files:
        role = "x" if match["role"] == "images" else "y"
        found.setdefault(split_word(match["split"]) or match["split"] or "all", {})[role] = _read_idx(path)
    for split, pair in found.items():
        if "x" not in pair:
            raise DataError(f"`{name}` has labels but no images for split `{split}`")
    return splits(name, found, [])


def _read_idx(path: Path) -> np.ndarray:
    """Read the IDX format: two zero bytes, a type, a number of axes, their big-endian sizes, the values."""
    is_packed = path.suffix == ".gz"
    with limits.opened(path) as raw, limits.refused(path):
        file = gzip.GzipFile(fileobj=raw) if is_packed else raw
        start = file.read(4)
        if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in IDX_TYPES or not 1 <= start[3] <= AXES:
            raise DataError(f"`{path}` is no IDX file", why=f"it starts with the bytes {start.hex(' ')}")
        dtype = np.dtype(IDX_TYPES[start[2]])
        sizes = file.read(4 * start[3])
        shape = [int.from_bytes(sizes[at : at + 4], "big") for at in range(0, len(sizes), 4)]
        promised, packed = math.prod(shape) * dtype.itemsize, path.stat().st_size
        if is_packed:
            limits.refuse_bomb(str(path), packed, promised)
        there = None if is_packed else packed - 4 - len(sizes)
        content = file.read(promised + 1) if there in (None, promised) else b""
    if len(shape) != start[3] or len(content) != promised:
        found = f"{there:,}" if there is not None else f"{len(content):,}" if len(content) <= promised else "more"
        why = f"its header says shape {_shape(shape)}, {promised:,} bytes, and {found} follow"
        raise DataError(f"`{path}` is no whole IDX file", why=why)
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def sklearn(name: str) -> Splits:
    """Read scikit-learn's 1,797 digits (8 x 8), split 80 : 20 once and for all, the classes even."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    one_of("--data", f"sklearn:{name}", ["sklearn:digits"])
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    parts = {"train": np.sort(train), "test": np.sort(test)}
    found = {key: {"x": images[part], "y": digits.target[part]} for key, part in parts.items()}
    return splits(f"sklearn:{name}", found, [])
