"""Build the base network of a source, or of an artifact's record, with parameters on the meta device."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peftc.errors import SourceError, UsageError
from peftc.models import hub, weights
from peftc.nn import surgery
from peftc.source import Located, Source, read_json

if TYPE_CHECKING:
    from peftc.manifest import Manifest
    from peftc.models.weights import Weights


@dataclass
class Base:
    """A base network and where its weights are; ``weights`` is None when the network already holds them."""

    module: nn.Module
    library: str
    name: str
    record: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    weights: Weights | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build networks whose parameters take no memory, while buffers, which may be computed, stay real.

    A parameter that is already on the meta device is kept as the same object, so ties made by constructors survive.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build(source: Source, located: Located, with_weights: bool) -> Base:
    """Return the base network of anything but an artifact, unfilled."""
    if located.kind == "python":
        base = _python(located.name, dict(source.arch_set), empty=located.weights is not None or not with_weights)
        base.weights = weights.from_file(located.weights) if located.weights and with_weights else None
    elif located.kind == "timm-arch":
        base = _timm_arch(source, located, with_weights)
    else:
        folder = located.folder or hub.snapshot(located, source, with_weights)
        base = (_timm_folder if located.kind == "timm" else _transformers)(source, folder)
        if with_weights:
            base.weights = weights.from_file(located.weights) if located.weights else weights.from_folder(folder)
        base.name = folder.resolve().name if located.folder else located.name.split("/")[-1]
    base.record["source"] = _source_record(source, located)
    return base


def _source_record(source: Source, located: Located) -> dict[str, Any]:
    record = {
        "spec": source.spec,
        "arch": source.arch,
        "arch_set": dict(source.arch_set),
        "weights": str(source.weights) if source.weights else None,
        "revision": located.revision,
        "preprocess": dict(source.preprocess),
    }
    return {key: value for key, value in record.items() if value}


def from_record(record: Manifest, folder: Path, source: Source) -> Base:
    """Return the base network that an artifact's manifest describes, before its edits."""
    library, architecture = record.base["library"], record.base["architecture"]
    if library == "python":
        return _python(architecture, record.base.get("arguments", {}), empty=True)
    if library == "timm":
        return _timm(read_json(folder / "config.json"), folder.name, folder)
    return _transformers(source, folder)


def from_live(module: nn.Module) -> Base:
    """Return a live network as a base, with what is needed to build it again.

    Raises:
        SourceError: nothing tells how to build it again.
    """
    name = type(module).__name__.lower()
    if hasattr(module, "config") and hasattr(module, "save_pretrained"):
        config = json.loads(module.config.to_json_string(use_diff=False))
        config["architectures"] = [type(module).__name__]
        record = {"library": "transformers", "architecture": type(module).__name__}
        return Base(module, "transformers", name, record, config, labels=_id2label(config))
    cfg = dict(getattr(module, "pretrained_cfg", None) or {})
    if cfg.get("architecture"):
        classes = getattr(module, "num_classes", None)
        config = {"architecture": cfg["architecture"], "num_classes": classes, "pretrained_cfg": cfg}
        base = _timm_base(module, config, cfg["architecture"])
    else:
        factory = f"{type(module).__module__}:{type(module).__qualname__}"
        base = Base(module, "python", name, {"library": "python", "architecture": factory, "arguments": {}})
    return base


