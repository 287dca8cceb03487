"""Networks of timm: by architecture, or from a folder with timm's ``config.json``."""

import sys
import warnings
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftc.errors import SourceError, UsageError, named, reason_of
from peftc.models import hub
from peftc.models.model import PREPROCESS, Model
from peftc.models.skeleton import UNBUILDABLE, on_meta, stored_in
from peftc.models.weights import Weights
from peftc.nn import surgery
from peftc.store import documents, quantization
from peftc.store.manifest import Manifest
from peftc.store.source import Located, Source, read_json


def from_architecture(source: Source, located: Located, with_weights: bool) -> Model:
    """Return a timm architecture, with the hub's weights where the user named none (SourceError: there are none)."""
    import timm

    name = located.name.removeprefix("timm/")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise SourceError(f"timm has no architecture `{name}`", hint=meant(name, "timm:"))
    cfg = timm.models.get_pretrained_cfg(name)
    if located.weights is None and with_weights:
        if cfg is None or not cfg.hf_hub_id:
            hint = meant(name, "timm:") or "name a file: `--weights FILE`"
            raise SourceError(f"timm has no trained weights for `{name}`", hint=hint)
        folder = hub.snapshot(Located("timm", cfg.hf_hub_id), source, with_weights)
        return replace(from_folder(source, folder), name=name)
    config = {"architecture": architecture, "pretrained_cfg": cfg.to_dict() if cfg else {}}
    return described(*network(config | {"model_args": dict(source.arch_set)}), source, name)


def meant(name: str, prefix: str) -> str | None:
    """Return a hint for a name of timm that is nearly one of its architectures, or of the weights of one."""
    import difflib

    import timm

    known = timm.list_pretrained() if "." in name else timm.list_models()
    near = [] if name in known else difflib.get_close_matches(name, known, 1, 0.8)
    return f"did you mean `{prefix}{near[0]}`?" if near else None


# names of parameters that hold something for each patch, or for each distance between two of them
OF_PLACES = ("pos_embed", "pos_embed_win", "relative_position_bias_table", "rel_pos_h", "rel_pos_w")
SETTINGS: dict[str, Any] = {  # what peftc reads of a pretrained_cfg, in shape
    "input_size?": ([int], None),
    "mean?": ([float], float, None),
    "std?": ([float], float, None),
    "crop_pct?": (float, None),
    "crop_mode?": (str, None),
    "interpolation?": (str, None),
    "num_classes?": (int, None),
    "fixed_input_size?": (bool, None),
    "classifier?": (str, [str], None),
    "label_names?": ([str], None),
    "hf_hub_id?": (str, None),
    "license?": (str, None),
}
CONFIG = {
    "architecture": str,
    "num_classes?": (int, None),
    "model_args?": (dict, None),
    "label_names?": ([str], None),
    "pretrained_cfg?": SETTINGS,
}


def read_config(folder: Path, *, ours: bool = False) -> dict[str, Any]:
    """Return timm's ``config.json`` (SourceError: it is none, or has settings of another timm and is not ``ours``)."""
    path = folder / "config.json"
    config = read_json(path)
    # as timm wrote it before 0.9: all settings at the top
    if "pretrained_cfg" not in config and "input_size" in config and not ours:
        settings = {name: value for name, value in config.items() if name not in ("architecture", "num_features")}
        config = {"architecture": config["architecture"], "pretrained_cfg": settings}
    why = documents.misfit(config, CONFIG)
    if why is None and config["architecture"] == quantization.ARCHITECTURE:
        why = "it holds factors and no `peftc.json`: timm loads it after `import peftc.timm`"
        raise SourceError(f"`{path}` is not read", why=why)
    unknown = sorted((config.get("pretrained_cfg") or {}).keys() - _settings()) if why is None and not ours else []
    if why or unknown:
        why = why or f"timm {version('timm')} knows no setting `{unknown[0]}` of a `pretrained_cfg`"
        raise SourceError(f"`{path}` is no configuration of timm", why=why)
    return config


def _settings() -> set[str]:
    """Return the settings of a pretrained_cfg that this timm knows."""
    from timm.models import PretrainedCfg

    return {field.name for field in fields(PretrainedCfg)}


