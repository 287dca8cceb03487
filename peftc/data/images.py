"""Folders and zips of class folders, and the path from an image to what a model reads."""

import errno
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import default_collate

from peftc.data import limits, remembered
from peftc.data.dataset import SPLITS, Dataset, Splits
from peftc.data.limits import DAMAGED, IMAGE_BYTES, MANY_PIXELS, SAME_FOLDER
from peftc.data.loading import is_alone
from peftc.errors import DataError, named, reason_of, refuse_not_utf8, shown
from peftc.store import pointers

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
# of Pillow's formats those with these endings, and two that pages send under another; EPS would start a program
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
ORIENTATION = 0x0112  # the tag of EXIF
SIXTEEN = ("PNG", "PPM")  # formats whose images Pillow may give as 32 bits, with numbers from 0 to 65,535
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LAYOUT = "peftc reads `CLASS/image.jpg`, or `test/CLASS/image.jpg` with a folder for each split"


@dataclass(frozen=True)
class Tree:
    """Files under one root, on disk or in a zip, by relative name."""

    name: str
    files: list[str]
    folders: list[str]
    read: Callable[[str], bytes]
    archive: Path | None = None  # that holds them all


def folder_tree(path: Path) -> Tree:
    """List a folder; hidden files are left out, and links are followed, but not round in a circle."""
    files, folders = [], []
    seen: Counter[tuple[int, int]] = Counter()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        here, above = waiting.pop()
        with limits.refused(path / here):
            there = (path / here).stat()
            entries = sorted(os.scandir(path / here), key=lambda entry: entry.name)
            inside = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
        at = (there.st_dev, there.st_ino)
        seen[at] += 1
        if at in above or seen[at] > SAME_FOLDER:
            often = f"links lead to it more than {SAME_FOLDER} times"
            why = "it is a link to a folder above it" if at in above else often
            raise DataError(f"`{shown(path)}` has no end: see `{shown(path / here)}`", why=why, hint="remove the link")
        prefix = f"{here}/" if here else ""
        below = [prefix + name for name, is_folder in inside.items() if is_folder]
        folders += below
        files += [prefix + name for name, is_folder in inside.items() if not is_folder]
        waiting += [(name, (*above, at)) for name in reversed(below)]

    def read(name: str) -> bytes:
        with limits.opened(path / name) as file:
            return limits.whole(file, IMAGE_BYTES, f"{path}/{name}")

    return Tree(str(path), files, folders, read)


class _Positioned(io.RawIOBase):
    """A file opened once, whose place is this process's own: one opened before a fork has one place for both."""

    def __init__(self, path: Path) -> None:
        self.file, self.at = path.open("rb", buffering=0), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: os.fstat(self.file.fileno()).st_size}
        if start[whence] + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.at = start[whence] + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        found = os.pread(self.file.fileno(), len(buffer), self.at)
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)

    def close(self) -> None:
        self.file.close()
        super().close()


def zip_tree(path: Path) -> Tree:
    """List a zip, which is read in place."""
    with limits.refused(path, "it is no whole zip file: "):
        archive = zipfile.ZipFile(_Positioned(path))
        names = archive.namelist()
    names = sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    there = {"/".join(part for part in name.split("/") if part): name for name in names}
    files = [name for name, inside in there.items() if name and not inside.endswith("/")]
    folders = {parent.as_posix() for name in there for parent in PurePosixPath(name).parents}
    folders |= {name for name, inside in there.items() if inside.endswith("/")}

    def read(name: str) -> bytes:
        with archive.open(there[name]) as member:
            return limits.whole(member, IMAGE_BYTES, f"{path}/{name}")

    return Tree(str(path), files, sorted(folders - {".", ""}), read, path)


def class_folders(tree: Tree) -> Splits:
    """Return the splits of a tree of class folders; images without any folder are one split without labels."""
    images = [name for name in tree.files if name.lower().endswith(ENDINGS)]
    if not images:
        raise DataError(f"`{tree.name}` holds no images", why=f"{len(tree.files)} other files lie in it", hint=LAYOUT)
    if not any("/" in name for name in images) and not tree.folders:
        return {"all": partial(_dataset, tree, "all", images)}
    root = _root(images)
    inside = [name[len(root) :] for name in (*images, *tree.folders) if name.startswith(root)]
    tops = sorted({name.split("/")[0] for name in inside} - {""})
    splits = [top for top in tops if top.lower() in SPLITS and _children(tree, f"{root}{top}/")]
    bases = {split: f"{root}{split}/" for split in splits} or {"all": root}
    classes = sorted({name for base in bases.values() for name in _children(tree, base)})
    left_out = [top for top in tops if splits and top not in splits]
    for name in (*splits, *classes):
        refuse_not_utf8(f"in `{tree.name}` the name of the folder", name, DataError)
    notes = [f"data: left out beside the splits: {named(left_out)}"] if left_out else []
    return {split: partial(_split, tree, split, base, images, classes, notes) for split, base in bases.items()}


