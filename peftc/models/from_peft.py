"""An adapter that Hugging Face peft wrote, on the model that it names."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc.errors import SourceError
from peftc.methods import registry
from peftc.models import heads, interchange
from peftc.models.interchange import Adapter
from peftc.models.model import Model
from peftc.nn import surgery
from peftc.nn.adapted import Adapted
from peftc.store import documents
from peftc.store.header import read_header
from peftc.store.source import ADAPTER, Source, read_json

TENSORS = "adapter_model.safetensors"


def from_folder(source: Source, folder: Path, load: Callable[[Source], Model]) -> Model:
    """Return the base of an adapter with its updates, not merged (SourceError: none is named, or it does not fit)."""
    config = read_json(folder / ADAPTER)
    if why := documents.misfit(config, {"base_model_name_or_path?": (str, None), "revision?": (str, None)}):
        raise SourceError(f"`{folder / ADAPTER}` is not as peft writes it", why=why)
    named = source.base or config.get("base_model_name_or_path")
    if not named:
        what = f"`{folder}` is an adapter that does not say of which model"
        hint = "name it: `--base MODEL`"
        raise SourceError(what, why=f"`base_model_name_or_path` in `{ADAPTER}` is empty", hint=hint)
    path = folder / TENSORS
    if not path.is_file():
        raise SourceError(f"`{folder}` lacks `{TENSORS}`", hint="save the adapter with `safe_serialization=True`")
    read_header(path)
    adapters, tensors = interchange.from_peft(config, load_file(path))
    revision = source.revision if source.base else config.get("revision") or source.revision
    base = load(replace(source, spec=str(named), base=None, revision=revision, from_file=source.base is None))
    whole = {name: tensor for name, tensor in tensors.items() if name.endswith(".base.weight")}
    own = {name: tensor for name, tensor in tensors.items() if ".update." not in name and name not in whole}
    base = _with_outputs(base, own)
    interchange.refuse_other_modules(config, adapters, own, [name for name, _ in base.module.named_modules()])
    for names in surgery.stored_names(base.module).values():
        owners = {name.rpartition(".")[0] for name in names}
        if len(names) > 1 and owners & adapters.keys() and "tie_word_embeddings" in base.config:
            # what is adapted is no longer tied: its update is its own, merging parts the weights
            base.config["tie_word_embeddings"] = base.module.config.tie_word_embeddings = False  # type: ignore[union-attr]
    for name, adapter in adapters.items():
        _place(base.module, name, adapter, folder)
    known = surgery.tensors_of(base.module)
    groups = {name: names for names in surgery.stored_names(base.module).values() for name in names}
    for name, tensor in tensors.items():
        if name not in known or known[name].shape != tensor.shape:
            there = list(known[name].shape) if name in known else "nothing of that name"
            what = f"the adapter in `{folder}` does not fit `{base.name}`"
            hint = "name the model that it was made for: `--base MODEL`"
            raise SourceError(what, why=f"its `{name}` has shape {list(tensor.shape)}, and there is {there}", hint=hint)
        if name not in whole or not torch.equal(known[name], tensor.to(known[name].dtype)):
            surgery.assign(base.module, groups[name], tensor)  # what is tied stays tied, as in peft
    base.module.requires_grad_(False)
    record = {**base.base, "source": {"spec": source.spec, **({"base": source.base} if source.base else {})}}
    infos = {name: info for name, info in base.infos.items() if name not in own and name not in whole}
    return replace(base, source=source, base=record, name=folder.resolve().name, infos=infos, files=[*base.files, path])


def _with_outputs(base: Model, own: dict[str, Tensor]) -> Model:
    """Give the base another head where the adapter brings one for other classes."""
    known = surgery.tensors_of(base.module)
    matrices = [tensor for name, tensor in own.items() if tensor.ndim == 2 and name.endswith("weight")]
    fits = all(name in known and known[name].shape == tensor.shape for name, tensor in own.items())
    if fits or len(matrices) != 1:
        return base
    with torch.random.fork_rng(devices=[]):
        return heads.with_head(base, [f"LABEL_{at}" for at in range(len(matrices[0]))]).model


def _place(network: nn.Module, name: str, adapter: Adapter, folder: Path) -> None:
    module: Any = network.get_submodule(name)
    function = registry.find("adapter", adapter.method, "peft_type")
    refused = interchange.why_not(module)
    if refused is None and adapter.window != tuple(getattr(module, "kernel_size", ())):
        refused = f"its factors are made for a window of {list(adapter.window)}"
    update = None if refused else function(module, rank=adapter.rank, alpha=adapter.alpha)
    if not isinstance(update, nn.Module):
        what = f"the adapter in `{folder}` adapts `{name}`, a {type(module).__name__}, as peftc does not"
        raise SourceError(what, why=refused or "its update is as large as its weight")
    surgery.replace(network, module, Adapted(module, update))
