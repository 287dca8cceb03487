"""Pointers of Git LFS: the small texts that stand in a checkout where the files themselves were not fetched."""

from contextlib import suppress
from pathlib import Path

from peftc.errors import PeftcError, shown

BEGINNING = b"version https://git-lfs.github.com/spec/v1"


def refuse(path: Path, kind: type[PeftcError]) -> None:
    """Refuse a file that is a pointer of Git LFS; one that cannot be read is left to who reads it."""
    content = b""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(len(BEGINNING))
    refuse_content(str(path), content, kind)


def refuse_content(name: str, content: bytes, kind: type[PeftcError]) -> None:
    """Refuse what was read of a file where it begins as a pointer of Git LFS does."""
    if content.startswith(BEGINNING):
        why = "it says where the file is kept; the file itself was not fetched"
        raise kind(f"`{shown(name)}` is a pointer of Git LFS", why=why, hint="in that repository run `git lfs pull`")
