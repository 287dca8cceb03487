"""What the steps of a recipe read and what came of them, so that a second run does nothing.

`runs/ledger.json` has an entry for each step: what it was asked, what it read, the artifact it wrote and its report. A
step whose question is the same, and whose answer still stands, does not run again. Files whose names, sizes and times
are the same count as unchanged, as make has it; others are read, and count as changed by their bytes; artifacts by
their manifest. A step that runs without need does no harm: the artifact that it would write is already there, and says
so.
"""

import functools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftc.errors import ChainError, PeftcError
from peftc.store import artifact, documents, manifest, verified
from peftc.store.source import MANIFEST
from peftc.version import __version__

FILE = "ledger.json"
WRITTEN = ("output_dir", "plot", "output")  # options that name what a step writes, not what it reads
READ = 10 * 10**9  # bytes of files up to which they are compared by content: of more the times tell
UNIMPORTANT = ("model", "config", "json", "quiet", "verbose", "dry_run", "overwrite")


@dataclass(frozen=True)
class Asked:
    """What a step of a recipe is asked.

    Attributes:
        model: what it reads, an artifact or a model as it was named.
        options: as parsed, JSON-ready; those left at None are left out.
        files: what lies on disk of all that the model and the options name -> a digest that changes when it does.
        written: the paths that it writes beside an artifact.
    """

    model: str
    options: Mapping[str, Any]
    files: Mapping[str, str]
    written: tuple[str, ...] = ()


@dataclass
class Ledger:
    """The entries of a project, by the name of the step."""

    path: Path
    entries: dict[str, Any] = field(default_factory=dict)

    def reason(self, step: str, asked: Asked) -> str | None:
        """Return why a step has to run; None where its answer stands."""
        entry = self.entries.get(step)
        if entry is None:
            return "it has not run yet"
        if not entry["passed"]:
            return "a gate of it was not met"
        if entry["peftc"] != __version__:
            return f"it ran with peftc {entry['peftc']}"
        if changes := _changes(entry["options"], asked.options):
            return "; ".join(changes)
        if entry["model"] != asked.model:
            return f"it read `{entry['model']}`, now it reads `{asked.model}`"
        for name in {**entry["files"], **asked.files}:
            if not _is_same(name, asked.files.get(name), entry):
                return f"`{name}` has changed"
        missing = [name for name in asked.written if not Path(name).exists()]
        if missing:
            return f"`{missing[0]}` is gone"
        return None if entry["artifact"] is None else _fallen(Path(entry["artifact"]), entry["id"])

    def note(self, step: str, asked: Asked, report: Mapping[str, Any], *, passed: bool) -> None:
        """Keep what came of a step, so that a run that is killed after it goes on from there."""
        folder = report.get("artifact")
        record = manifest.read(Path(folder)) if folder is not None and Path(folder, MANIFEST).is_file() else None
        self.entries[step] = {
            "peftc": __version__,
            "model": asked.model,
            "options": asked.options,
            "files": asked.files,
            "contents": {name: content(name, look) for name, look in asked.files.items()},
            "artifact": folder,
            "id": None if record is None else record.id,
            "passed": passed,
            "report": report,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        value = documents.sealed({"schema_version": 1, "steps": self.entries})
        documents.write_whole(self.path, documents.pretty(value))


def read(runs: Path) -> Ledger:
    """Return the ledger of a project, empty where nothing was run yet; a `ChainError` where it is damaged."""
    path = runs / FILE
    if not path.is_file():
        return Ledger(path)
    try:
        found = documents.read_json(path)
        why = None if documents.is_sealed(found) else "it was changed after peftc wrote it"
    except (OSError, ValueError) as error:
        why = str(error)
    if why:
        hint = "remove the file: steps whose artifacts stand are then looked at again, not made again"
        raise ChainError(f"cannot read `{path}`", why=why, hint=hint)
    entries = found["steps"] if found["schema_version"] == 1 else {}
    return Ledger(path, entries)


def asked(command: str, model: str, options: Mapping[str, Any]) -> Asked:
    """Return what a step is asked, with the state of every file that its options name.

    Args:
        command: its word.
        model: the artifact or model that it reads.
        options: parameter -> value, as parsed.
    """
    own = {name: value for name, value in options.items() if name not in UNIMPORTANT and value is not None}
    own = json.loads(json.dumps(own, default=str))
    written = (*WRITTEN, *(("plan",) if command == "analyze" else ()))
    names = [value for name, value in own.items() if isinstance(value, str) and name not in written]
    found = {name: state(name) for name in (model, *names)}
    files = {name: digest for name, digest in found.items() if digest is not None}
    return Asked(model, own, files, tuple(str(own[name]) for name in written if name in own))


def state(name: str) -> str | None:
    """Return a digest that changes when what a text names on disk does; None where it names nothing there.

    Args:
        name: a path, or a `--data` spec with its columns and its split.
    """
    path = _named(name)
    if path is None:
        return None
    if (path / MANIFEST).is_file():
        return manifest.file_digest(path / MANIFEST)
    looks = [(str(file.relative_to(path)), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in _files(path)]
    return manifest.digest(looks)


@functools.cache
def content(name: str, look: str) -> str | None:
    """Return a digest of the bytes of what a text names; None where they are many, or it is no more as it looked.

    Args:
        name: as for `state`.
        look: what `state` said of it.
    """
    path = _named(name)
    if path is None or (path / MANIFEST).is_file():
        return look if state(name) == look else None
    with suppress(OSError):
        files = _files(path)
        if sum(file.stat().st_size for file in files) <= READ:
            found = manifest.digest([(str(file.relative_to(path)), manifest.file_digest(file)) for file in files])
            return found if state(name) == look else None
    return None


def _is_same(name: str, look: str | None, entry: Mapping[str, Any]) -> bool:
    """Return whether what a text names looks as when a step read it, or has the same bytes."""
    if look is None or name not in entry["files"]:
        return False
    known = entry.get("contents", {}).get(name)
    return entry["files"][name] == look or (known is not None and content(name, look) == known)


def _named(name: str) -> Path | None:
    """Return the file or folder that a path, or a `--data` spec, names."""
    bare = name.partition("?")[0]
    spelled = (
        Path(each).expanduser() for each in (name, name.rpartition("@")[0], bare, bare.rpartition("@")[0]) if each
    )
    try:
        return next((each for each in spelled if each.exists()), None)
    except OSError:  # a text that is no path at all
        return None


def _files(path: Path) -> list[Path]:
    """Return a file, or all files below a folder, in order."""
    inside = (Path(top, name) for top, _, names in os.walk(path) for name in names)
    return [path] if path.is_file() else sorted(file for file in inside if file.exists())


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say which options were others."""
    was, now = ({name: documents.said(value) for name, value in options.items()} for options in (there, here))
    return [
        f"`{name.replace('_', '-')}` was {was.get(name, 'not given')}, now it is {now.get(name, 'not given')}"
        for name in {**here, **there}
        if there.get(name) != here.get(name)
    ]


def _fallen(folder: Path, identity: str | None) -> str | None:
    """Return what became of a folder; None where it is still there and, of an artifact, whole and the same."""
    if not folder.exists():
        return f"`{folder}` is gone"
    if identity is None:
        return None
    try:
        record = manifest.read(folder)
        artifact.tensor_table(folder, record)
        verified.check(folder, record.files)  # of files that nobody wrote to since, what was found before
    except PeftcError as error:
        return f"`{folder}` is damaged: {error.what}"
    return None if record.id == identity else f"another artifact stands in `{folder}`"
