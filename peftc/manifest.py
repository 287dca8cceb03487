"""The manifest, ``peftc.json``: what an artifact is made of, from which base, by which requests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from peftc.errors import ArtifactError
from peftc.source import MANIFEST

SCHEMA_VERSION = 1
STATISTICS = "statistics"  # stem of the files that `calibrate` writes
FIELDS: dict[str, Any] = {
    "schema_version": int,
    "id": str,
    "base": dict,
    "steps": list,
    "modules": dict,
    "tied": dict,
    "files": dict,
    "parameters": int,
    "preprocess": dict,
    "labels": list | None,
}  # `manifest.schema.json` says the same in full, and a test compares the two
OPTIONAL: dict[str, Any] = {
    "ordered": dict,
    "kept_layers": list,
    "skipped": dict,
    "adapters": dict,
    "delta": dict,
}  # older ones lack them


@dataclass(frozen=True)
class Manifest:
    """How a network differs from its base class, and how it came to be.

    Attributes:
        id: digest of the base and of every request: same question, same id.
        base: library, class and constructor arguments of the base network; source, revision and sha256 of its files.
        steps: one ``{"id", "request"}`` per step, oldest first.
        modules: dotted name -> ``{"form", "rank"}`` of each factored module, and ``shares``, the first member of its
            group, for one whose down factor is that of all members.
        tied: alias -> stored name, for tensors that are one and the same.
        files: file name -> ``{"sha256", "bytes"}`` of everything in the folder but this file and ``result.json``.
        parameters: number of parameters, tied ones counted once.
        preprocess: how images become inputs; empty for text.
        labels: class names in output order, where known.
        ordered: dotted name -> ``{"form", "rank"}`` of each dense module whose factors of every rank up to that one lie
            in ``factors.safetensors``, for `truncate`; rank 0 where no factors would be smaller.
        kept_layers: names in the base of the layers that are left, in running order; empty where none was dropped.
        skipped: dotted name -> lengths of the tuples that its output stood in, of each layer that was dropped and still
            has its place, for its network cannot be built without it. Where there are some, layers keep their names.
        adapters: dotted name -> ``{"method", "settings"}`` of each module with an update that is not merged.
        delta: empty for an artifact that holds every tensor; otherwise the model that holds the others: its ``source``,
            the sha256 of its ``files``, and ``tensors``, name here -> name there, for those called otherwise there.
    """

    id: str
    base: dict[str, Any]
    steps: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    parameters: int
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    preprocess: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    ordered: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept_layers: list[str] = field(default_factory=list)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    delta: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def weight_bytes(self) -> int:
        """Number of bytes of the weight files."""
        return sum(entry["bytes"] for name, entry in self.files.items() if name.endswith(".safetensors"))

    @property
    def holds_statistics(self) -> bool:
        """Whether the folder holds statistics of a model, not a model."""
        return f"{STATISTICS}.safetensors" in self.files

    def write(self, folder: Path) -> None:
        """Write ``peftc.json`` into ``folder``, with sorted keys."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Return the manifest of an artifact, checked.

    Raises:
        ArtifactError: it is missing, not JSON, of another schema version, or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"`{folder}` is not an artifact", why=f"it has no `{MANIFEST}`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot read `{path}`", why=str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, "it does not hold a JSON object")
    if value.get("schema_version") is True or value.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"`{path}` has schema version {value.get('schema_version')!r}; this peftc reads {SCHEMA_VERSION}",
            hint="open it with the version of peftc that wrote it: `pip install -U peftc`",
        )
    for name, kind in FIELDS.items():
        if name not in value or not isinstance(value[name], kind):
            raise _damaged(path, f"its field `{name}` is missing or of the wrong type")
    for name, kind in OPTIONAL.items():
        if not isinstance(value.get(name, kind()), kind):
            raise _damaged(path, f"its field `{name}` is of the wrong type")
    unknown = sorted(value.keys() - FIELDS.keys() - OPTIONAL.keys())
    if unknown:
        raise _damaged(path, f"it has unknown fields: {', '.join(unknown)}")
    for name, entry in value["files"].items():
        _check_file_name(path, name)
        if not _has(entry, {"sha256": str, "bytes": int}):
            raise _damaged(path, f"its entry for file `{name}` has no sha256 and bytes")
    for step in value["steps"]:
        request = step.get("request") if isinstance(step, dict) else None
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            raise _damaged(path, "one of its steps has no request with a command")
        if not isinstance(request.get("budget") or {}, dict):
            raise _damaged(path, "one of its steps has a budget that is no map")
    for name, edit in value["modules"].items():
        if not _has(edit, {"form": str}) or not _is_rank(edit.get("rank")):
            raise _damaged(path, f"its entry for module `{name}` has no form and rank")
        if "shares" in edit and not _shares(value["modules"], edit):
            raise _damaged(path, f"`{name}` shares the down factor of {edit['shares']!r}, which has none of that rank")
    for name, entry in value.get("ordered", {}).items():
        if not _has(entry, {"form": str}) or type(entry.get("rank")) is not int or entry["rank"] < 0:
            raise _damaged(path, f"its entry for the ordered factors of `{name}` has no form and rank")
    if not _has(value["base"], {"library": str, "architecture": str}):
        raise _damaged(path, "its base has no library and architecture")
    if not all(_has(step, {"id": str}) for step in value["steps"]):
        raise _damaged(path, "one of its steps has no id")
    if not all(isinstance(name, str) for name in value["tied"].values()):
        raise _damaged(path, "one of its tied names is no text")
    if not all(isinstance(name, str) for name in value.get("kept_layers", [])):
        raise _damaged(path, "one of its kept layers is no text")
    if not all(_is_lengths(lengths) for lengths in value.get("skipped", {}).values()):
        raise _damaged(path, "one of its skipped layers does not say what it gave")
    for name, entry in value.get("adapters", {}).items():
        if not _has(entry, {"method": str, "settings": dict}):
            raise _damaged(path, f"its entry for the adapter of `{name}` has no method and settings")
    delta = value.get("delta")
    if delta and not (
        _has(delta, {"source": dict, "files": dict, "tensors": dict}) and _has(delta["source"], {"spec": str})
    ):
        raise _damaged(path, "it is a delta, but does not say on which model")
    return Manifest(**value)


def _has(entry: Any, fields: dict[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def _shares(modules: dict[str, Any], edit: dict[str, Any]) -> bool:
    """Return whether the module that an entry names leads a group of the same rank."""
    first = modules.get(edit["shares"]) if isinstance(edit["shares"], str) else None
    return isinstance(first, dict) and (first.get("shares"), first.get("rank")) == (edit["shares"], edit["rank"])


def _is_lengths(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 1 <= number <= 100 for number in value)


def _is_rank(value: Any) -> bool:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(number) is int and number >= 1 for number in numbers)


def _check_file_name(path: Path, name: str) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in name:
        raise _damaged(path, f"it names the file `{name}`, which is not inside the folder")


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"`{path}` is not a manifest that peftc wrote", why=why, hint="build the artifact again")


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256, in hexadecimal, of a JSON-ready value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256, in hexadecimal, of a file's bytes."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
