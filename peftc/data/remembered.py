"""What is computed once of files and remembered in the user's cache: digests, and other short values.

Whether files are still the same is told by their names, sizes, times and inodes, not by reading them. A value is kept
with its own digest, so that a damaged one is computed anew; a cache that cannot be written costs time and no more.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from peftc.errors import DataError
from peftc.store import cache, documents
from peftc.version import __version__

FOLDER = "remembered"  # in peftc's part of the user's cache
MOST = 4096  # values kept; those that nobody asked for longest go first
SETTLED = 2.0  # seconds: a younger file may change again within one tick of the clock that dates it
LARGE = 1 << 20  # bytes of a file from which on its rows and tokens are kept on disk instead of in memory
MANY = 1000  # files whose digest is worth remembering

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What tells whether files are still the same."""

    key: str
    is_settled: bool  # whether that can be relied on: none of them is very young

    def of(self, *more: object) -> "Identity":
        """Return the identity of what was made of the same files in one of several ways."""
        return Identity(key_of(self.key, *more), self.is_settled)


def key_of(*parts: object) -> str:
    """Return one name for some texts, numbers and lists of these."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def identity(root: Path, names: Iterable[str] = ("",)) -> Identity | None:
    """Return that of files below a folder, or of one file; None where one of them cannot be looked at.

    The time of the last change to what the system notes of a file counts as well: a copy may set the other one back.
    """
    found, youngest, now = hashlib.sha256(), 0, time.time_ns()
    try:
        base = os.fspath(root.resolve())
        found.update(os.fsencode(base))
        for name in names:
            about = os.stat(f"{base}/{name}" if name else base)  # noqa: PTH116  a path of each would cost as much again
            what = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev)
            found.update(b"%s\0%d %d %d %d %d\0" % (os.fsencode(name), *what))
            youngest = max(youngest, about.st_mtime_ns, about.st_ctime_ns)
    except (OSError, ValueError, RuntimeError):
        return None
    return Identity(found.hexdigest(), now - youngest > SETTLED * 1e9)


def refuse_change(name: str, before: Identity | None, now: Callable[[], Identity | None]) -> None:
    """Refuse files that were written to since they were opened (DataError): nothing may be kept of them."""
    found = now()
    if found is None or before is None or found.key != before.key:
        raise DataError(f"`{name}` changed while it was read", hint="run again when nothing writes to it")


def digest(
    before: Identity | None, now: Callable[[], Identity | None], parts: Iterable[object], compute: Callable[[], T]
) -> T:
    """Return what ``compute`` finds in files, or what it found when they were last looked at as they are.

    Args:
        before: the identity of the files before anything was read of them.
        now: gives it anew.
        parts: what else the value depends on.
        compute: gives the value.
    """
    if before is None or not before.is_settled:
        return compute()

    def is_same(_: T) -> bool:
        found = now()
        return found is not None and found.key == before.key

    return value(key_of(before.key, *parts), compute, is_same)


def value(key: str, compute: Callable[[], T], is_kept: Callable[[T], bool] = lambda value: True) -> T:
    """Return what was remembered under a key, else what ``compute`` gives: a value that JSON gives back as it is."""
    try:
        path = cache.home() / FOLDER / key_of(__version__, key)
    except RuntimeError:  # no home
        return compute()
    with suppress(OSError, ValueError):
        seal, _, content = path.read_text("utf-8").partition("\n")
        if hashlib.sha256(content.encode()).hexdigest() == seal:
            found: T = json.loads(content)
            with suppress(OSError):
                os.utime(path)
            return found
    made = compute()
    if is_kept(made):
        content = json.dumps(made)
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            documents.write_whole(path, f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}", mode=0o600)
            _forget(path.parent)
    return made


def _forget(folder: Path) -> None:
    """Remove the values that nobody asked for longest, once there are too many."""
    names = os.listdir(folder)  # noqa: PTH208  names are enough
    if len(names) <= MOST:
        return
    ages = []
    for name in names:
        with suppress(OSError):  # another process is faster
            ages.append(((folder / name).stat().st_mtime_ns, name))
    for _, name in sorted(ages)[: len(names) - MOST * 3 // 4]:
        (folder / name).unlink(missing_ok=True)
