"""The manifest, ``peftc.json``: what an artifact is made of, from which base, by which requests."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from peftc.errors import ArtifactError, PeftcError, did_you_mean
from peftc.store import documents
from peftc.store.documents import digest
from peftc.store.source import MANIFEST

__all__ = ["Manifest", "digest", "edited", "file_digest", "read"]

SCHEMA_VERSION = 1
STATISTICS = "statistics"  # stem of the files that `calibrate` writes
ENTRY = {"sha256": str, "bytes": int}
SOURCE = {
    "spec": str,
    "arch?": (str, None),
    "arch_set?": dict,
    "weights?": (str, None),
    "revision?": (str, None),
    "preprocess?": dict,
    "trust_remote_code?": bool,
    "artifact?": str,
    "base?": str,
}
PLAN = {"ranks": dict, "forms?": dict, "joint?": [[str]]}
STATED = {"request?": ({"data?": (str, None)}, None), "collected?": {"command": str}}
# of a request only what is read again: by `show --commands`, cards and later steps
REQUEST = {
    "command": str,
    "budget?": (dict, None),
    "plan?": (PLAN, None),
    "settings?": dict,
    "statistics?": STATED,
    "method?": (str, None),
    "data?": ({"spec": str}, str, None),
    "drop?": ([int], None),
    "include?": [str],
    "skip?": [str],
    "max_shard_bytes?": int,
    "delta?": bool,
}
TRAINING = {
    "command": str,
    "loss": {str: float},
    "data": {"spec": str},
    "teacher?": ({"spec": (str, None)}, None),
    "policy": (str, None),
    "mixup": (float, None),
    "cutmix": (float, None),
    "dropout": Any,
}
DELTA = {"source": SOURCE, "files": {str: str}, "tensors": {str: str}}
FIELDS: dict[str, Any] = {
    "schema_version": int,
    "id": str,
    "base": {"library": str, "architecture": str, "arguments?": dict, "files?": {str: str}, "source?": SOURCE},
    "steps": [{"id": str, "request": REQUEST, "new_head?": bool}],
    "modules": {str: {"form": str, "rank": (int, [int]), "shares?": str}},
    "tied": {str: str},
    "files": {str: ENTRY},
    "parameters": int,
    "preprocess": {
        "input_size?": [int],
        "mean?": [float],
        "std?": [float],
        "crop_pct?": float,
        "interpolation?": str,
        "crop_mode?": str,
    },
    "labels": ([str], None),
}
OPTIONAL: dict[str, Any] = {
    "ordered": {str: {"form": str, "rank": int}},
    "kept_layers": [str],
    "skipped": {str: [int]},
    "adapters": {str: {"method": str, "settings": dict}},
    "delta": dict,
    documents.SEAL: str,
}  # older ones lack them; `manifest.schema.json` says the same in full, and a test compares the two


@dataclass(frozen=True)
class Manifest:
    """How a network differs from its base class, and how it came to be.

    Attributes:
        id: digest of the base and of every request: same question, same id.
        base: library, class and constructor arguments of the base network; source, revision and sha256 of its files.
        steps: one ``{"id", "request"}`` per step, oldest first, and ``new_head`` where it gave other outputs.
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
    def weight_files(self) -> list[str]:
        """The files that hold the artifact's own tensors: those in folders are companions."""
        return [name for name in self.files if name.endswith(".safetensors") and "/" not in name]

    @property
    def weight_bytes(self) -> int:
        """Number of bytes of the weight files."""
        return sum(self.files[name]["bytes"] for name in self.weight_files)

    @property
    def head_step(self) -> int:
        """The last step, counted from 1, that gave the model its head; 0 where the base has it already."""
        return max((number for number, step in enumerate(self.steps, 1) if step.get("new_head")), default=0)

    @property
    def begins(self) -> bool:
        """Whether its own last step gave the model its head: nothing before it answers the same question."""
        return self.head_step == len(self.steps) > 0

    @property
    def holds_statistics(self) -> bool:
        """Whether the folder holds statistics of a model, not a model."""
        return f"{STATISTICS}.safetensors" in self.files

    def write(self, folder: Path) -> None:
        """Write ``peftc.json`` into ``folder``, with sorted keys and a digest of what it says."""
        documents.write_whole(folder / MANIFEST, documents.pretty(documents.sealed(asdict(self))))