def _root(images: list[str]) -> str:
    """Return the folders around everything, so that a zip of one folder reads like the folder."""
    root = ""
    while True:
        tops = {name[len(root) :].split("/")[0] for name in images}
        deep = all(name[len(root) :].count("/") >= 2 for name in images)
        if len(tops) != 1 or not deep or next(iter(tops)).lower() in SPLITS:
            return root
        root += tops.pop() + "/"


def _children(tree: Tree, base: str) -> list[str]:
    return [name[len(base) :] for name in tree.folders if name.startswith(base) and "/" not in name[len(base) :]]


def _split(tree: Tree, split: str, base: str, images: list[str], classes: list[str], notes: list[str]) -> Dataset:
    files = [name for name in images if name.startswith(base)]
    owners = [name[len(base) :].split("/") for name in files]
    loose = [name for name, parts in zip(files, owners, strict=True) if len(parts) < 2]
    if loose:
        why = f"the first is `{loose[0]}`"
        raise DataError(f"{len(loose)} images of `{tree.name}` lie outside class folders", why=why, hint=LAYOUT)
    empty = sorted(set(_children(tree, base)) - {parts[0] for parts in owners})
    if empty:
        what = f"{len(empty)} class folders of `{tree.name}` hold no image"
        raise DataError(what, why=f"in split `{split}`: {named(empty)}", hint="fill or remove them")
    index = {name: number for number, name in enumerate(classes)}
    labels = [index[parts[0]] for parts in owners]
    return replace(_dataset(tree, split, files), classes=classes, labels=labels, notes=notes)


def _dataset(tree: Tree, split: str, files: list[str]) -> Dataset:
    """Return images without labels."""

    def content(row: int) -> bytes:
        with limits.refused(f"{tree.name}/{files[row]}"):
            return tree.read(files[row])

    def identity() -> remembered.Identity | None:
        root, inside = (tree.archive, [""]) if tree.archive else (Path(tree.name), files)
        found = remembered.identity(root, inside)
        return found.of("\0".join(files)) if found and tree.archive else found

    return Dataset(
        kind="image",
        name=tree.name,
        split=split,
        rows=range(len(files)),
        read=lambda row: decode(content(row), f"{tree.name}/{files[row]}"),
        content=lambda row: files[row].encode("utf-8", "surrogateescape") + b"\0" + content(row),
        is_named=True,
        identity=identity if len(files) >= remembered.MANY else None,
    )


