"""Source -> Model: build the network from its own config on the meta device, apply edits, map the tensors.

Nothing is copied: a loaded parameter is a window on its file. Loading is strict; no gap is filled with random numbers.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc import progress
from peftc.errors import ArtifactError, SourceError, UsageError, WeightError, named
from peftc.models import adapting, build, delta, from_gguf, from_peft, from_timm, hub, weights
from peftc.models.live import from_live
from peftc.models.model import PREPROCESS, Model, detached
from peftc.models.place import place_of
from peftc.nn import surgery
from peftc.nn.adapted import TakenIn, take_in
from peftc.store import artifact, manifest, verified
from peftc.store.header import TensorInfo
from peftc.store.manifest import Manifest
from peftc.store.source import Located, Source, locate


def load(model: str | Path | Source | nn.Module | Model, *, weights: bool = True, merge: bool = True) -> Model:
    """Return the model behind any form of MODEL.

    Args:
        model: what the user named, or a live network.
        weights: False leaves the parameters on the meta device, for plans that need shapes alone.
        merge: take the updates of an artifact into the weights that they change, where they change weights.

    Raises:
        SourceError, ArtifactError, WeightError: it cannot be found, trusted or filled exactly.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, nn.Module):
        return from_live(detached(model).eval())
    source = model if isinstance(model, Source) else Source(str(model))
    with progress.track(f"loading {source.spec.rstrip('/').rpartition('/')[2]}"):
        return _loaded(source, weights, merge)


