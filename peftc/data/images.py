"""Folders and zips of class folders, and the path from an image to what a model reads."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from peftc.data.dataset import SPLIT_WORDS, Dataset, Splits
from peftc.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LAYOUT = "peftc reads `CLASS/image.jpg`, or `test/CLASS/image.jpg` with a folder for each split"


@dataclass(frozen=True)
class Tree:
    """Files under one root, on disk or in a zip, by relative name."""

    name: str
    files: list[str]
    folders: list[str]
    read: Callable[[str], bytes]


def folder_tree(path: Path) -> Tree:
    """List a folder; hidden files are left out."""
    files, folders = [], []
    for here, below, names in os.walk(path, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = Path(here).relative_to(path)
        folders += [(relative / name).as_posix() for name in below]
        files += [(relative / name).as_posix() for name in sorted(names) if not name.startswith(".")]
    return Tree(str(path), files, folders, lambda name: (path / name).read_bytes())


def zip_tree(path: Path) -> Tree:
    """List a zip, which is read in place."""
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"cannot read `{path}`", why=f"it is no whole zip file: {error}") from None
    names = sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    files = [name for name in names if not name.endswith("/")]
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    folders |= {name.rstrip("/") for name in names if name.endswith("/")}
    return Tree(str(path), files, sorted(folders - {"."}), archive.read)


def class_folders(tree: Tree) -> Splits:
    """Return the splits of a tree of class folders; images without any folder are one split without labels.

    Raises:
        DataError: it holds no images, images beside class folders, or an empty class folder.
    """
    images = [name for name in tree.files if name.lower().endswith(ENDINGS)]
    if not images:
        raise DataError(f"`{tree.name}` holds no images", why=f"{len(tree.files)} other files lie in it", hint=LAYOUT)
    if not any("/" in name for name in images) and not tree.folders:
        return {"all": partial(_dataset, tree, "all", images)}
    root = _root(images)
    tops = sorted(
        {name[len(root) :].split("/")[0] for name in [*images, *tree.folders] if name.startswith(root)} - {""}
    )
    words = {word for known in SPLIT_WORDS.values() for word in known}
    splits = [top for top in tops if top.lower() in words and _children(tree, f"{root}{top}/")]
    bases = {split: f"{root}{split}/" for split in splits} or {"all": root}
    classes = sorted({name for base in bases.values() for name in _children(tree, base)})
    left_out = [top for top in tops if splits and top not in splits]
    found: Splits = {}
    for split, base in bases.items():
        found[split] = partial(
            _split, tree, split, base, [name for name in images if name.startswith(base)], classes, left_out
        )
    return found


def _root(images: list[str]) -> str:
    """Return the folders around everything, so that a zip of one folder reads like the folder."""
    root = ""
    while True:
        tops = {name[len(root) :].split("/")[0] for name in images}
        deep = all(name[len(root) :].count("/") >= 2 for name in images)
        if (
            len(tops) != 1
            or not deep
            or next(iter(tops)).lower() in {w for known in SPLIT_WORDS.values() for w in known}
        ):
            return root
        root += tops.pop() + "/"


def _children(tree: Tree, base: str) -> list[str]:
    return [name[len(base) :] for name in tree.folders if name.startswith(base) and "/" not in name[len(base) :]]


def _split(tree: Tree, split: str, base: str, files: list[str], classes: list[str], left_out: list[str]) -> Dataset:
    owners = [name[len(base) :].split("/") for name in files]
    loose = [name for name, parts in zip(files, owners, strict=True) if len(parts) < 2]
    if loose:
        raise DataError(
            f"{len(loose)} images of `{tree.name}` lie outside class folders",
            why=f"the first is `{loose[0]}`",
            hint=LAYOUT,
        )
    empty = sorted(set(_children(tree, base)) - {parts[0] for parts in owners})
    if empty:
        raise DataError(
            f"{len(empty)} class folders of `{tree.name}` hold no image",
            why=f"in split `{split}`: {named(empty)}",
            hint="fill or remove them",
        )
    index = {name: number for number, name in enumerate(classes)}
    found = _dataset(tree, split, files)
    notes = [f"data: left out beside the splits: {named(left_out)}"] if left_out else []
    return replace(found, classes=classes, labels=[index[parts[0]] for parts in owners], notes=notes)


def _dataset(tree: Tree, split: str, files: list[str]) -> Dataset:
    """Return images without labels."""
    return Dataset(
        kind="image",
        name=tree.name,
        split=split,
        rows=range(len(files)),
        read=lambda row: decode(_bytes(tree, files[row]), f"{tree.name}/{files[row]}"),
        content=lambda row: files[row].encode() + b"\0" + _bytes(tree, files[row]),
    )


def named(names: list[str], most: int = 5) -> str:
    """Write up to ``most`` names in backticks, and how many more there are."""
    text = ", ".join(f"`{name}`" for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def _bytes(tree: Tree, name: str) -> bytes:
    try:
        return tree.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise DataError(f"cannot read `{tree.name}/{name}`", why=str(error)) from None


def decode(content: bytes, name: str) -> Image.Image:
    """Return the image in ``content``.

    Raises:
        DataError: it is no image, or a damaged one.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError, zlib.error, Image.DecompressionBombError) as error:
        why = "its bytes are of no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"`{name}` is no whole image", why=why, hint="replace or remove it") from None
    return image


