"""Folders in the user's cache: what takes long to make, written once and whole."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from peftc.store import documents


def home() -> Path:
    """Return peftc's own folder in the user's cache folder (RuntimeError: there is no home)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path("~/.cache").expanduser()) / "peftc"


def folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, which ``make`` fills where it is not there yet.

    It is there whole or not at all: of several processes one fills it and the others wait, and what a killed one left
    is removed by the next.

    Raises:
        OSError, RuntimeError: the cache cannot be written.
    """
    place = home() / name
    if place.is_dir():
        return place
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial")
    with place.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        if place.is_dir():
            return place
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            make(partial)
            for each in (*partial.iterdir(), partial):
                documents.sync(each)
            partial.rename(place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return place
