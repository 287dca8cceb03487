"""A new head: outputs for other classes than those that a model was trained for, or for a model that had none."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peftc.errors import PeftcError, SourceError
from peftc.models import from_timm, padding, targets
from peftc.models.model import Model
from peftc.models.skeleton import UNBUILDABLE, on_meta
from peftc.nn import surgery

SPREAD = 0.02  # standard deviation of new weights, as transformers' classes draw them


@dataclass(frozen=True)
class Headed:
    """A model with a new head."""

    model: Model  # with the classes as its labels; it shares all other tensors with the one that it was made from
    new: list[str]  # names of its new tensors
    renamed: dict[str, str]  # name here -> name before, of tensors that are called otherwise now


def with_head(model: Model, classes: Sequence[str]) -> Headed:
    """Return a model that tells ``classes`` apart, its head drawn from torch's random state (SourceError: none)."""
    if model.library == "timm":
        arguments = {key: each for key, each in (model.config.get("model_args") or {}).items() if key != "num_classes"}
        changed = {"num_classes": len(classes), "label_names": list(classes), "model_args": arguments}
        network, _ = from_timm.network(copy.deepcopy(model.config | changed))
        empty = replace(model, module=network, config=model.config | changed, labels=list(classes))
        return _filled(model, empty, "")
    if model.library == "transformers":
        return _filled(model, *_of_transformers(model, classes))
    why = "peftc does not know which of the modules of your own class is the head"
    hint = "let the factory build it with as many outputs: `--arch-set`"
    raise SourceError(f"`{model.name}` cannot be given a head for {len(classes)} classes", why=why, hint=hint)


def _of_transformers(model: Model, classes: Sequence[str]) -> tuple[Model, str]:
    """Return the empty network of the class that tells classes apart, and the prefix that its body's names gain."""
    import transformers
    from transformers.models.auto import modeling_auto

    tables = {
        "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    architecture = tables.get(model.kind, {}).get(model.config.get("model_type"))
    if architecture is None:
        why = f"transformers has no class for that with a `{model.architecture}`"
        raise SourceError(f"`{model.name}` cannot be given a head for {len(classes)} classes", why=why)
    cls: Any = getattr(transformers, architecture)
    before: Any = model.module.config
    config = {
        **model.config,
        "architectures": [architecture],
        "problem_type": "single_label_classification",
        "id2label": {str(at): name for at, name in enumerate(classes)},
        "label2id": {name: at for at, name in enumerate(classes)},
    }
    config.pop("num_labels", None)
    try:
        made = type(before).from_dict(copy.deepcopy(config))
        made._attn_implementation = before._attn_implementation
        network: Any = on_meta(lambda: cls(made))
    except UNBUILDABLE as error:
        raise SourceError(f"transformers cannot build `{architecture}` for `{model.name}`", why=str(error)) from error
    network.tie_weights()
    notes = list(model.notes)
    if padding.reads_last_token(network) and padding.padding_id(network) is None:
        found = padding.id_to_write(model)
        config["pad_token_id"] = network.config.get_text_config().pad_token_id = found
        notes.append(f"`config.json` names token {found} as padding: transformers needs one to classify several texts")
    prefix = f"{cls.base_model_prefix}."
    has_prefix = any(name.startswith(prefix) for name in surgery.tensors_of(model.module))
    base = {**model.base, "architecture": architecture}
    headed = replace(model, module=network, config=config, labels=list(classes), base=base, notes=notes)
    return headed, "" if has_prefix else prefix


def _filled(before: Model, empty: Model, prefix: str) -> Headed:
    """Give the network with a new head every tensor that the old one has for it, and draw the others."""
    record = before.manifest
    if record is not None:
        modules = {prefix + name: dict(entry) for name, entry in record.modules.items()}
        for entry in modules.values():
            entry.update({key: prefix + entry[key] for key in ("shares",) if key in entry})
        layers = [prefix + name for name in record.kept_layers]
        skipped = {prefix + name: lengths for name, lengths in record.skipped.items()}
        record = replace(record, modules=modules, kept_layers=layers, skipped=skipped)
        surgery.skip(empty.module, skipped)
        surgery.apply_edits(empty.module, modules)
    old, named = surgery.tensors_of(before.module), surgery.tensors_of(empty.module)
    outputs = targets.heads(empty, {name: each for name, each in empty.module.named_modules() if each._parameters})
    there = {
        name: name.removeprefix(prefix) for name in named if not any(name.startswith(f"{head}.") for head in outputs)
    }
    kept = {name: was for name, was in there.items() if was in old and old[was].shape == named[name].shape}
    new = [name for name in named if name not in kept]
    try:
        found = {name: old[kept[name]] if name in kept else _first_values(name, named[name], before) for name in named}
        surgery.fill(empty.module, named, found.__getitem__, where=before.name)
    except PeftcError as error:
        raise SourceError(f"`{before.name}` cannot be given another head", why=error.why or error.what) from error
    infos = {name: before.infos[was] for name, was in kept.items() if was in before.infos}
    model = replace(empty, module=empty.module.eval(), manifest=record, infos=infos)
    return Headed(model, new, {name: was for name, was in kept.items() if name != was})


def _first_values(name: str, shape: torch.Tensor, model: Model) -> torch.Tensor:
    """Draw a new tensor: matrices small random numbers, biases 0, scales of norms 1."""
    value = torch.empty(shape.shape, dtype=surgery.uniform_dtype(model.module) or torch.float32)
    if value.ndim >= 2:
        return nn.init.normal_(value, std=SPREAD)
    return value.fill_(1.0 if name.endswith("weight") else 0.0)
