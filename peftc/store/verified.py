"""Compare files with the digests that a manifest promises, once for each file.

What was compared is remembered in the user's cache folder by device, inode, size and times: a file that nobody wrote to
since is not read again. `peftc show --verify` does not trust that memory.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftc.errors import ArtifactError
from peftc.store import cache, documents, manifest

MOST = 10_000  # files that are remembered, the newest
QUIET = 2.0  # seconds since a file was written: what changes within one tick of the clock could not be told apart


def check(folder: Path, files: Mapping[str, Mapping[str, Any]], *, remembered: bool = True) -> None:
    """Refuse a folder of which a file holds other bytes than its manifest promises.

    Args:
        folder: of an artifact.
        files: name -> ``{"sha256"}``, as its manifest says.
        remembered: believe of a file that nobody wrote to what was found before.

    Raises:
        ArtifactError: naming each file that differs or is missing.
    """
    if changed := differing({folder / name: entry["sha256"] for name, entry in files.items()}, remembered=remembered):
        names = ", ".join(f"`{path.relative_to(folder)}`" for path in changed)
        why = f"its manifest promises other bytes in {names}"
        raise ArtifactError(f"`{folder}` was changed after it was written", why=why, hint=again(folder))


def again(folder: Path) -> str:
    """Return what to do about an artifact that is not as it was written."""
    ways = "with `peftc run`, or as `peftc show --commands` prints it; or fetch it again"
    return f"delete `{folder}` and make it again, {ways}"


def differing(files: Mapping[Path, str], *, remembered: bool = True) -> list[Path]:
    """Return the files that are missing or have another sha256 than the one given."""
    known = _read() if remembered else {}
    fresh: dict[str, str] = {}
    changed = []
    for path, promised in sorted(files.items()):
        found = _identity(path)
        if found is None:
            changed.append(path)
        elif known.get(found) != promised:
            if manifest.file_digest(path) != promised:
                changed.append(path)
            elif time.time() - path.stat().st_ctime > QUIET and _identity(path) == found:
                fresh[found] = promised
    with suppress(OSError, RuntimeError):  # where it cannot be written, files are compared again the next time
        if fresh:
            memory().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            newest = list({**_read(), **fresh}.items())[-MOST:]
            documents.write_whole(memory(), json.dumps(dict(newest)), mode=0o600)
    return changed


def _identity(path: Path) -> str | None:
    """Return what changes when a file is written to or replaced; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def memory() -> Path:
    """Return the file in which it is kept what was compared: ``peftc/verified.json`` in the user's cache folder."""
    return cache.home() / "verified.json"


def _read() -> dict[str, str]:
    try:
        path = memory()
        if path.stat().st_uid != os.getuid():
            return {}  # somebody else's word
        value: Any = documents.read_json(path)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    return value if documents.misfit(value, {str: str}) is None else {}
