"""What is read ahead is what would be read anyway, and the processes that read it are gone when nobody needs them."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from peftc.data import loading, open_data
from peftc.data.images import reader
from peftc.data.loading import ahead
from peftc.errors import DataError, LostProcessError, UsageError
from peftc.tasks.task import Batch
from tests.conftest import REPOSITORY

PREPROCESS = {"input_size": [3, 24, 24], "mean": [0.5] * 3, "std": [0.5] * 3}
SLOW = 0.05


def noisy(folder: Path, number: int = 12) -> Path:
    random = np.random.default_rng(0)
    for at in range(number):
        path = folder / f"{at % 2}" / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 30 + at, 3), dtype=np.uint8)).save(path)
    return folder


def number(key: int) -> tuple[torch.Tensor, int]:
    return torch.full((3,), key), os.getpid()


def children() -> list[int]:
    return [each.pid for each in multiprocessing.active_children() if each.pid]


@pytest.mark.parametrize("workers", [None, 0, 1, 3])
def test_all_that_is_asked_comes_in_order_from_as_many_processes_as_were_asked_for(workers: int | None) -> None:
    found = list(ahead(number, range(10), workers))
    assert [int(tensor[0]) for tensor, _ in found] == list(range(10))
    readers = {reader for _, reader in found}
    assert len(readers) == (workers or 1) and (os.getpid() in readers) == (not workers)
    assert list(ahead(number, [], workers)) == [] and len(list(ahead(number, [5], workers))) == 1
    assert not children()


def test_processes_start_by_themselves_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(key: int) -> tuple[torch.Tensor, int]:
        time.sleep(SLOW)
        return number(key)

    def readers(read: Callable[[int], Any], asked: int) -> set[int]:
        arriving = ahead(read, range(asked))
        found = {next(arriving)[1] for _ in range(4)}
        arriving.close()
        return found

    monkeypatch.setattr(loading, "usual", lambda: 2)
    many = int(2 * loading.START / SLOW)
    assert len(readers(slowly, many)) > 1
    here = {os.getpid()}
    assert readers(number, 1 << 20) == here  # quicker than it is handed over
    assert readers(slowly, 5) == here  # done before they had started
    with monkeypatch.context() as patch:
        patch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        assert readers(slowly, many) == here  # a batch has no place in shared memory


def test_a_process_has_its_share_of_the_cores_less_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(loading, "CONTROL", Path("nowhere"))
    found = []
    for local, world in ((None, None), ("1", "1"), ("4", "4"), ("4", "8"), (None, "8"), ("16", "16"), ("32", "32")):
        for name, value in (("LOCAL_WORLD_SIZE", local), ("WORLD_SIZE", world)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        found.append(loading.usual())
    assert found == [15, 15, 3, 3, 1, 0, 0]


def test_what_a_control_group_pays_for_is_no_more_than_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(loading, "CONTROL", tmp_path)
    for text, workers in (("max 100000\n", 15), ("400000 100000\n", 3), ("150000 100000\n", 0), ("?", 15)):
        (tmp_path / "cpu.max").write_text(text)
        assert loading.usual() == workers, text


@pytest.mark.parametrize("workers", [0, 3])
def test_a_refusal_is_the_same_from_every_process(workers: int) -> None:
    def refusing(key: int) -> int:
        if key == 7:
            raise DataError("sample 7 is damaged", why="a bit fell over", hint="pick it up")
        return key

    seen = []
    with pytest.raises(DataError) as refusal:
        seen.extend(ahead(refusing, range(20), workers))  # a list grows as it is extended
    assert str(refusal.value) == "sample 7 is damaged\n  cause: a bit fell over\n  hint: pick it up"
    assert not children()


def test_a_mistake_of_ours_keeps_its_kind_and_its_place() -> None:
    def mistaken(key: int) -> int:
        return [0, 1][key]

    with pytest.raises(IndexError, match="in mistaken"):
        list(ahead(mistaken, range(4), 2))
    assert not children()


def test_a_killed_process_is_one_error_that_says_what_to_do() -> None:
    def killed(key: int) -> int:
        if key == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return key

    with pytest.raises(LostProcessError, match="was killed") as refusal:
        list(ahead(killed, range(20), 2))
    assert "--workers 0" in str(refusal.value)
    assert not children()


def test_whoever_stops_early_leaves_no_process_behind() -> None:
    arriving = ahead(number, range(1000), 2)
    next(arriving)
    assert len(children()) == 2
    arriving.close()
    assert not children()


def test_nothing_random_of_the_process_is_drawn_or_changed() -> None:
    before = torch.get_rng_state(), random.getstate(), signal.getsignal(signal.SIGCHLD)
    list(ahead(number, range(8), 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), signal.getsignal(signal.SIGCHLD)) == before[1:]


def test_a_signal_to_a_group_is_for_the_one_that_reads_from_them() -> None:
    def group(key: int) -> int:
        return os.getpgid(0)

    assert os.getpgid(0) not in set(ahead(group, range(6), 2))


def test_in_a_process_that_reads_ahead_no_library_starts_threads() -> None:
    def threads(key: int) -> tuple[int, int, str]:
        torch.randn(256, 256) @ torch.randn(256, 256)
        return torch.get_num_threads(), threading.active_count(), os.environ["TOKENIZERS_PARALLELISM"]

    first, *_ = ahead(threads, range(4), 2)
    assert first[0] == 1 and first[1] <= 2 and first[2] == "false"


def test_processes_that_cannot_be_are_refused_and_by_default_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(UsageError, match="`--workers` is 2") as refusal:
            next(ahead(number, range(4), 2))
        assert "Linux" in str(refusal.value)
        assert len(list(ahead(number, range(4)))) == len(list(ahead(number, range(4), 0))) == 4
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/" + "x" * 90)
        with pytest.raises(UsageError, match="`--workers` is 2") as refusal:
            next(ahead(number, range(4), 2))
        assert "too long a name" in str(refusal.value)


def test_a_process_that_cannot_be_started_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(Exception, match="no process can be started") as refusal:
        next(ahead(number, range(4), 2))
    assert "temporarily unavailable" in str(refusal.value) and "--workers 0" in str(refusal.value)


KILLED = """
import os, sys, time
from peftc.data.loading import ahead
def read(key):
    time.sleep(0.01)
    return os.getpid()