def lies(spec: str, made: str, folder: Path) -> str | None:
    """Return where an artifact lies that a folder was made from; None where neither place holds it.

    Args:
        spec: where it was read then; one of a hub is taken as it stands.
        made: its id.
        folder: beside which it may lie under its own name.
    """
    if spec.startswith("hf:"):
        return spec
    for place in (Path(spec).expanduser(), folder.resolve().parent / Path(spec).name):
        with suppress(PeftcError):
            if read(place).id == made:
                return str(place)
    return None


def read(folder: Path) -> Manifest:
    """Return the manifest of an artifact, checked.

    Raises:
        ArtifactError: it is missing, not JSON, of another schema version, was edited, or names a file outside the
            folder.
    """
    path = folder / MANIFEST
    try:
        value = documents.read_json(path)
    except FileNotFoundError:
        hint = did_you_mean(folder)
        raise ArtifactError(f"`{folder}` is not an artifact", why=f"it has no `{MANIFEST}`", hint=hint) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read `{path}`", why=str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, "it does not hold a JSON object")
    if value.get("schema_version") is True or value.get("schema_version") != SCHEMA_VERSION:
        what = f"`{path}` has schema version {value.get('schema_version')!r}; this peftc reads {SCHEMA_VERSION}"
        raise ArtifactError(what, hint="open it with the version of peftc that wrote it: `pip install -U peftc`")
    if documents.is_sealed(value) is False:
        raise edited(path)
    if why := _misfit(value):
        raise _damaged(path, why)
    value.pop(documents.SEAL, None)
    return Manifest(**value)


def edited(path: Path) -> ArtifactError:
    """Return the refusal of a sealed document that says something else than peftc wrote."""
    return ArtifactError(
        f"`{path}` was changed after peftc wrote it",
        why=f"its field `{documents.SEAL}` is not the digest of what it says",
        hint=f"build it again; if you changed it on purpose and trust it, take the field `{documents.SEAL}` out",
    )


def _misfit(value: dict[str, Any]) -> str | None:
    """Return what in a manifest is not as it has to be; None where all is."""
    optional = {f"{name}?": shape for name, shape in OPTIONAL.items()}
    if unknown := sorted(value.keys() - FIELDS.keys() - OPTIONAL.keys()):
        return f"it has unknown fields: {', '.join(unknown)}"
    if why := documents.misfit(value, FIELDS | optional):
        return why
    for step in value["steps"]:
        if "loss" in step["request"] and (why := documents.misfit(step["request"], TRAINING)):
            return f"in a request, {why}"
    if why := misfit_of_edits(value["modules"], value.get("skipped", {})):
        return why
    for name, entry in value.get("ordered", {}).items():
        if entry["rank"] < 0:
            return f"the ordered factors of `{name}` have the rank {entry['rank']}"
    sides = value["preprocess"].get("input_size", [1, 1, 1])
    if len(sides) != 3 or not all(1 <= side <= 100_000 for side in sides):
        return f"`preprocess.input_size` is {sides}, not channels, height and width"
    for name in value["files"]:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or any(each in name for each in "\\\0:"):
            return f"it names the file `{name}`, which is not inside the folder"
    why = documents.misfit(value["delta"], DELTA) if value.get("delta") else None
    return f"as a delta, {why}" if why else None


def misfit_of_edits(modules: Mapping[str, Mapping[str, Any]], skipped: Mapping[str, Sequence[int]]) -> str | None:
    """Return what in the edits of a network, right in shape, cannot be; None where all can."""
    for name, edit in modules.items():
        rank, leader = edit["rank"], edit.get("shares")
        if not (rank >= 1 if isinstance(rank, int) else len(rank) == 2 and min(rank) >= 1):
            return f"module `{name}` has the rank {rank}"
        first = modules.get(leader, {}) if leader is not None else {}
        if leader is not None and (first.get("shares"), first.get("rank")) != (leader, rank):
            return f"`{name}` shares the down factor of `{leader}`, which has none of that rank"
    if not all(1 <= length <= 100 for lengths in skipped.values() for length in lengths):
        return "one of its skipped layers does not say what it gave"
    return None


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"`{path}` is not a manifest that peftc wrote", why=why, hint="build the artifact again")


def file_digest(path: Path) -> str:
    """Return the sha256, in hexadecimal, of a file's bytes."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
