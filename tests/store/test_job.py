"""One output folder belongs to one request at a time, appears whole or not at all, and nothing of others is deleted."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import ArtifactError, DataError, OutputError, PeftcError, PlanError, TakenError, UsageError
from peftc.store import artifact, documents
from peftc.store.artifact import Piece, write_weights
from peftc.store.job import Job, execution
from peftc.store.manifest import Manifest, read

ONE, OTHER = "1" * 64, "2" * 64
BASE = {"library": "python", "architecture": "nets:make"}


def fill(job: Job) -> None:
    files = write_weights(job.folder, {"x": Piece("F32", (1,), lambda: [b"\0" * 4])}, job.id, 1 << 30)
    job.finish(Manifest(id=job.id, base=BASE, steps=[], files=files, parameters=1), {"seconds": 1})


def build(output: Path, identity: str = ONE, **options: Any) -> Job:
    with execution(output, identity, **options) as job:
        if not job.done:
            fill(job)
    return job


def interrupt(output: Path, identity: str = ONE, **options: Any) -> None:
    """Leave what a killed run leaves: one finished part, and no output."""
    with pytest.raises(KeyboardInterrupt), execution(output, identity, **options) as job:
        (job.work / "part").write_text("done")
        raise KeyboardInterrupt


def holds(output: Path) -> str:
    return read(output).id


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_finished_folder_stands_alone(output: Path) -> None:
    job = build(output)
    assert not job.done
    assert not job.resumed
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert {path.name for path in output.iterdir()} == {"model.safetensors", "peftc.json", "result.json"}


def test_the_same_request_again_is_done_already(output: Path) -> None:
    build(output)
    before = (output / "peftc.json").stat().st_mtime_ns
    job = build(output)
    assert job.done
    assert job.result() == {"id": job.id, "seconds": 1}
    assert (output / "peftc.json").stat().st_mtime_ns == before
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_nothing_appears_before_the_work_is_done(output: Path) -> None:
    with execution(output, ONE) as job:
        assert not output.exists()
        fill(job)
        assert output.exists()


def test_missing_parents_are_made(tmp_path: Path) -> None:
    build(tmp_path / "runs" / "1" / "out")
    assert holds(tmp_path / "runs" / "1" / "out") == ONE


def test_an_interrupted_request_resumes_with_its_parts(output: Path) -> None:
    interrupt(output)
    assert not output.exists()
    with execution(output, ONE) as job:
        assert job.resumed
        assert (job.work / "part").read_text() == "done"
        fill(job)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_unfinished_files_are_not_taken_over(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt), execution(output, ONE) as job:
        (job.folder / "torn").touch()
        raise KeyboardInterrupt
    with execution(output, ONE) as job:
        assert list(job.folder.iterdir()) == []


def test_unfinished_work_of_another_request_is_refused_and_kept(output: Path) -> None:
    interrupt(output)
    with pytest.raises(ArtifactError, match="holds unfinished work of another request") as refusal:
        build(output, OTHER)
    assert refusal.value.request == OTHER
    assert "`--overwrite`" in str(refusal.value)
    assert build(output).resumed


def test_overwrite_drops_unfinished_work_of_another_request(output: Path) -> None:
    interrupt(output)
    with execution(output, OTHER, overwrite=True) as job:
        assert not job.resumed
        assert not (job.work / "part").exists()
        fill(job)
    assert holds(output) == OTHER


def test_the_artifact_of_another_request_is_refused_and_kept(output: Path) -> None:
    build(output)
    with pytest.raises(ArtifactError, match="holds the artifact of another request") as refusal:
        build(output, OTHER)
    assert refusal.value.request == OTHER
    assert refusal.match("made from another base, or by another chain of steps")
    assert holds(output) == ONE
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_refusal_says_in_which_options_the_requests_differ(output: Path) -> None:
    build(output)
    asked = {"command": "decompose", "budget": {"ratio": "3/5"}}
    with pytest.raises(ArtifactError) as refusal, execution(output, OTHER, asked):
        pass
    assert "budget was " in str(refusal.value) and "now it is ratio 3/5" in str(refusal.value)


def test_overwrite_replaces_the_artifact_only_when_the_new_one_is_whole(output: Path) -> None:
    build(output)
    with execution(output, OTHER, overwrite=True) as job:
        assert holds(output) == ONE
        fill(job)
        assert holds(output) == OTHER
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_damaged_artifact_is_refused_and_replaced_by_overwrite(output: Path) -> None:
    build(output)
    (output / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="has 0 bytes") as refusal:
        build(output)
    assert f"delete this folder (`rm -r {output}`) and run the same command again" in str(refusal.value)
    assert not build(output, overwrite=True).done
    assert build(output).done


def test_an_empty_folder_may_be_filled(output: Path) -> None:
    output.mkdir()
    build(output)
    assert holds(output) == ONE


def foreign_folder(output: Path) -> Path:
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    return output / "thesis.txt"


def foreign_file(output: Path) -> Path:
    output.write_text("mine")
    return output


def link_to_a_foreign_folder(output: Path) -> Path:
    kept = foreign_folder(output.with_name("elsewhere"))
    output.symlink_to(kept.parent)
    return kept


def foreign_partial(output: Path) -> Path:
    return foreign_folder(output.with_name("out.partial"))


def foreign_partial_with_our_names(output: Path) -> Path:
    kept = output.with_name("out.partial") / "work" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    return kept


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "make",
    [foreign_folder, foreign_file, link_to_a_foreign_folder, foreign_partial, foreign_partial_with_our_names],
)
def test_what_peftc_did_not_make_is_never_deleted(output: Path, make: Callable[[Path], Path], overwrite: bool) -> None:
    kept = make(output)
    with pytest.raises(ArtifactError, match="is in the way"):
        build(output, overwrite=overwrite)
    assert kept.read_text() == "mine"
    assert not (kept.parent / "lock").exists()


def test_neighbours_with_similar_names_are_left_alone(output: Path) -> None:
    names = [f"out.{end}" for end in ("replaced", "tmp", "old", "bak")]
    for name in names:
        foreign_folder(output.with_name(name))
    build(output)
    build(output, OTHER, overwrite=True)
    assert sorted(path.name for path in output.parent.iterdir()) == sorted([*names, "out"])
    assert all((output.with_name(name) / "thesis.txt").read_text() == "mine" for name in names)


@pytest.mark.parametrize("path", [".", "..", "/", "a/.."])
def test_a_path_without_a_name_of_its_own_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="names no folder of its own"), execution(Path(path), ONE):
        pass


@pytest.mark.parametrize("failure", [PlanError("no"), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "odd")])
def test_a_failure_leaves_nothing(output: Path, failure: Exception) -> None:
    with pytest.raises((PlanError, OSError, OutputError)), execution(output, ONE) as job:
        (job.work / "part").touch()
        raise failure
    assert list(output.parent.iterdir()) == []


def test_a_failure_of_a_resumed_run_keeps_the_parts(output: Path) -> None:
    interrupt(output)
    with pytest.raises(OutputError), execution(output, ONE):
        raise OSError(errno.ENOSPC, "full")
    with execution(output, ONE) as job:
        assert (job.work / "part").read_text() == "done"


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "the folder may not be written"),
        (errno.EROFS, "the disk is read-only"),
        (errno.ENAMETOOLONG, "the name is too long"),
    ],
)
def test_what_the_operating_system_says_becomes_a_refusal(
    output: Path, monkeypatch: pytest.MonkeyPatch, number: int, cause: str
) -> None:
    def refuse(path: Path, value: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    with pytest.raises(OutputError, match="cannot write") as refusal, execution(output, ONE) as job:
        monkeypatch.setattr(artifact, "write_json", refuse)
        fill(job)
    assert refusal.match(cause)
    assert list(output.parent.iterdir()) == []


def test_a_file_in_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a part of the path is a file"):
        build(tmp_path / "file" / "out")


def test_too_small_a_disk_is_refused_before_anything_is_written(output: Path) -> None:
    with pytest.raises(OutputError, match="bytes free") as refusal, execution(output, ONE) as job:
        job.require(1)
        job.require(1 << 62)
    assert refusal.match("4,611,686,018,427,387,904")
    assert list(output.parent.iterdir()) == []


RUN = """
import sys
from pathlib import Path
from peftc.store.job import execution
with execution(Path(sys.argv[1]), sys.argv[2], overwrite=True) as job:
    (job.work / "part").touch()
    print("working", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(output: Path) -> Any:
    """Another process, at work on the same output until it is killed."""
    running = []

    def start(identity: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(output), identity]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("identity", [ONE, OTHER])
def test_two_runs_never_write_one_folder(output: Path, other_run: Any, identity: str) -> None:
    process = other_run(ONE)
    with pytest.raises(OutputError, match="another run is writing"):
        build(output, identity, overwrite=True)
    process.kill()
    process.wait()
    assert build(output).resumed


def test_being_done_does_not_disturb_another_run(output: Path, other_run: Any) -> None:
    build(output)
    other_run(OTHER)
    assert build(output).done
    assert (output.with_name("out.partial") / "work" / "part").exists()


def killed_between_the_renames(output: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    """Build ONE, then replace it by OTHER, and stop after the old folder was moved out of the way."""
    build(output)
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if target == output and self.name == "artifact":
            raise failure
        return rename(self, target)

    with pytest.raises((KeyboardInterrupt, OutputError)), monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        build(output, OTHER, overwrite=True)


def test_a_kill_between_the_two_renames_is_undone(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_between_the_renames(output, monkeypatch, KeyboardInterrupt())
    assert not output.exists()
    with pytest.raises(ArtifactError, match="holds the artifact of another request"):
        build(output, "3" * 64)
    assert holds(output) == ONE
    assert build(output, OTHER, overwrite=True).resumed
    assert holds(output) == OTHER
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_failure_between_the_two_renames_is_undone_at_once(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_between_the_renames(output, monkeypatch, OSError(errno.ENOSPC, "full"))
    assert holds(output) == ONE
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_kill_after_the_second_rename_leaves_a_finished_folder(output: Path) -> None:
    build(output)
    with pytest.raises(KeyboardInterrupt), execution(output, OTHER, overwrite=True) as job:
        fill(job)
        raise KeyboardInterrupt
    assert holds(output) == OTHER
    assert build(output, OTHER).done
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_what_takes_the_name_of_the_output_meanwhile_is_not_deleted(output: Path) -> None:
    with pytest.raises(TakenError, match="is in the way") as refusal, execution(output, ONE) as job:
        (job.work / "part").write_text("computed")
        output.mkdir()
        (output / "thesis.txt").write_text("the only copy")
        fill(job)
    assert "what was computed stays in" in str(refusal.value)
    assert (output / "thesis.txt").read_text() == "the only copy"
    assert (output.with_name("out.partial") / "work" / "part").read_text() == "computed"
    with pytest.raises(ArtifactError, match="in the way"), execution(output, ONE):
        pass
    (output / "thesis.txt").rename(output.parent / "thesis.txt")
    output.rmdir()
    with execution(output, ONE) as job:
        assert job.resumed and (job.work / "part").exists()
        fill(job)
    assert holds(output) == ONE and not job.partial.exists()


@pytest.mark.parametrize("left", ["", "empty", "torn", "beside"])
def test_unfinished_work_in_any_state_is_understood(output: Path, left: str) -> None:
    with pytest.raises(KeyboardInterrupt), execution(output, ONE) as job:
        (job.work / "part").write_text("computed")
        raise KeyboardInterrupt
    path = job.partial / "job.json"
    content = path.read_text()
    path.unlink()
    if left in ("empty", "torn"):
        path.write_text("" if left == "empty" else content[:9])
    if left == "beside":
        (job.partial / "job.json.4000000.partial").write_text("")
    with execution(output, ONE) as job:
        assert not job.resumed
        fill(job)
    assert holds(output) == ONE and not job.partial.exists()


@pytest.mark.parametrize("left", [("lock", "job.json"), ("lock",), ()])
def test_what_a_kill_leaves_of_the_last_clean_up_is_swept(output: Path, left: tuple[str, ...]) -> None:
    with execution(output, ONE) as job:
        fill(job)
    job.partial.mkdir()
    for name in left:
        (job.partial / name).write_text(json.dumps({"id": ONE}) if name == "job.json" else "")
    with execution(output, ONE) as job:
        assert job.done
    assert not job.partial.exists()


def test_a_link_to_a_folder_stands_for_that_folder(output: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    output.symlink_to(tmp_path / "elsewhere")
    with execution(output, ONE) as job:
        fill(job)
    assert output.is_symlink() and holds(tmp_path / "elsewhere") == ONE
    with execution(output, ONE) as job:
        assert job.done


@pytest.mark.parametrize(
    "error", [DataError("a damaged image"), OSError(errno.ENOSPC, "full", "x")], ids=["data", "disk"]
)
def test_a_training_that_fails_keeps_its_checkpoint_and_says_how_to_go_on(output: Path, error: Exception) -> None:
    with pytest.raises(PeftcError) as refusal, execution(output, ONE) as job:
        (job.work / "checkpoint.pt").write_text("learnt")
        raise error
    assert "run the same command again to go on" in str(refusal.value)
    with execution(output, ONE) as job:
        assert job.resumed and (job.work / "checkpoint.pt").read_text() == "learnt"
        fill(job)


def test_a_file_is_written_whole_or_not_at_all_and_leftovers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    documents.write_whole(path, "one")
    (tmp_path / "plan.json.4000000.partial").write_text("of a process that was killed")
    (tmp_path / f"plan.json.{os.getppid()}.partial").write_text("of one that runs")
    documents.write_whole(path, b"two")
    assert path.read_text() == "two"
    assert {each.name for each in tmp_path.iterdir()} == {"plan.json", f"plan.json.{os.getppid()}.partial"}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        documents.write_whole(path, "three")
    assert path.read_text() == "two" and len(list(tmp_path.iterdir())) == 2