def from_folder(source: Source, folder: Path, record: Manifest | None = None) -> Model:
    """Return the network of a folder with timm's ``config.json``, of an artifact where its record is given."""
    config = read_config(folder, ours=record is not None)
    if record is None:
        config["model_args"] = {**(config.get("model_args") or {}), **source.arch_set}
    return replace(described(*network(config, folder, record), source, folder.name), folder=folder)


def network(
    config: dict[str, Any], folder: Path | None = None, record: Manifest | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that timm builds of a config, and how it was read (SourceError, UsageError: it cannot)."""
    import timm

    cfg = config.get("pretrained_cfg") or {}
    arguments = dict(config.get("model_args") or {})
    classes = config.get("num_classes", cfg.get("num_classes"))
    if classes is not None:
        arguments.setdefault("num_classes", classes)
    known = {name: value for name, value in cfg.items() if name in _settings()}
    settings = {"pretrained_cfg": known} if known else {}
    stored = None if folder is None else stored_in(folder, record)
    try:
        module = on_meta(
            lambda: timm.create_model(config["architecture"], pretrained=False, **settings, **arguments), stored, config
        )
    except TypeError as error:
        raise UsageError(f"timm's `{config['architecture']}` does not accept its arguments", why=str(error)) from error
    except UNBUILDABLE as error:
        raise SourceError(f"timm cannot build `{config['architecture']}`", why=reason_of(error)) from error
    return module, {**config, "num_classes": getattr(module, "num_classes", classes)}


def described(module: nn.Module, config: dict[str, Any], source: Source, name: str) -> Model:
    """Return a network of timm as a model, with the preprocessing and labels of its configuration."""
    from timm.data import resolve_data_config

    resolved = resolve_data_config({}, pretrained_cfg=config.get("pretrained_cfg") or {}, model=module)
    said = {key: resolved[key] for key in PREPROCESS if key in resolved}
    preprocess = {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if size is not None:
        preprocess["input_size"] = [preprocess["input_size"][0], *([size, size] if isinstance(size, int) else size)]
    record = {"library": "timm", "architecture": config["architecture"]}
    labels = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    labels = list(labels) if isinstance(labels, list | tuple) else None
    return Model(module, source, "timm", config, record, name, preprocess=preprocess, labels=labels)


def fill(model: Model, tensors: Weights) -> dict[str, str]:
    """Map weights into a network of timm; return stored name -> name in the file.

    What says where a patch lies is resampled where the network reads images of another size, as timm does on loading.
    """
    wanted, where = surgery.tensors_of(model.module), tensors.where
    sizes = {name: info.shape for name, info in tensors.infos.items()}
    sizes |= {name: tuple(tensor.shape) for name, tensor in tensors.loaded.items()}
    other = [name for name, each in wanted.items() if name in sizes and tuple(each.shape) != sizes[name]]
    of_places = [name for name in other if name.rpartition(".")[2] in OF_PLACES]
    fitted = _fitted(model.module, tensors) if of_places and other == of_places else {}
    changed = [name for name in of_places if name in fitted and fitted[name].shape == wanted[name].shape]
    for name in changed:
        tensors.loaded[name] = fitted[name].contiguous()
        tensors.infos.pop(name, None)
    if changed:
        side = "x".join(str(each) for each in model.preprocess.get("input_size", [])[1:])
        model.notes.append(
            f"weights: {named(changed, 2)} of `{where}` resampled for images of {side} pixels, as timm does"
        )
    return surgery.fill(model.module, tensors.names(), tensors.read, where=where)


def _fitted(network: nn.Module, tensors: Weights) -> dict[str, Tensor]:
    """Return the tensors as timm's own reader of checkpoints of this family gives them; empty where it has none."""
    family = sys.modules[type(network).__module__]
    reader = getattr(family, "checkpoint_filter_fn", None) or getattr(family, "_checkpoint_filter_fn", None)
    if reader is None:
        return {}
    found = {name: tensors.read(name) for name in tensors.names()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's on the speed of how timm interpolates
        fitted = reader(found, network)
    return {name: each for name, each in fitted.items() if isinstance(each, Tensor)}
