"""A delta: an artifact that holds what a task changed, and names the model that holds the rest."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftc.errors import ArtifactError, SourceError
from peftc.models.model import Model
from peftc.models.shorten import Shorter
from peftc.nn import surgery
from peftc.store import artifact, verified
from peftc.store.header import TensorInfo
from peftc.store.manifest import Manifest
from peftc.store.source import FILES, Source


def reference(model: Model, base: Mapping[str, Any], tensors: Mapping[str, str]) -> dict[str, Any]:
    """Return what the manifest of a delta says of the model that it changes; a delta on a delta has the same one.

    Args:
        model: with its files (ArtifactError: it has none on disk).
        base: its record, where it is no artifact.
        tensors: name in the delta's network -> name in the model, of those called otherwise.
    """
    if model.manifest is not None and model.manifest.delta:
        return {**model.manifest.delta, "tensors": dict(tensors)}
    if model.manifest is not None:
        files = {name: model.manifest.files[name]["sha256"] for name in model.manifest.weight_files}
        record: dict[str, Any] = {"artifact": model.manifest.id, **model.place}
    else:
        files, record = dict(base["files"]), dict(base.get("source") or {})
    if not record or "memory" in files:
        hint = "save it first, or write a full artifact: leave `--delta` out"
        raise ArtifactError(f"a delta needs a base on disk; `{model.name}` is a live network", hint=hint)
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
    """Return the tensors beneath a delta by their names there, and their byte ranges (ArtifactError: not as it was)."""
    named = record.delta["source"]
    spec, is_typed = source.base or named["spec"], source.base is not None
    if not Path(spec).expanduser().exists():  # perhaps it lies beside the delta, under its own name
        beside = folder.resolve().parent / Path(spec).name
        looks_like_a_path = spec.startswith((".", "/", "~")) or spec.count("/") != 1 or spec.endswith(FILES)
        is_path = looks_like_a_path and not spec.startswith(("timm:", "hf:", "python:"))
        # the path of an artifact of this machine may look like a hub id
        is_artifact = not is_typed and "artifact" in named and not spec.startswith("hf:")
        if not is_typed and beside.exists():
            spec = str(beside)
        elif is_path or is_artifact:
            what = f"`{folder}` is a delta on `{spec}`, which is not there"
            hint = "put its base beside it, or say where it is: `--base MODEL`"
            raise SourceError(what, why=f"neither that path from here exists, nor `{beside}`", hint=hint)
    revision = None if is_typed else named.get("revision")
    model = load(recorded(named, source, spec, revision=revision, from_file=not is_typed, verify=source.verify))
    if why := difference(record.delta["files"], model.files):
        what = f"`{folder}` is a delta on `{model.source.spec}`, which is not what it was"
        raise ArtifactError(what, why=why, hint="put the model back that it was made from, or make the delta again")
    return surgery.tensors_of(model.module), model.infos


def difference(promised: Mapping[str, str], files: Iterable[Path]) -> str | None:
    """Return what of a model's files is not as it was when a record promised their digests; None where all is."""
    found = {path.name: path for path in files}
    lost = [name for name in promised if name not in found]
    changed = verified.differing({found[name]: digest for name, digest in promised.items() if name in found})
    if lost:
        return f"`{lost[0]}` is not there"
    return f"`{changed[0].name}` holds other bytes" if changed else None


def recorded(record: Mapping[str, Any], source: Source, spec: str, **how: Any) -> Source:
    """Return the source of a model that a record of ``source`` says how to build, by the name ``spec``."""
    weights = Path(record["weights"]) if record.get("weights") else None
    return source.names(spec, arch=record.get("arch"), arch_set=record.get("arch_set", {}), weights=weights, **how)
