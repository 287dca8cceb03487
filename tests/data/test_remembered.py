"""Digests are computed once of content that stays as it is, and anew of content that changes."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.data import open_data, remembered
from peftc.store import cache
from tests.data.test_data import fill, picture, zipped

NAMES = [f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(6)]


@pytest.fixture(autouse=True)
def _every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the digests of small folders too, and of files as young as those of a test are."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    monkeypatch.setattr(remembered, "MANY", 1)
    monkeypatch.setattr(remembered, "SETTLED", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "set", NAMES)


def is_read(spec: Path, **how: Any) -> bool:
    """Return whether the samples are read for their digest, which has to be that of a data set without a memory."""
    found, plain = open_data(str(spec), **how), open_data(str(spec), **how)
    content, seen, plain.identity = found.content, list[int](), None
    found.content = lambda row: seen.append(row) or content(row)  # type: ignore[func-returns-value]
    assert (found.digest, found.sketch) == (plain.digest, plain.sketch)
    return bool(seen)


@pytest.mark.parametrize("make", [lambda folder: folder, lambda folder: zipped(folder, folder.parent / "a.zip")])
def test_samples_are_read_once(folder: Path, make: Callable[[Path], Path]) -> None:
    path = make(folder)
    assert is_read(path) and not is_read(path)
    assert is_read(path, num_samples=4) and not is_read(path, num_samples=4) and not is_read(path)


def test_other_labels_are_another_digest(folder: Path) -> None:
    assert is_read(folder)
    (folder / "train" / "dog").rename(folder / "train" / "hound")
    assert is_read(folder)


def other_bytes(path: Path) -> None:
    path.write_bytes(picture(99))


def other_bytes_at_the_same_time(path: Path) -> None:
    about = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def another_file(path: Path) -> None:
    (path.parent / "new.png").write_bytes(picture(99))


@pytest.mark.parametrize("change", [other_bytes, other_bytes_at_the_same_time, another_file, Path.unlink])
def test_one_change_among_many_is_noticed(folder: Path, change: Callable[[Path], None]) -> None:
    assert is_read(folder)
    change(folder / NAMES[7])
    assert is_read(folder) and not is_read(folder)


def test_very_young_files_are_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "SETTLED", 3600.0)
    assert is_read(folder) and is_read(folder)
    os.utime(folder / NAMES[0], (time.time() + 9e6, time.time() + 9e6))  # from a machine whose clock is ahead
    monkeypatch.setattr(remembered, "SETTLED", 0.0)
    assert is_read(folder) and is_read(folder)


def test_what_changes_while_it_is_read_is_not_remembered(folder: Path) -> None:
    found = open_data(str(folder))
    content = found.content

    def changing(row: int) -> bytes:
        (folder / NAMES[row]).write_bytes(picture(100 + row))
        return content(row)

    found.content = changing
    assert found.digest == open_data(str(folder)).digest  # now it is read again
    assert is_read(folder) is False


@pytest.mark.parametrize("damage", ["", "0\n[", "\n"])
def test_a_damaged_memory_only_costs_time(folder: Path, damage: str) -> None:
    assert is_read(folder)
    (kept,) = (cache.home() / remembered.FOLDER).iterdir()
    seal, _, content = kept.read_text().partition("\n")
    kept.write_text(damage or f"{seal}\n{content.replace(content[5], 'x', 1)}")
    assert is_read(folder) and not is_read(folder)


def test_a_cache_that_cannot_be_written_only_costs_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert is_read(folder) and is_read(folder)


def test_the_memory_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 8)
    for number in range(30):
        assert remembered.value(f"{number}", lambda number=number: number) == number  # type: ignore[misc]
        assert remembered.value("0", lambda: -1) == 0  # in use, so it stays
    kept = list((cache.home() / remembered.FOLDER).iterdir())
    assert len(kept) <= 8
    assert remembered.value("29", lambda: -1) == 29 and remembered.value("3", lambda: -1) == -1


def test_several_at_once_agree(folder: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(open_data(str(folder)).digest)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 4 and len(set(found)) == 1
