"""A decompose that is killed at any moment leaves no half-written folder, and ends in the same bytes when run again."""

import fcntl
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import OutputError
from peftc.steps.decompose import decompose
from tests.conftest import promised
from tests.forked import Forked

# One process imports everything and computes nothing; it forks a child per run, so a run costs no second start.
DRIVER = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import timm, torch, transformers
from peftc.measure import costs as measure
from peftc.errors import PeftcError
from peftc.models import load as models
from peftc.steps.decompose import decompose

model, out = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)
measure.work(models.load(model))  # imports what each run would import, on one thread, so that a fork is safe

def start():
    child = os.fork()
    if child == 0:
        code = 0
        try:
            decompose(model, output_dir=out, ratio=0.5)
        except PeftcError as error:
            code = 1
            (out.parent / "refusal.txt").write_text(str(error))
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 70
        os._exit(code)
    return child

def whole():
    files = json.loads((out / "peftc.json").read_text())["files"]
    return all(hashlib.sha256((out / n).read_bytes()).hexdigest() == e["sha256"] for n, e in files.items())

def parts():
    try:
        names = os.listdir(out.with_name(out.name + ".partial") / "work")
    except FileNotFoundError:
        return 0
    return sum(name.endswith(".safetensors") for name in names)

def wait(child, seconds, enough=1000):
    # returns the exit code, None where it was killed: after seconds, or with enough parts; OUT is watched
    end = time.monotonic() + seconds
    while time.monotonic() < end and parts() < enough:
        if out.exists():
            seen.append(whole())
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

def rename_away(name):
    out.rename(out.with_name(name))

seen, kills, resumed = [], 0, 0
began = time.monotonic()
codes = [wait(start(), 60)]
whole_run = time.monotonic() - began
rename_away("uninterrupted")
moments = random.Random(0)
for number in range(10):
    wait(start(), whole_run * moments.uniform(0.02, 0.95), enough=1 + 2 * number if number % 2 else 1000)
    if not out.exists():
        kills += 1
        resumed += parts() > 0
        if number % 3 == 2:  # killed again on the way
            wait(start(), whole_run, enough=parts() + 3)
    codes.append(wait(start(), 60))
    rename_away(f"again-{number}")
first = start()
while not (out.with_name(out.name + ".partial") / "job.json").exists() and not out.exists():
    time.sleep(0.001)
os.kill(first, signal.SIGSTOP)
second = wait(start(), 60)
os.kill(first, signal.SIGCONT)
codes.append(wait(first, 60))
told = {"codes": codes, "whole": all(seen), "kills": kills, "resumed": resumed, "second": second}
print(json.dumps(told))
"""


def test_ten_kills_and_reruns_give_the_bytes_of_an_uninterrupted_run(tiny_vit: Path, tmp_path: Path) -> None:
    done = Forked(tiny_vit, tmp_path / "out", code=DRIVER).done(300)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(told["codes"]) == {0}, done.stderr
    assert told["kills"] >= 5 and told["resumed"] >= 3 and told["whole"]
    expected = promised(tmp_path / "uninterrupted")
    for number in range(10):
        assert promised(tmp_path / f"again-{number}") == expected, number
    assert told["second"] == 1
    assert "another run is writing" in (tmp_path / "refusal.txt").read_text()
    assert promised(tmp_path / "out") == expected
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.replaced"))


def test_a_second_run_on_one_folder_is_refused_and_disturbs_nothing(tiny_vit: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing"):
            decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
        assert partial.is_dir()
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_of_another_request_is_not_mixed_in(tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    from peftc.models import write

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_artifact", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    assert (tmp_path / "out.partial" / "work").is_dir() and not (tmp_path / "out").exists()
    with pytest.raises(Exception, match="unfinished work of another request"):
        decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.6)
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.6, overwrite=True)
    decompose(tiny_vit, output_dir=tmp_path / "clean", ratio=0.6)
    assert promised(tmp_path / "out") == promised(tmp_path / "clean")


def test_an_overwrite_killed_between_its_renames_loses_nothing(tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    before, rename = promised(tmp_path / "out"), Path.rename

    def killed(source: Path, to: Any) -> None:
        if source.name == "artifact":
            raise KeyboardInterrupt
        rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.6, overwrite=True)
    with pytest.raises(Exception, match="another request"):
        decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.7)
    assert promised(tmp_path / "out") == before


# -- disks that do not do their part ----------------------------------------------------------------------------------


def test_a_path_below_a_file_is_refused(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = peftc("decompose", tiny_vit, "--ratio", 0.5, "-o", tmp_path / "file" / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-3].startswith("error: cannot write") and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("folder", ["/dev/null/out", "/proc/out", "x" * 300, ".", "/", ""])
def test_a_place_that_is_no_place_is_one_clear_error(
    peftc, tiny_vit: Path, tmp_path: Path, monkeypatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    result = peftc("decompose", tiny_vit, "--ratio", 0.5, "-o", folder)
    assert result.exit_code in (1, 2), result.stderr
    assert "error: " in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("limit", [100, 10_000, 60_000])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(peftc, tiny_vit: Path, tmp_path: Path, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        result = peftc("decompose", tiny_vit, "--ratio", 0.5, "-o", tmp_path / "deep" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.exit_code, result.stdout) == (1, ""), result.stderr
    assert "error: cannot write" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("deep/*"))


def test_a_disk_that_is_too_small_is_refused_before_the_work(tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="1,000 bytes free"):
        decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    assert not list(tmp_path.iterdir())
