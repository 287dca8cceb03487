"""Files are compared with their digests once, and again as soon as anything may have changed them."""

import os
import time
from pathlib import Path

import pytest

from peftc.errors import ArtifactError
from peftc.store import manifest, verified


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "QUIET", -1.0)  # files of a test are young
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(b"1234")
    return tmp_path / "a"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []
    real = manifest.file_digest
    monkeypatch.setattr(manifest, "file_digest", lambda path: found.append(path) or real(path))
    return found


def promise(folder: Path) -> dict[str, dict[str, str]]:
    return {"one": {"sha256": manifest.file_digest(folder / "one")}}


def test_a_file_is_read_once_and_again_when_it_was_touched(folder: Path, reads: list[Path]) -> None:
    files = promise(folder)
    for _ in range(3):
        verified.check(folder, files)
    assert len(reads) == 2, "one of the promise, one of the first check"
    os.utime(folder / "one")
    verified.check(folder, files)
    assert len(reads) == 3


def test_a_change_of_the_same_length_and_time_is_noticed(folder: Path) -> None:
    files, stat = promise(folder), (folder / "one").stat()
    verified.check(folder, files)
    time.sleep(0.02)
    (folder / "one").write_bytes(b"1235")
    os.utime(folder / "one", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ArtifactError, match="was changed after it was written") as refusal:
        verified.check(folder, files)
    assert "`one`" in str(refusal.value)


def test_a_whole_check_does_not_trust_the_memory(folder: Path) -> None:
    files = promise(folder)
    verified.check(folder, files)
    memory = verified.memory()
    assert memory.stat().st_mode & 0o777 == 0o600
    memory.write_text(memory.read_text().replace(files["one"]["sha256"], "0" * 64))
    verified.check(folder, {"one": {"sha256": "0" * 64}})  # who may write the memory may also write the files
    with pytest.raises(ArtifactError):
        verified.check(folder, {"one": {"sha256": "0" * 64}}, remembered=False)


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "{", "[" * 5000])
def test_a_damaged_memory_is_no_memory(folder: Path, content: str) -> None:
    verified.memory().parent.mkdir(parents=True)
    verified.memory().write_text(content)
    verified.check(folder, promise(folder))


def test_a_cache_that_cannot_be_written_stops_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "one"))  # a file
    verified.check(folder, promise(folder))


def test_a_file_that_was_just_written_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "QUIET", 60.0)
    verified.check(folder, promise(folder))
    assert not verified.memory().exists()
