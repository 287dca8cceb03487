"""A folder of the cache is there whole or not at all, and made once, whoever is killed and however many ask."""

import os
import threading
import time
from pathlib import Path

import pytest

from peftc.store import cache
from tests.forked import Forked

FOREVER = """
import time
from peftc.store import cache
def make(folder):
    (folder / "half").touch()
    time.sleep(600)
cache.folder("kind/it", make)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    return tmp_path / "peftc" / "kind"


def test_it_is_made_once(home: Path) -> None:
    found = cache.folder("kind/it", lambda folder: (folder / "whole").touch())
    assert found == home / "it" and [each.name for each in found.iterdir()] == ["whole"]
    assert cache.folder("kind/it", lambda folder: pytest.fail("it is there")) == found


def test_nothing_is_left_of_what_fails(home: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.folder("kind/it", make)
    assert [each.name for each in home.iterdir()] == ["lock"]


def test_of_two_at_once_one_makes_it(home: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)

    threads = [threading.Thread(target=cache.folder, args=("kind/it", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (home / "it").is_dir()


def test_what_a_killed_process_left_is_made_again(home: Path) -> None:
    other = Forked(code=FOREVER)
    until = time.time() + 60
    while not (home / "it.partial" / "half").exists():
        assert time.time() < until
        time.sleep(0.01)
    other.process.kill()
    other.done()
    assert not (home / "it").exists()
    found = cache.folder("kind/it", lambda folder: (folder / "whole").touch())
    assert [each.name for each in found.iterdir()] == ["whole"]
    assert sorted(each.name for each in home.iterdir()) == ["it", "lock"]
