"""Every command that writes, killed at any moment: the same command again ends in the same bytes, and nothing is left.

So do a disk that is full and one that may not be written: one clear error, and nothing of it stays.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import peftc as package
from tests.forked import Forked, forked
from tests.networks import INPUT, VIT, save_timm

KILLS = 16  # of each command: some 200 in all
DIGITS = ["--data", "sklearn:digits"]
FEW = [*DIGITS, "--num-samples", 64, "--batch-size", 16, "--steps", 6, "--held-out", 0.25]
COMMANDS: dict[str, list[Any]] = {
    "decompose": ["decompose", "vit", "--ratio", 0.6, "-o", "out"],
    "every rank": ["decompose", "vit", "--keep-all-ranks", "-o", "out"],
    "truncate": ["truncate", "ranks", "--ratio", 0.5, "-o", "out"],
    "calibrate": ["calibrate", "vit", *DIGITS, "--calibration-samples", 8, "-o", "out"],
    "distill": ["distill", "small", *FEW, "-o", "out"],
    "finetune": ["finetune", "small", *FEW, "-o", "out"],
    "finetune --delta": ["finetune", "small", *FEW, "--delta", "-o", "out"],
    "prune-layers": ["prune-layers", "vit", "--keep", 2, "--score", "magnitude", "-o", "out"],
    "merge": ["merge", "delta", "-o", "out"],
    "extract-lora": ["extract-lora", "tuned", "vit", "--rank", 2, "-o", "out"],
    "export": ["export", "small", "--format", "safetensors", "--rounds", 5, "-o", "out"],
    "analyze --plan": ["analyze", "vit", "--ratio", 0.5, "--plan", "out.json"],
    "report": ["report", "small", "delta", "-o", "out.html"],
    "evaluate": ["evaluate", "small", *DIGITS, "--num-samples", 32],
}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each thing that a command reads."""
    site = tmp_path_factory.mktemp("models")
    (site / "vit").mkdir()
    save_timm(site / "vit", "vit_tiny_patch16_224", {**VIT, "num_classes": 10}, INPUT)
    few: dict[str, Any] = {"data": "sklearn:digits", "steps": 2, "num_samples": 40, "held_out": 0, "device": "cpu"}
    package.decompose(site / "vit", ratio=0.6, output_dir=site / "small")
    package.decompose(site / "vit", keep_all_ranks=True, output_dir=site / "ranks")
    package.finetune(site / "small", delta=True, output_dir=site / "delta", **few)
    package.finetune(site / "vit", method="full", head="keep", output_dir=site / "tuned", **few)
    return site


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        for each in models.iterdir():
            shutil.copytree(each, tmp_path / name / each.name)
        return tmp_path / name

    return make


def everything(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files but results, which hold times, with the name of the folder taken out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "result.json")
    return {str(path.relative_to(folder)): path.read_bytes().replace(bytes(folder), b"") for path in files}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_killed_command_ends_in_the_same_bytes_when_it_runs_again(
    place: Callable[[str], Path], words: list[Any]
) -> None:
    folder = place("work")
    start = time.monotonic()
    done = forked(*words, "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    took = time.monotonic() - start
    expected = everything(folder)
    random = Random(str(words))
    for number in range(KILLS):
        shutil.rmtree(folder)
        place("work")
        for _ in range(random.choice([1, 1, 2, 3])):
            one = Forked(*words, "-q", cwd=folder)
            time.sleep(random.random() * took)
            one.process.kill()
            one.process.join()
            one.folder.cleanup()
        done = forked(*words, "-q", cwd=folder)
        assert done.returncode == 0, (number, done.stderr)
        found = everything(folder)
        assert found.keys() == expected.keys(), number
        assert not [name for name in found if found[name] != expected[name]], number
        assert not [path for path in folder.rglob("*.partial")], number


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # each write beyond ends as on a full disk
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from peftc.cli.app import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_leaves_nothing(place: Callable[[str], Path], words: list[Any]) -> None:
    folder = place("work")
    before = everything(folder)
    done = forked(*words, "-q", cwd=folder, code=FULL)
    if done.returncode == 0:
        pytest.skip("what it writes is smaller than the limit")
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    kept = "run the same command again to go on" in done.stderr
    assert everything(folder) == before or kept, sorted(everything(folder).keys() - before.keys())
    done = forked(*words, "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not [path for path in folder.rglob("*.partial")]


READ_ONLY = """
import ctypes, sys
if sys.platform == "linux":  # root too is refused what the modes of a folder refuse
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
from peftc.cli.app import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_that_may_not_be_written_is_refused(place: Callable[[str], Path], words: list[Any]) -> None:
    folder = place("work")
    before = everything(folder)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for each in folders:
        each.chmod(0o500)
    try:
        done = forked(*words, cwd=folder, code=READ_ONLY)
    finally:
        for each in folders:
            each.chmod(0o700)
    if words[0] == "evaluate":  # what was measured is printed, though it cannot be kept
        assert done.returncode == 0 and "not kept in `small/result.json`" in done.stderr, done.stderr
    else:
        assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert everything(folder) == before
