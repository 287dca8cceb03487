"""What is read of a file of data, and how much of it: files come from other people, and any of them may be damaged.

No limit is one that honest data meets; each refusal names the one that was passed. A limit is on what a file makes of
itself in memory, never on what it openly is: an array of ten gigabytes that lies there as such is read.
"""

import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from peftc.errors import DataError, reason_of, shown
from peftc.report import size

MIB = 1 << 20
IMAGE_BYTES = 256 * MIB  # of one image file: a camera's raw pixels of 80 megapixels, and no one learns from those
IMAGE_PIXELS = 178_956_970  # Pillow's own limit; cameras end at 150 million
MANY_PIXELS = 1 << 24  # beyond it images are decoded one after another: four bytes a pixel, for every thread at work
SIDES = 500  # times a side may have the other: the shorter one is brought to the model's size, and both grow
UNPACKED = 256 * MIB  # that any packed file may unpack to
EXPANSION = 100  # times its size, beyond that: real samples shrink tenfold, twentyfold at most, zeros a thousandfold
COLUMNS = 10_000  # of a table
AXES = 32  # of an array: numpy's limit before 2.0
HEADER = 10_000  # characters of the header of a .npy array: numpy's own limit
SAME_FOLDER = 16  # ways to one folder, through links: links to links double at each step
NESTING = 100  # JSON in JSON, in a row of a table: Python ends at about 1,000, and pyarrow crashes when it goes on

LONGEST = 300  # characters of what a library says: some repeat the file

# what zipfile, Pillow, numpy and pyarrow raise when they read a damaged file
DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    *(EOFError, SyntaxError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
)


@contextmanager
def refused(name: str | Path, why: str = "", *more: type[Exception]) -> Iterator[None]:
    """Turn what a library raises about a damaged file, ``more`` beside the usual, into a refusal that says why."""
    try:
        yield
    except MemoryError:  # says nothing of the file
        raise
    except DAMAGED + more as error:
        raise DataError(f"cannot read `{shown(name)}`", why=f"{why}{reason_of(error)[:LONGEST]}") from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file, and nothing else: reading a pipe or a device would wait, or never end."""
    with refused(path):
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError(f"cannot read `{shown(path)}`", why="it is no file, but a folder, a pipe or a device")
        yield file


def whole(file: IO[bytes], most: int, name: str) -> bytes:
    """Return what is in a file of at most ``most`` bytes."""
    content = file.read(most + 1)
    if len(content) > most:
        what, why = f"`{shown(name)}` is too large for an image", f"it has more than {size(most)}"
        raise DataError(what, why=why, hint="shrink it, or remove it")
    return content


def refuse_bomb(name: str, packed: int, unpacked: int) -> None:
    """Refuse a packed file that claims, or is about, to unpack to more bytes than data would."""
    most = max(UNPACKED, EXPANSION * packed)
    if unpacked > most:
        why = f"it has {size(packed)}, and peftc unpacks at most {EXPANSION} times that, or {size(UNPACKED)}"
        hint = "store it unpacked, if it is sound"
        raise DataError(f"`{shown(name)}` would unpack to {size(unpacked)}", why=why, hint=hint)


def refuse_columns(path: Path, number: int) -> None:
    """Refuse a table of more columns than data have."""
    if number > COLUMNS:
        raise DataError(f"cannot read `{path}`", why=f"it has more than {COLUMNS:,} columns")


def refuse_sides(name: str, width: int, height: int) -> None:
    """Refuse an image that is too large, or that would become so when its shorter side is brought to a model's size."""
    short, long = sorted((width, height))
    if short * long > IMAGE_PIXELS or long > SIDES * short:
        why = f"peftc reads images of at most {IMAGE_PIXELS:,} pixels, with one side at most {SIDES} times the other"
        raise DataError(f"`{shown(name)}` has {width:,} x {height:,} pixels", why=why, hint="shrink or remove it")
