"""Networks of timm: by architecture, or from a folder with timm's ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from peftc.errors import SourceError, UsageError
from peftc.models import hub, weights
from peftc.models.skeleton import Base, on_meta
from peftc.source import Located, Source, read_json


def from_architecture(source: Source, located: Located, with_weights: bool) -> Base:
    """Return an architecture of timm's registry, with the weights that the user named or those of the hub.

    Raises:
        SourceError: timm has no such architecture, or no weights for it.
    """
    import timm

    name = located.name.removeprefix("timm/")
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:4]
        raise SourceError(
            f"timm has no architecture `{name}`", hint=f"did you mean {', '.join(near)}?" if near else None
        )
    if located.weights is None and with_weights:
        cfg = timm.models.get_pretrained_cfg(name)
        if cfg is None or not cfg.hf_hub_id:
            raise SourceError(f"timm has no trained weights for `{name}`", hint="name a file: `--weights FILE`")
        folder = hub.snapshot(Located("timm", cfg.hf_hub_id), source, with_weights)
        base = from_folder(source, folder)
        base.weights, base.name = weights.from_folder(folder), name
        return base
    cfg = timm.models.get_pretrained_cfg(name)
    arguments = dict(source.arch_set)
    config = {
        "architecture": name.split(".")[0],
        "pretrained_cfg": cfg.to_dict() if cfg else {},
        "model_args": arguments,
    }
    base = from_config(config, name, None)
    base.weights = weights.from_file(located.weights) if located.weights and with_weights else None
    return base


def from_folder(source: Source, folder: Path) -> Base:
    """Return the network of a folder with timm's ``config.json``."""
    config = read_json(folder / "config.json")
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise SourceError(f"`model_args` in `{folder / 'config.json'}` is not a map from argument to value")
    config["model_args"] = {**arguments, **source.arch_set}
    return from_config(config, folder.name, folder)


def from_config(config: dict[str, Any], name: str, folder: Path | None) -> Base:
    """Return the network that timm's configuration describes.

    Raises:
        SourceError, UsageError: timm cannot build it.
    """
    import timm

    if not isinstance(config["architecture"], str) or not isinstance(config.get("pretrained_cfg") or {}, dict):
        raise SourceError(f"the config.json of `{name}` is no timm configuration", why="its architecture is no name")

    cfg = config.get("pretrained_cfg") or {}
    arguments = dict(config.get("model_args") or {})
    classes = config.get("num_classes", cfg.get("num_classes"))
    if classes is not None:
        arguments.setdefault("num_classes", classes)
    try:
        module = on_meta(lambda: timm.create_model(config["architecture"], pretrained=False, **arguments))
    except TypeError as error:
        raise UsageError(f"timm's `{config['architecture']}` does not accept its arguments", why=str(error)) from error
    except (RuntimeError, ValueError, AssertionError, LookupError) as error:
        raise SourceError(f"timm cannot build `{config['architecture']}`", why=str(error)) from error
    config = {**config, "num_classes": getattr(module, "num_classes", classes)}
    base = describe(module, config, name)
    base.folder = folder
    return base


def describe(module: nn.Module, config: dict[str, Any], name: str) -> Base:
    """Return a timm network with its preprocessing and labels, from its configuration."""
    from timm.data import resolve_data_config

    resolved = resolve_data_config({}, pretrained_cfg=config.get("pretrained_cfg") or {}, model=module)
    keep = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode")
    preprocess = {
        key: list(resolved[key]) if isinstance(resolved[key], tuple) else resolved[key]
        for key in keep
        if key in resolved
    }
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if size is not None:
        preprocess["input_size"] = [preprocess["input_size"][0], *([size, size] if isinstance(size, int) else size)]
    record = {"library": "timm", "architecture": config["architecture"]}
    labels = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    labels = list(labels) if isinstance(labels, list | tuple) else None
    return Base(module, "timm", name, record, config, preprocess=preprocess, labels=labels)