def _python(factory: str, arguments: dict[str, Any], *, empty: bool) -> Base:
    module_name, attribute = factory.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look in the working folder, `python -m` does
    try:
        made: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"cannot import `python:{factory}`",
            why=str(error),
            hint="run peftc in the folder that holds the module, or add it to PYTHONPATH",
        ) from error
    try:
        if empty:
            with parameters_on_meta():
                network = made(**arguments)
        else:
            network = made(**arguments)
    except TypeError as error:
        raise UsageError(
            f"`python:{factory}` does not accept its arguments",
            why=str(error),
            hint="pass them as `--arch-set key=value`",
        ) from error
    if not isinstance(network, nn.Module):
        raise SourceError(f"`python:{factory}` returned a {type(network).__name__}, not an nn.Module")
    record = {"library": "python", "architecture": factory, "arguments": arguments}
    return Base(
        network,
        "python",
        attribute.split(".")[-1],
        record,
        preprocess={"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    )


def _timm_arch(source: Source, located: Located, with_weights: bool) -> Base:
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
        base = _timm_folder(source, folder)
        base.weights, base.name = weights.from_folder(folder), name
        return base
    cfg = timm.models.get_pretrained_cfg(name)
    arguments = dict(source.arch_set)
    config = {
        "architecture": name.split(".")[0],
        "pretrained_cfg": cfg.to_dict() if cfg else {},
        "model_args": arguments,
    }
    base = _timm(config, name, None)
    base.weights = weights.from_file(located.weights) if located.weights and with_weights else None
    return base


def _timm_folder(source: Source, folder: Path) -> Base:
    config = read_json(folder / "config.json")
    config["model_args"] = {**config.get("model_args", {}), **source.arch_set}
    return _timm(config, folder.name, folder)


def _timm(config: dict[str, Any], name: str, folder: Path | None) -> Base:
    import timm

    cfg = config.get("pretrained_cfg") or {}
    arguments = dict(config.get("model_args") or {})
    classes = config.get("num_classes", cfg.get("num_classes"))
    if classes is not None:
        arguments.setdefault("num_classes", classes)
    try:
        with parameters_on_meta():
            module = timm.create_model(config["architecture"], pretrained=False, **arguments)
    except TypeError as error:
        raise UsageError(f"timm's `{config['architecture']}` does not accept its arguments", why=str(error)) from error
    except RuntimeError as error:
        raise SourceError(f"timm cannot build `{config['architecture']}`", why=str(error)) from error
    config = {**config, "num_classes": getattr(module, "num_classes", classes)}
    base = _timm_base(module, config, name)
    base.folder = folder
    return base


def _timm_base(module: nn.Module, config: dict[str, Any], name: str) -> Base:
    from timm.data import resolve_data_config

    resolved = resolve_data_config({}, pretrained_cfg=config.get("pretrained_cfg") or {})
    keep = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode")
    preprocess = {
        key: list(resolved[key]) if isinstance(resolved[key], tuple) else resolved[key]
        for key in keep
        if key in resolved
    }
    size = config.get("model_args", {}).get("img_size")
    if size is not None:
        preprocess["input_size"] = [preprocess["input_size"][0], *([size, size] if isinstance(size, int) else size)]
    record = {"library": "timm", "architecture": config["architecture"]}
    labels = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    labels = list(labels) if isinstance(labels, list | tuple) else None
    return Base(module, "timm", name, record, config, preprocess=preprocess, labels=labels)


def _transformers(source: Source, folder: Path) -> Base:
    import transformers

    config = read_json(folder / "config.json")
    config.pop("transformers_weights", None)  # the writer's lock against loading factors as a dense model
    names = config.get("architectures") or []
    cls: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    remote = cls is None
    if remote and not source.trust_remote_code:
        raise SourceError(
            f"transformers has no class `{names[0]}`, which `{folder}` asks for",
            why="the checkpoint brings code of its own, or needs another version of transformers",
            hint="add `--trust-remote-code` if you trust that code, or upgrade transformers",
        )
    try:
        made = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
        if hasattr(made, "transformers_weights"):
            del made.transformers_weights
        with parameters_on_meta():
            if remote or cls is transformers.AutoModel:
                module = transformers.AutoModel.from_config(made, trust_remote_code=source.trust_remote_code)
            else:
                module = cls(made)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"transformers cannot build the model of `{folder}`", why=str(error).splitlines()[0]
        ) from error
    module.tie_weights()
    record = {"library": "transformers", "architecture": type(module).__name__}
    preprocess = _processor(folder)
    return Base(
        module,
        "transformers",
        folder.resolve().name,
        record,
        config,
        folder,
        preprocess=preprocess,
        labels=_id2label(config),
    )


def _processor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    from PIL.Image import Resampling

    value = read_json(path)
    value = value.get("image_processor", value)
    size = value.get("crop_size") if value.get("do_center_crop") else value.get("size")
    size = value.get("size", 224) if size is None else size
    if isinstance(size, dict):
        side = size.get("shortest_edge", 224)
        size = (size.get("height", side), size.get("width", side))
    height, width = (size, size) if isinstance(size, int) else size
    resize = value.get("size", {})
    edge = resize.get("shortest_edge", resize.get("height")) if isinstance(resize, dict) else resize
    crop = height / edge if value.get("do_center_crop") and edge else 1.0
    return {
        "input_size": [3, height, width],
        "mean": list(value.get("image_mean") or [0.5] * 3),
        "std": list(value.get("image_std") or [0.5] * 3),
        "crop_pct": crop,
        "interpolation": Resampling(value.get("resample", 3)).name.lower(),
    }


def _id2label(config: dict[str, Any]) -> list[str] | None:
    table = config.get("id2label")
    if not isinstance(table, dict) or not table:
        return None
    names = [str(table[key]) for key in sorted(table, key=int)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def fill(base: Base) -> dict[str, str]:
    """Map the weights of ``base`` into its network; return stored name -> name in the file.

    transformers checkpoints may lack or carry the base model's prefix; where names still differ, transformers' own
    loader converts them, at the price of a copy in memory.
    """
    tensors = base.weights
    assert tensors is not None
    if base.library != "transformers":
        return surgery.fill(base.module, tensors.names(), tensors.read, where=tensors.where)
    renamed = _without_prefix(base.module, tensors.names())
    wanted = surgery.stored_names(base.module)
    if all(any(name in renamed for name in names) for names in wanted.values()):
        found = surgery.fill(
            base.module,
            renamed,
            lambda name: tensors.read(renamed[name]),
            where=tensors.where,
            ignore=_ignored(base.module),
        )
        return {first: renamed[name] for first, name in found.items()}
    return _by_transformers(base)


def _without_prefix(module: Any, names: list[str]) -> dict[str, str]:
    prefix = f"{module.base_model_prefix}." if getattr(module, "base_model_prefix", "") else ""
    wanted = set(module.state_dict())
    renamed = {}
    for name in names:
        choices = (name, prefix + name, name.removeprefix(prefix))
        renamed[next((choice for choice in choices if choice in wanted), name)] = name
    return renamed


def _ignored(module: Any) -> Any:
    patterns = [*(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or [])]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _by_transformers(base: Base) -> dict[str, str]:
    """Load with ``from_pretrained``, strictly; the tensors then live in memory."""
    from peftc.errors import WeightError

    assert base.weights is not None and base.folder is not None
    module, info = type(base.module).from_pretrained(base.folder, dtype="auto", output_loading_info=True)  # type: ignore[attr-defined]
    missing, mismatched = sorted(info["missing_keys"]), info["mismatched_keys"]
    if missing or mismatched:
        raise WeightError(
            f"the tensors of `{base.weights.where}` do not match `{type(module).__name__}`",
            why=f"{len(missing)} missing ({', '.join(missing[:3])}), {len(mismatched)} of another shape",
            hint="no gap is filled with random numbers: name the trained class in `architectures` of config.json",
        )
    base.module = module
    base.notes.append("tensor names were converted by transformers: the weights are held in memory, not mapped")
    return {}