def _loaded(source: Source, weights: bool, merge: bool) -> Model:
    located = _located(source, weights)
    if located.kind == "artifact":
        return _artifact(source, located, weights, merge)
    if located.kind == "peft":
        assert located.folder is not None
        return without_updates(from_peft.from_folder(source, located.folder, _whole))[0]
    loaded, tensors = build.build(source, located, weights)
    loaded.preprocess = _overridden(loaded.preprocess, source.preprocess)
    if located.file is not None:
        told = "its weights are those of the quantised file, and what is made of it is stored in float32"
        loaded.notes.append(f"`{located.file.name}` was dequantised from GGUF: {told}")
    if tensors is not None:
        found = build.fill(loaded, tensors)
        loaded.infos = {name: tensors.infos[there] for name, there in found.items() if there in tensors.infos}
        loaded.files = [located.file] if located.file else tensors.files
        loaded.notes += [said] if (said := surgery.two_halves(loaded.module)) else []
    lazy = [name for name, parameter in loaded.module.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        why = "a lazy module takes its shape from the first input, and has seen none"
        hint = "let the factory run the network once before it returns it"
        raise SourceError(f"`{lazy[0]}` of `{loaded.name}` has no shape yet", why=why, hint=hint)
    loaded.module.eval()
    return loaded


def _located(source: Source, weights: bool) -> Located:
    """Return what a source is, fetched where it is one of the hub and unpacked where it is a GGUF file."""
    located = locate(source)
    if located.kind == "gguf":
        return from_gguf.unpacked(located)
    if located.folder is None and located.kind in ("timm", "transformers"):
        try:
            located = hub.fetched(located, source, weights)
        except SourceError as error:
            if located.kind == "timm":
                error.hint = from_timm.meant(located.name.removeprefix("timm/"), "timm/") or error.hint
            raise
    return located


def _whole(source: Source) -> Model:
    """Return the model beneath an adapter or a delta, which has to hold every tensor: neither stands on another."""
    located = _located(source, True)
    if located.kind == "peft" or (
        located.kind == "artifact" and located.folder is not None and manifest.read(located.folder).delta
    ):
        what = f"`{source.spec}` cannot be the model beneath another"
        raise SourceError(what, why="it is an adapter or a delta itself", hint="name the whole model: `--base MODEL`")
    return load(source)


def load_base(model: Model) -> Model:
    """Return the base that an artifact records, as it was then (ArtifactError: it is not; SourceError: not there)."""
    if model.manifest is None:
        hint = "name one: `--against MODEL`"
        raise ArtifactError(f"`{model.source.spec}` is no artifact, so it records no base", hint=hint)
    record = model.manifest.base.get("source")
    if record is None:
        hint = "name one that is stored: `--against MODEL`, `--teacher MODEL`"
        raise ArtifactError(f"the base of `{model.source.spec}` was a live network", hint=hint)
    preprocess = model.preprocess and {key: model.preprocess[key] for key in record.get("preprocess", {})}
    revision = record.get("revision")
    base = load(delta.recorded(record, model.source, record["spec"], revision=revision, preprocess=preprocess))
    if why := delta.difference(model.manifest.base.get("files", {}), base.files):
        what = f"`{base.source.spec}` is not the base that `{model.source.spec}` was made from"
        hint = "put the model back that it was made from, or name another one: `--against MODEL`, `--teacher MODEL`"
        raise ArtifactError(what, why=why, hint=hint)
    return base


def load_module(
    model: str | Path | Source | nn.Module | Model, *, merge: bool = True, allow_code: bool = False, verify: bool = True
) -> nn.Module:
    """Return the network behind MODEL in eval mode, ready to run.

    Args:
        model: an artifact, or any other form of MODEL.
        merge: take the updates of a delta, or of Hugging Face peft's adapter, into the weights that they change; kept
            apart they share those.
        allow_code: let an artifact whose base is your own Python code import it.
        verify: compare the files of an artifact with the bytes that its manifest promises, each once.
    """
    if isinstance(model, nn.Module | Model):
        return load(model).module
    source = model if isinstance(model, Source) else Source(str(model))
    source = replace(source, allow_code=source.allow_code or allow_code, verify=source.verify and verify)
    if not merge and (located := locate(source)).kind == "peft":  # steps take it merged: no manifest names its updates
        assert located.folder is not None
        return from_peft.from_folder(source, located.folder, _whole).module.eval()
    return load(source, merge=merge).module


def with_adapter(network: nn.Module, folder: str | Path, *, allow_code: bool = False) -> nn.Module:
    """Return the network of a delta that shares every tensor which the task left alone with ``network``, its base.

    Several deltas on one base take its memory once.

    Args:
        network: the base, as `peftc.load` gives it, on any device.
        folder: the delta.
        allow_code: import the Python code of yours that the delta names as its base.

    Raises:
        ArtifactError: the folder holds no delta, or ``network`` is not its base.
    """
    tuned = load(Source(str(folder), allow_code=allow_code), merge=False)
    record = tuned.manifest
    if record is None or not record.delta:
        raise ArtifactError(f"`{folder}` is no delta", hint="load it by itself: `peftc.load`")
    assert tuned.folder is not None
    own, place = artifact.tensor_table(tuned.folder, record), place_of(network)
    theirs, mine = surgery.tensors_of(network), surgery.tensors_of(tuned.module)
    for names in surgery.stored_names(tuned.module).values():
        there = record.delta["tensors"].get(names[0], names[0])
        one, other = mine[names[0]], theirs.get(there)
        if names[0] in own:
            surgery.assign(tuned.module, names, one.to(place))
        elif other is None or one.shape != other.shape or not torch.equal(one, other.to(one.device, one.dtype)):
            why = f"its `{there}` {'has other values' if there in theirs else 'is not there'}"
            hint = f"load the base first: `peftc.load({record.delta['source']['spec']!r})`"
            raise ArtifactError(f"the network is not the base of `{folder}`", why=why, hint=hint)
        else:
            surgery.assign(tuned.module, names, other)
    return tuned.module


def _overridden(preprocess: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key in changes:
        if key not in PREPROCESS:
            raise UsageError(f"unknown setting `{key}` for `--preprocess`", why=f"it takes {', '.join(PREPROCESS)}")
    merged = {**preprocess, **changes}
    channels = (merged.get("input_size") or [3])[0]
    try:
        for key in ("mean", "std"):
            if isinstance(merged.get(key), int | float):
                merged[key] = [float(merged[key])] * channels
            elif key in merged:
                merged[key] = [float(value) for value in merged[key]]
        if "input_size" in merged:
            merged["input_size"] = [int(side) for side in merged["input_size"]]
    except (TypeError, ValueError):
        why = "it takes numbers, as `mean=0.5`"
        raise UsageError(f"`{key}` of `--preprocess` is {merged[key]!r}", why=why) from None
    return merged


def _artifact(source: Source, located: Located, with_weights: bool, merge: bool) -> Model:
    folder = located.folder
    assert folder is not None
    record = manifest.read(folder)
    if record.holds_statistics:
        why = "`peftc calibrate` wrote it"
        hint = f"decompose the model with it: `peftc decompose MODEL --statistics {folder} --ratio 0.5 -o small`"
        raise ArtifactError(f"`{folder}` holds statistics of a model, not a model", why=why, hint=hint)
    if record.base["library"] == "python" and not source.allow_code:
        why = f"its base network is `python:{record.base['architecture']}`, which peftc would have to import and run"
        hint = "add `--allow-code` (in Python: `peftc.load(path, allow_code=True)`) if you trust that code"
        raise ArtifactError(f"`{folder}` needs code of yours to be loaded", why=why, hint=hint)
    table = artifact.tensor_table(folder, record)
    if source.verify:
        verified.check(folder, record.files)
    loaded = replace(
        build.from_record(record, folder, source),
        base=record.base,
        name=located.name.split("/")[-1] or folder.resolve().name,
        folder=folder,
        labels=record.labels,
        manifest=record,
        preprocess=_overridden(record.preprocess, source.preprocess),
        hub=(located.name, folder.name) if located.name else None,
    )
    surgery.skip(loaded.module, record.skipped)
    surgery.apply_edits(loaded.module, record.modules)
    adapting.rebuild(loaded.module, record.adapters)
    surgery.tie(loaded.module, record.tied)
    if with_weights:
        _fill(loaded, record, table, source)
    if record.ordered:
        loaded.notes.append(
            f"`{folder}` computes what its base computes; the factors beside its weights are for `peftc truncate`"
        )
    loaded.module.eval()
    return without_updates(loaded)[0] if merge else loaded


def _fill(model: Model, record: Manifest, table: Mapping[str, TensorInfo], source: Source) -> None:
    """Map the tensors of an artifact into its network; of a delta those that it lacks come from the model beneath."""
    assert model.folder is not None
    own, infos = weights.from_infos(str(model.folder), table), dict(table)
    if record.delta:
        beneath, theirs = delta.beneath(record, model.folder, source, _whole)
        for name in surgery.stored_names(model.module):
            there = record.delta["tensors"].get(name, name)
            if name not in table and there in beneath:
                own.loaded[name] = beneath[there]
                infos |= {name: theirs[there]} if there in theirs else {}
    found = surgery.fill(model.module, own.names(), own.read, where=own.where)
    model.infos = {name: infos[there] for name, there in found.items() if there in infos}
    model.files = own.files


def without_updates(model: Model, *, same_rank: bool = False) -> tuple[Model, dict[str, TakenIn]]:
    """Take a model's updates into the weights that they change, in place; return it and what that did, by module."""
    changed = take_in(model.module, same_rank=same_rank)
    gone = tuple(f"{name}." for name in changed)
    infos = {name: info for name, info in model.infos.items() if not name.startswith(gone)}
    record = model.manifest
    if record is not None:
        left = {name: entry for name, entry in record.adapters.items() if name not in changed}
        ranks: dict[str, Any] = {name: {"rank": each.rank} for name, each in changed.items()}
        modules = {name: {**entry, **ranks.get(name, {})} for name, entry in record.modules.items()}
        record = replace(record, adapters=left, modules=modules, delta={})
    return replace(model, infos=infos, manifest=record), changed


def refuse_non_finite(model: Model) -> None:
    """Refuse a model that holds NaN or infinite numbers (WeightError: naming every such tensor)."""
    bad = [
        name
        for name, tensor in surgery.tensors_of(model.module).items()
        if tensor.is_floating_point()
        and not all(bool(torch.isfinite(block).all()) for block in tensor.detach().flatten().split(1 << 22))
    ]
    if bad:
        why = "training diverged, or the file is damaged"
        hint = "use an earlier checkpoint; peftc does not repair weights"
        raise WeightError(f"`{model.name}` holds NaN or infinite numbers in {named(bad, 4)}", why=why, hint=hint)
