"""One execution of a writing step: its identity, its working folder, and the one rename that makes the result appear.

``OUT.partial/`` holds ``job.json`` (whose work it is), ``lock``, ``work/`` (finished parts, for a resume) and
``artifact/`` (the folder to be), and for a moment ``replaced/`` (the one that makes room). The last act is fsync and a
rename of ``artifact/`` to OUT, so OUT never exists half-written; after a kill the same request goes on from there.
"""

import errno
import fcntl
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftc.errors import ArtifactError, OutputError, PeftcError, TakenError, UsageError, refuse_not_utf8
from peftc.store import artifact, documents, manifest
from peftc.store.exports import ExportRecord, read_export
from peftc.store.manifest import Manifest
from peftc.store.source import EXPORT, MANIFEST

CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size that this disk or shell allows",
    errno.EACCES: "the folder may not be written",
    errno.EPERM: "the folder may not be written",
    errno.EROFS: "the disk is read-only",
    errno.ENOENT: "a part of the path does not exist and cannot be made",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
}


IN_THE_WAY = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
CHECKPOINT = "checkpoint"  # how files of a training begin that it goes on from


@dataclass
class Job:
    """A step at work on one output folder.

    Attributes:
        output: the folder to be.
        id: digest of base and requests.
        request: what was asked.
        asked: id and request as they came, where the answer depended on the clock and `id` is that of the answer.
        done: the folder is already there, from the same request.
        resumed: parts of an earlier, interrupted run are there.
        record: the file by which a finished folder is known: the manifest of an artifact, or `EXPORT`.
        overwrite: what stands at ``output`` in the end may be replaced.
        places: where the artifacts that it comes from were read, by id.
        told: what the artifact that it comes from says already.
    """

    output: Path
    id: str
    request: Mapping[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] | None = None
    done: bool = False
    resumed: bool = False
    started: float = field(default_factory=time.monotonic)
    record: str = MANIFEST
    overwrite: bool = False
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def partial(self) -> Path:
        """The folder of unfinished work, beside the output."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def work(self) -> Path:
        """Where finished parts are kept for a resume."""
        return self.partial / "work"

    @property
    def folder(self) -> Path:
        """The artifact folder in the making."""
        return self.partial / "artifact"

    @property
    def replaced(self) -> Path:
        """Where the artifact that is being replaced waits until the new one stands."""
        return self.partial / "replaced"

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the step began."""
        return time.monotonic() - self.started

    def require(self, number_of_bytes: int) -> None:
        """Refuse at once, by an `OutputError`, when the disk cannot hold what is to be written."""
        free = shutil.disk_usage(self.partial).free
        if free < number_of_bytes:
            why = f"the disk has {free:,} bytes free; the artifact and its parts need about {number_of_bytes:,}"
            raise OutputError(f"cannot write `{self.output}`", why=why, hint="free space, or write elsewhere with `-o`")

    def settle(self, identity: str) -> None:
        """Take the id of what the request resolved to; its folder and unfinished work stay those of the request."""
        self.asked = {"id": self.id, "request": dict(self.request)}
        self.id = identity

    def finish(self, record: Manifest | ExportRecord, result: dict[str, Any]) -> None:
        """Write manifest and result, make everything durable, and rename the folder into place."""
        record.write(self.folder)
        artifact.write_json(self.folder / artifact.RESULT, {"id": record.id, **result})
        for path in (*self.folder.iterdir(), self.folder):
            documents.sync(path)
        if self.overwrite and (self.output.exists() or self.output.is_symlink()):
            self.output.rename(self.replaced)
        try:
            self.folder.rename(self.output)  # which takes the place of nothing but an empty folder
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            stays = f"; what was computed stays in `{self.partial}`" if any(self.work.iterdir()) else ""
            why = "it was not there when this run began, so peftc neither writes into it nor deletes it"
            hint = f"move it, and run the same command again{stays}"
            raise TakenError(f"`{self.output}` is in the way", why=why, hint=hint) from None
        documents.sync(self.output.parent)

    def restore(self) -> None:
        """Undo a replacement that stopped between its two renames."""
        if self.replaced.exists() and not self.output.exists():
            self.replaced.rename(self.output)

    def drop(self) -> None:
        """Remove the folder of unfinished work; what tells that it is peftc's goes last, so that a kill leaves that."""
        for each in (self.work, self.folder, self.replaced, self.partial):
            shutil.rmtree(each, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """Return what a finished folder's ``result.json`` holds; empty where it is gone."""
        return artifact.read_result(self.output)


@contextmanager
def execution(
    output: Path,
    identity: str,
    request: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    record: str = MANIFEST,
) -> Iterator[Job]:
    """Hold the output folder for one request, and leave nothing behind when the request is refused.

    Raises:
        ArtifactError: the folder holds something else, or unfinished work of another request.
        OutputError: it cannot be written, or another run is writing it.
        UsageError: the path ends in no name of its own.
    """
    if output.name in ("", ".."):
        raise UsageError(f"`{output}` names no folder of its own", hint="give it a name: `-o small`")
    refuse_not_utf8("the name of the output", output)
    if output.is_symlink() and output.is_dir():
        output = output.resolve()  # a link to a folder on another disk stands for that folder
    job = Job(output, identity, request or {}, record=record, overwrite=overwrite)
    with _told(output):
        _refuse_foreign(job)
        if job.replaced.exists() and not output.exists():
            with _locked(job):
                job.restore()
        if output.exists() or output.is_symlink():
            job.done = _is_done(job, overwrite)
        if job.done:
            if job.partial.exists() and _owner(job) in (None, job.id):
                with suppress(OutputError), _locked(job):  # unless another run works there
                    job.drop()
            yield job
            return
        missing = [folder for folder in job.partial.parents if not folder.exists()]
        job.partial.mkdir(parents=True, exist_ok=True)
        with _locked(job):
            fresh = _claim(job, overwrite)
            job.resumed = not fresh
            try:
                yield job
            except (PeftcError, OSError) as error:
                job.restore()
                keeps = isinstance(error, PeftcError) and error.keeps_work
                if any(path.name.startswith(CHECKPOINT) for path in job.work.iterdir()):
                    stays = f"what was learnt so far stays in `{job.partial}`: mend the cause, and run the same command"
                    stays += " again to go on"
                    if isinstance(error, OSError) and error.errno in CAUSES:
                        raise _unwritten(output, error, stays) from error
                    if isinstance(error, PeftcError) and not keeps:
                        error.hint = "; ".join(filter(None, (error.hint, stays)))
                elif fresh and not (keeps and any(job.work.iterdir())):
                    job.drop()
                    for folder in missing:
                        with suppress(OSError):  # somebody else may have put something there
                            folder.rmdir()
                raise
            job.drop()


@contextmanager
def _told(output: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into a refusal."""
    try:
        yield
    except OSError as error:
        if error.errno not in CAUSES:
            raise
        raise _unwritten(output, error) from error


def _unwritten(output: Path, error: OSError, hint: str = "write elsewhere with `-o`") -> OutputError:
    why = f"{CAUSES[error.errno or 0]} ({error.filename or output})"
    return OutputError(f"cannot write `{output}`", why=why, hint=hint)


def _owner(job: Job) -> str | None:
    """Return the id of the request whose work the partial folder holds, or None."""
    try:
        return str(documents.read_json(job.partial / "job.json")["id"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _refuse_foreign(job: Job) -> None:
    """Refuse a folder in the place of unfinished work that peftc did not make: any kill leaves only what is known."""
    if not job.partial.exists() or _owner(job) is not None:
        return
    there = {path.name for path in job.partial.iterdir() if not path.name.startswith("job.json.")}
    if there - {"lock", "job.json", *(("work", "artifact", "replaced") if "lock" in there else ())}:
        why = "it is no unfinished work of peftc, so peftc neither writes into it nor deletes it"
        raise ArtifactError(f"`{job.partial}` is in the way", why=why, hint="write elsewhere with `-o`")


def _is_done(job: Job, overwrite: bool) -> bool:
    """Return whether the output already is the answer; refuse when it is something else that may not be replaced."""
    output, asked = job.output, job.result().get("asked") or {}
    word = "export" if job.record == EXPORT else "artifact"
    if output.is_dir() and (output / job.record).is_file():
        there: Mapping[str, Any] = {}
        try:
            if job.record == EXPORT:
                exported = read_export(output)
                there = exported.request
                if exported.id == job.id:
                    return True
            else:
                found = manifest.read(output)
                there = found.steps[-1]["request"] if found.steps else {}
                if job.id in (found.id, asked.get("id")):
                    artifact.tensor_table(output, found)
                    return True
        except PeftcError as error:
            if not overwrite:
                away = f"delete this folder (`rm -r {shlex.quote(str(output))}`) and run the same command again"
                error.hint = "; or ".join(filter(None, (error.hint, away)))
                raise
        if overwrite:
            return False
        why = _difference(asked.get("request") or there, job.request)
        hint = "write elsewhere with `-o`, or replace it with `--overwrite`"
        raise ArtifactError(f"`{output}` holds the {word} of another request", why=why, hint=hint, request=job.id)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
        return False
    why = f"it is no {word} of peftc, so peftc neither writes into it nor deletes it"
    raise ArtifactError(f"`{output}` is in the way", why=why, hint="move or delete it, or write elsewhere with `-o`")


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Say in which options two requests differ, or that they are about another base."""
    differ = [key for key in {**here, **there} if there.get(key) != here.get(key)]
    if not differ:
        return "it was made from another base, or by another chain of steps"
    names = {key: key.replace("_", "-") for key in differ[:3]}
    return "; ".join(
        f"{name} was {_text(there.get(key))}, now it is {_text(here.get(key))}" for key, name in names.items()
    )


def _text(value: Any) -> str:
    text = documents.said(value)
    return text if len(text) < 60 else f"{text[:57]}..."


@contextmanager
def _locked(job: Job) -> Iterator[None]:
    with (job.partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = f"it holds `{job.partial / 'lock'}`"
            hint = "wait for it, or write elsewhere with `-o`"
            raise OutputError(f"another run is writing `{job.output}`", why=why, hint=hint) from None
        yield


def _claim(job: Job, overwrite: bool) -> bool:
    """Make the partial folder this request's own; return whether it starts from nothing."""
    owner = _owner(job)
    if owner not in (None, job.id) and not overwrite:
        what = f"`{job.partial}` holds unfinished work of another request"
        why = f"its id is {owner[:12]}, this request's is {job.id[:12]}"
        hint = f"finish that request, or drop its work with `--overwrite` (or `rm -r {job.partial}`)"
        raise ArtifactError(what, why=why, hint=hint, request=job.id)
    if owner != job.id:
        shutil.rmtree(job.work, ignore_errors=True)
        documents.write_whole(job.partial / "job.json", json.dumps({"id": job.id}) + "\n")
    for leftover in (job.folder, job.replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    job.work.mkdir(exist_ok=True)
    job.folder.mkdir()
    return owner != job.id