def decode(content: bytes, name: str) -> Image.Image:
    """Return the image in ``content``; a large one is read when `with_mode` asks for its pixels."""
    name = shown(name)
    Image.init()  # which finds what this Pillow can open
    try:
        image = Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"`{name}` has too many pixels", why=str(error), hint="shrink or remove it") from None
    except DAMAGED as error:
        pointers.refuse_content(name, content, DataError)
        raise _no_image(name, error) from None
    limits.refuse_sides(name, image.width, image.height)
    return image if _is_large(image) else _loaded(image, name)


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Return an image with its pixels, turned as its EXIF data says, in 8 bits per channel."""
    try:
        image.load()
    except (Image.DecompressionBombError, *DAMAGED) as error:
        raise _no_image(name, error) from None
    upright = image
    with suppress(SyntaxError, *DAMAGED):  # EXIF data that nobody can read: the pixels are whole
        if image.getexif().get(ORIENTATION, 1) != 1:
            upright = ImageOps.exif_transpose(image)
    if not image.mode.startswith(("I", "F")):
        return upright
    if not upright.mode.startswith("I;16") and not (upright.mode == "I" and image.format in SIXTEEN):
        kind = "floating numbers" if upright.mode == "F" else "whole numbers of 32 bits"
        why = "nothing in it says which of them is white"
        raise DataError(f"`{name}` holds {kind} per pixel", why=why, hint="store it with 8 or 16 bits per channel")
    return Image.fromarray(((np.asarray(upright).astype(np.uint32) + 128) // 257).astype(np.uint8))


def _no_image(name: str, error: BaseException) -> DataError:
    is_unknown = isinstance(error, UnidentifiedImageError)
    why = "its bytes are of no known image format" if is_unknown else reason_of(error)
    return DataError(f"`{name}` is no whole image", why=why, hint="replace or remove it")


def transform(preprocess: Mapping[str, Any], image_size: int | None = None) -> Callable[[Any, str], Tensor]:
    """Return the function from an image to (channels, height, width), as the model was trained to see it.

    Args:
        preprocess: a model's; without ``input_size`` images keep their own size.
        image_size: side in pixels instead of the model's.
    """
    size = list(preprocess.get("input_size") or []) or None
    channels = size[0] if size else len(preprocess.get("mean") or [0, 0, 0])
    if channels not in MODES:
        why = "peftc knows 1, 3 and 4"
        raise DataError(f"images cannot have the {channels} channels that the model reads", why=why)
    if image_size is not None:
        size = [channels, image_size, image_size]
    normalise = normalised(preprocess, channels)
    from timm.data import create_transform
    from torchvision.transforms.functional import pil_to_tensor

    keys = [key for key in ("interpolation", "crop_pct", "crop_mode") if preprocess.get(key) is not None]
    settings = {key: preprocess[key] for key in keys}
    crop = create_transform(tuple(size), is_training=False, normalize=False, **settings) if size else pil_to_tensor

    def apply(image: Any, name: str) -> Tensor:
        return normalise(crop(with_mode(image, MODES[channels], name)))

    return apply


def normalised(preprocess: Mapping[str, Any], channels: int) -> Callable[[Tensor], Tensor]:
    """Return the function from pixels in 0 to 255, in rows or not, to what the model was trained to see."""
    known = []
    for key in ("mean", "std"):
        values = preprocess.get(key)
        if values is None:
            return _in_one
        if len(values) not in (1, channels):
            what = f"the model's preprocessing gives {len(values)} numbers as `{key}`"
            raise DataError(what, why=f"images have {channels} channels")
        known.append(torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None])
    mean, std = known
    return lambda pixels: _in_one(pixels).sub_(mean).div_(std)


def _in_one(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1] as a new tensor; first in rows, which what comes after it is twice as quick on."""
    return pixels.contiguous().float().div_(255)


def reader(
    data: Dataset, preprocess: Mapping[str, Any], image_size: int | None = None
) -> Callable[[Sequence[int]], Tensor]:
    """Return the function from samples to the images of a batch (batch, channels, height, width).

    Tensors are fed as they are; ``preprocess`` and ``image_size`` are as for `transform`.
    """
    to_tensor = transform(preprocess, image_size)
    Image.init()  # it takes a while: once here, and not in each process that is forked to read ahead

    def read(index: int, alone: ThreadPoolExecutor) -> Tensor:
        value = data[index][0]
        if data.kind == "tensor":
            return value
        image, name = value[0] if data.kind == "image-text" else value, f"{data.name}, sample {index}"
        # in one thread, and always the same: what a thread has freed, the allocator keeps for it
        return alone.submit(to_tensor, image, name).result() if _is_large(image) else to_tensor(image, name)

    def stacked(indices: Sequence[int]) -> Tensor:
        with ThreadPoolExecutor(1) as alone:
            tensors = list(fetched(lambda index: read(index, alone), indices))
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            why = f"the model names no input size, and they are {shapes[0]} and {shapes[-1]}"
            raise DataError(f"the images of `{data.name}` differ in size", why=why, hint="add `--image-size PIXELS`")
        return default_collate(tensors)  # type: ignore[no-any-return] # in a process that reads ahead, in shared memory

    return stacked


def fetched(read: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
    """Yield what is read of some samples, in order: by threads, as decoding releases the interpreter's lock.

    A process that reads ahead is one of several, and reads one after the other.
    """
    if is_alone():
        yield from map(read, indices)
        return
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(read, indices))[::-1]
    while found:
        yield found.pop()


def _is_large(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.width * image.height > MANY_PIXELS


def with_mode(image: Any, mode: str, name: str) -> Image.Image:
    """Return an image or an array as an image of one mode."""
    name = shown(name)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"`{name}` is a {type(image).__name__}, not an image")
    image = _loaded(image, name)
    try:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == mode else image.convert(mode)
    except DAMAGED as error:
        raise DataError(f"`{name}` cannot be read as {mode}", why=reason_of(error), hint="convert it") from None