arriving = ahead(read, range(10_000), 3)
print(*{next(arriving) for _ in range(30)}, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes read ahead on Linux")
def test_no_process_outlives_a_killed_parent() -> None:
    """Sockets to the other processes of a launch stay open in what was forked, so that those would go on waiting."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        readers = [int(word) for word in parent.stdout.readline().split()]
        assert len(readers) == 3 and all(Path(f"/proc/{each}").exists() for each in readers)
        parent.kill()
    deadline = time.monotonic() + 20
    while left := [each for each in readers if _runs(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet"])
def test_images_are_the_same_bytes_for_any_number_of_processes(kind: str, tmp_path: Path) -> None:
    """The file of a zip is open before the processes are: each has a place of its own in it."""
    data = noisy(tmp_path / "images", 40)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for path in sorted(data.rglob("*.png")):
                archive.write(path, path.relative_to(data))
        data = tmp_path / "images.zip"
    elif kind == "parquet":
        from pyarrow import parquet, table

        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(data.rglob("*.png"))]
        data = tmp_path / "images.parquet"
        parquet.write_table(table({"image": rows, "label": [at % 2 for at in range(40)]}), data, row_group_size=7)
    read = reader(open_data(str(data)), PREPROCESS)
    runs = [list(range(at, at + 2)) for at in range(0, 40, 2)]
    plain = [read(run) for run in runs]
    for workers in (1, 3):
        for one, other in zip(plain, ahead(read, runs, workers), strict=True):
            assert torch.equal(one, other)


def test_a_damaged_image_is_refused_alike(tmp_path: Path) -> None:
    data = noisy(tmp_path / "images")
    victim = data / "0" / "4.png"
    victim.write_bytes(victim.read_bytes()[:200])
    read, said = reader(open_data(str(data)), PREPROCESS), []
    for workers in (0, 3):
        with pytest.raises(DataError, match="is no whole image") as refusal:
            list(ahead(read, [[at] for at in range(12)], workers))
        said.append(str(refusal.value))
    assert said[0] == said[1] and "4.png" in said[0]


def test_a_batch_is_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    one = torch.zeros(2)
    found = Batch({"a": one, "b": one}, one, None).pin_memory()
    assert isinstance(found.inputs, dict) and found.others is None
    assert all(torch.equal(each, one + 1) for each in (*found.inputs.values(), found.targets))
    assert torch.equal(Batch(one, one, {"c": one}).pin_memory().others["c"], one + 1)  # type: ignore[index]


def test_of_a_part_of_a_large_tensor_that_part_alone_is_handed_over() -> None:
    whole = torch.arange(1_000_000)

    def read(key: int) -> dict[str, Any]:
        return {"window": whole[key : key + 4], "more": [Batch(whole[:2], whole[None, key])]}

    for key, found in enumerate(ahead(read, range(6), 2)):
        assert found["window"].tolist() == list(range(key, key + 4)) and int(found["more"][0].targets) == key
        assert found["window"].untyped_storage().nbytes() < 1000


def test_too_little_shared_memory_is_refused_in_a_line(tmp_path: Path) -> None:
    """Containers have 64 MB of it unless they were started otherwise."""
    code = tmp_path / "small.py"
    code.write_text(
        "import torch\nfrom peftc.data.loading import ahead\nfrom peftc.errors import PeftcError\n"
        "def read(key):\n    return torch.ones(4_000_000)\n"
        "try:\n    print(sum(1 for _ in ahead(read, range(4), 1)))\n"
        "except PeftcError as error:\n    print(error)\n"
    )
    mount = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} {code}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, env=environment)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert "--workers 0" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
