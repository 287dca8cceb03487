"""A delta: an artifact that holds what a task changed, and names the model that holds the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftc.errors import ArtifactError, SourceError
from peftc.nn import surgery
from peftc.store import artifact, verified
from peftc.store.source import Source

if TYPE_CHECKING:
    from peftc.models.model import Model
    from peftc.models.shorten import Shorter
    from peftc.store.header import TensorInfo
    from peftc.store.manifest import Manifest


def reference(model: Model, base: Mapping[str, Any], tensors: Mapping[str, str]) -> dict[str, Any]:
    """Return what the manifest of a delta says of the model that it changes; a delta on a delta has the same one.

    Args:
        model: with its files.
        base: its record, where it is no artifact.
        tensors: name in the delta's network -> name in the model, of those called otherwise.

    Raises:
        ArtifactError: the model is nowhere on disk.
    """
    if model.manifest is not None and model.manifest.delta:
        return {**model.manifest.delta, "tensors": dict(tensors)}
    if model.manifest is not None:
        files = {n: e["sha256"] for n, e in model.manifest.files.items() if n.endswith(".safetensors")}
        record: dict[str, Any] = {"spec": model.source.spec, "artifact": model.manifest.id}
        if model.hub is not None:
            record |= {"spec": f"hf:{model.hub[0]}", "revision": model.hub[1]}
    else:
        files, record = dict(base["files"]), dict(base.get("source") or {})
    if not record or "memory" in files:
        raise ArtifactError(
            f"a delta needs a base on disk; `{model.name}` is a live network",
            hint="save it first, or write a full artifact: leave `--delta` out",
        )
    return {"source": record, "files": files, "tensors": dict(tensors)}


def is_delta(model: Model) -> bool:
    """Return whether a model is stored as a change of another."""
    return model.manifest is not None and bool(model.manifest.delta)


def held(model: Model) -> set[str]:
    """Return the names of the tensors that a delta holds itself; none for another model."""
    if model.manifest is None or not model.manifest.delta:
        return set()
    assert model.folder is not None
    return set(artifact.tensor_table(model.folder, model.manifest))


def of_shorter(model: Model, shorter: Shorter) -> tuple[list[str], dict[str, str]]:
    """Return the tensors that a delta of a shorter model holds, and what others are called in the model beneath."""
    own = held(model)
    earlier: Mapping[str, str] = model.manifest.delta.get("tensors", {}) if model.manifest is not None else {}
    names, there = [], {}
    for name in surgery.stored_names(shorter.model.module):
        was = shorter.tensors[name]
        if was in own:
            names.append(name)
        elif (called := earlier.get(was, was)) != name:
            there[name] = called
    return names, there


def beneath(
    record: Manifest, folder: Path, source: Source, load: Callable[[Source], Model]
) -> tuple[dict[str, Tensor], dict[str, TensorInfo]]:
    """Return the tensors of the model beneath a delta, by their names there, and their byte ranges.

    Raises:
        ArtifactError: it is gone, or is not what it was.
    """
    model = load(_source(record, folder, source))
    found = {path.name: path for path in model.files}
    changed = [name for name in record.delta["files"] if name not in found]
    there = {found[name]: digest for name, digest in record.delta["files"].items() if name in found}
    changed += [path.name for path in verified.differing(there)]
    if changed:
        raise ArtifactError(
            f"`{folder}` is a delta on `{model.source.spec}`, which is not what it was",
            why=f"`{changed[0]}` {'holds other bytes' if changed[0] in found else 'is not there'}",
            hint="put the model back that it was made from, or make the delta again",
        )
    return surgery.tensors_of(model.module), model.infos


def _source(record: Manifest, folder: Path, source: Source) -> Source:
    """Return where the model beneath a delta is: as it was named, or beside the delta under its own name."""
    named = record.delta["source"]
    spec = source.base or named["spec"]
    beside = folder.resolve().parent / Path(spec).name
    if source.base is None and not Path(spec).expanduser().exists() and beside.exists():
        spec = str(beside)
    elif (_is_path(spec) or _is_artifact_here(named, source)) and not Path(spec).expanduser().exists():
        raise SourceError(
            f"`{folder}` is a delta on `{spec}`, which is not there",
            why=f"neither that path from here exists, nor `{beside}`",
            hint="put its base beside it, or say where it is: `--base MODEL`",
        )
    weights = named.get("weights")
    return source.names(
        spec,
        arch=named.get("arch"),
        arch_set=named.get("arch_set", {}),
        weights=Path(weights) if weights else None,
        revision=None if source.base else named.get("revision"),
        from_file=source.base is None,
        verify=source.verify,
    )


def _is_artifact_here(named: Mapping[str, Any], source: Source) -> bool:
    """Return whether what was named is an artifact of this machine, whose path may look like a hub id."""
    return source.base is None and "artifact" in named and not named["spec"].startswith("hf:")


def _is_path(spec: str) -> bool:
    return not spec.startswith(("timm:", "hf:", "python:")) and (
        spec.startswith((".", "/", "~")) or spec.count("/") != 1 or spec.endswith(".safetensors")
    )