def transform(preprocess: Mapping[str, Any], image_size: int | None = None) -> Callable[[Any, str], Tensor]:
    """Return the function from an image to (channels, height, width), as the model was trained to see it.

    Args:
        preprocess: a model's; without ``input_size`` images keep their own size.
        image_size: side in pixels instead of the model's.
    """
    size = list(preprocess.get("input_size") or []) or None
    channels = size[0] if size else len(preprocess.get("mean") or [0, 0, 0])
    if channels not in MODES:
        raise DataError(
            f"images cannot have the {channels} channels that the model reads", why="peftc knows 1, 3 and 4"
        )
    if image_size is not None:
        size = [channels, image_size, image_size]
    normalise = normalised(preprocess, channels)
    from timm.data import create_transform
    from torchvision.transforms.functional import pil_to_tensor

    keys = [key for key in ("interpolation", "crop_pct", "crop_mode") if preprocess.get(key) is not None]
    settings = {key: preprocess[key] for key in keys}
    crop = create_transform(tuple(size), is_training=False, normalize=False, **settings) if size else pil_to_tensor

    def apply(image: Any, name: str) -> Tensor:
        return normalise(crop(with_mode(image, MODES[channels], name)).float() / 255)

    return apply


def normalised(preprocess: Mapping[str, Any], channels: int) -> Callable[[Tensor], Tensor]:
    """Return the function from pixels in [0, 1] to what the model was trained to see."""
    mean, std = (_per_channel(preprocess.get(key), channels, key) for key in ("mean", "std"))
    return lambda pixels: pixels if mean is None or std is None else (pixels - mean) / std


def reader(
    data: Dataset, preprocess: Mapping[str, Any], image_size: int | None = None
) -> Callable[[Sequence[int]], Tensor]:
    """Return the function from samples to the images of a batch (batch, channels, height, width).

    Args:
        data: images, pairs of an image and a text, or tensors, which are fed as they are.
        preprocess, image_size: as for `transform`.
    """
    to_tensor = transform(preprocess, image_size)

    def read(index: int) -> Tensor:
        value = data[index][0]
        if data.kind == "tensor":
            return value
        return to_tensor(value[0] if data.kind == "image-text" else value, f"{data.name}, sample {index}")

    def stacked(indices: Sequence[int]) -> Tensor:
        with ThreadPoolExecutor() as pool:  # decoding and resizing release the interpreter's lock
            tensors = list(pool.map(read, indices))
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise DataError(
                f"the images of `{data.name}` differ in size",
                why=f"the model names no input size, and they are {shapes[0]} and {shapes[-1]}",
                hint="add `--image-size PIXELS`",
            )
        return torch.stack(tensors)

    return stacked


def _per_channel(values: Any, channels: int, key: str) -> Tensor | None:
    if values is None:
        return None
    if len(values) not in (1, channels):
        raise DataError(
            f"the model's preprocessing gives {len(values)} numbers as `{key}`", why=f"images have {channels} channels"
        )
    return torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None]


def with_mode(image: Any, mode: str, name: str) -> Image.Image:
    """Return an image or an array as an image of one mode."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"`{name}` is a {type(image).__name__}, not an image")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
