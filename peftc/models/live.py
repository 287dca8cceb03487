"""A network in memory as a model, and the arguments that build it again, which nobody may have kept.

What a network shows of its arguments, by attributes and shapes, is tried until what is built again is the same.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from peftc.errors import PeftcError, SourceError
from peftc.models import build, from_timm, from_transformers
from peftc.models.model import Model
from peftc.models.skeleton import on_meta
from peftc.nn import surgery
from peftc.store.source import Source

HINT = "write a function that builds it, and name that: `python:module:function` with `--weights FILE`"
IDLE = ("momentum", "p")  # attributes that change nothing of what a network computes in eval mode
SHOWN: dict[str, Callable[[Any], Any]] = {  # arguments of timm's constructors -> where a network shows them
    "in_chans": lambda net: next(each for each in net.modules() if isinstance(each, nn.Conv2d)).in_channels,
    "img_size": lambda net: net.patch_embed.img_size,
    "patch_size": lambda net: net.patch_embed.patch_size,
    "depth": lambda net: len(net.blocks),
    "depths": lambda net: [len(stage.blocks) for stage in getattr(net, "stages", None) or net.layers],
    "layers": lambda net: [len(getattr(net, f"layer{stage}")) for stage in (1, 2, 3, 4)],
    "dims": lambda net: [stage.blocks[0].conv_dw.out_channels for stage in net.stages],
    "num_heads": lambda net: net.blocks[0].attn.num_heads,
    "mlp_ratio": lambda net: net.blocks[0].mlp.fc1.out_features / net.blocks[0].mlp.fc1.in_features,
    "qkv_bias": lambda net: net.blocks[0].attn.qkv.bias is not None,
    "init_values": lambda net: (
        getattr(net.blocks[0].ls1, "init_values", 1e-5) if hasattr(net.blocks[0].ls1, "gamma") else None
    ),
    "window_size": lambda net: net.layers[0].blocks[0].attn.window_size,
    "class_token": lambda net: net.cls_token is not None,
    "reg_tokens": lambda net: net.num_reg_tokens,
    "global_pool": lambda net: getattr(net.global_pool, "pool_type", net.global_pool),
    "drop_path_rate": lambda net: net.blocks[-1].drop_path1.drop_prob,
}


def from_live(module: Any) -> Model:
    """Return a live network as a model, with what may serve to build it again (see `refuse_unbuildable`)."""
    name, source = type(module).__name__.lower(), Source(f"a live {type(module).__name__}")
    if hasattr(module, "config") and hasattr(module, "save_pretrained"):
        config = json.loads(module.config.to_json_string(use_diff=False))
        config["architectures"] = [type(module).__name__]
        return from_transformers.described(module, config, source, name)
    cfg = dict(getattr(module, "pretrained_cfg", None) or {})
    if cfg.get("architecture"):
        classes = getattr(module, "num_classes", None)
        config = {"architecture": cfg["architecture"], "num_classes": classes, "pretrained_cfg": cfg}
        made = from_timm.described(module, config, source, cfg["architecture"])
        return replace(made, preprocess=_of_channels(made.preprocess, shown(module).get("in_chans")))
    factory = f"{type(module).__module__}:{type(module).__qualname__}"
    record = {"library": "python", "architecture": factory, "arguments": {}}
    return Model(module, source, "python", {}, record, name)


def _of_channels(preprocess: dict[str, Any], channels: int | None) -> dict[str, Any]:
    """Return how images become inputs of a network that reads other channels than its configuration says."""
    size = preprocess.get("input_size")
    if not size or channels in (None, size[0]):
        return preprocess
    means = {key: [sum(preprocess[key]) / len(preprocess[key])] * channels for key in ("mean", "std")}  # type: ignore[operator]
    return {**preprocess, **means, "input_size": [channels, *size[1:]]}


def refuse_unbuildable(model: Model) -> None:
    """Refuse a live network that nothing builds again (SourceError); keep the arguments that do in its record."""
    why = _homeless(model)
    if why is None:
        try:
            made: nn.Module | None = _again(model, {})
        except PeftcError as error:  # its constructor wants arguments
            made, why = None, error.why or error.what
        gaps = [] if made is None else differences(made, model.module)
        if made is not None and not gaps:
            return
        if model.library != "transformers":
            found, gaps = _arguments(model, made, gaps)
            if found and not gaps:
                _keep(model, found)
                return
        if gaps:
            why = f"{gaps[0]}: it was made with arguments, or changed afterwards, and does not show how"
    raise SourceError(f"a live `{type(model.module).__name__}` cannot be stored so that it reloads", why=why, hint=HINT)


def _homeless(model: Model) -> str | None:
    """Return why no later program finds the class of a network; None where it does."""
    kind = type(model.module)
    if model.library == "transformers":
        import transformers

        known = getattr(transformers, kind.__name__, None) is kind
        return None if known else f"its class is none of transformers, but of `{kind.__module__}`"
    if model.library == "python" and model.architecture.startswith("__main__:"):
        return "its class is written in this program or notebook itself, where no other program finds it"
    return None


def _again(model: Model, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network again with more arguments, without its weights (PeftcError: it cannot be)."""
    if model.library == "timm":
        known = model.config.get("model_args") or {}
        return from_timm.network({**model.config, "model_args": {**known, **arguments}})[0]
    if model.library == "transformers":
        made: Any = type(model.module)
        return on_meta(lambda: made(model.module.config))
    known = model.base.get("arguments") or {}
    return build.from_python(model.architecture, {**known, **arguments}, model.source, empty=True).module


def _keep(model: Model, arguments: dict[str, Any]) -> None:
    place, key = (model.config, "model_args") if model.library == "timm" else (model.base, "arguments")
    place[key] = {**(place.get(key) or {}), **arguments}
    told = ", ".join(f"{name}={value}" for name, value in arguments.items())
    model.notes.append(f"the live network is built again with {told}, as its parts show")


def _arguments(model: Model, made: nn.Module | None, gaps: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments that build what comes nearest to a network, and how that differs.

    Args:
        model: a live network.
        made: what no arguments build; None where they build nothing.
        gaps: how that differs.
    """
    usual = {} if made is None else shown(made)
    wanted = {name: value for name, value in shown(model.module).items() if name not in usual or usual[name] != value}
    with suppress(PeftcError):  # all at once, and else one by one, as some serve only after others
        if wanted and not (left := differences(_again(model, wanted), model.module)):
            return wanted, left
    taken: dict[str, Any] = {}
    for name, value in [*wanted.items(), *wanted.items()] if made is not None else []:
        with suppress(PeftcError):
            left = gaps if name in taken else differences(_again(model, taken | {name: value}), model.module)
            if len(left) < len(gaps):
                taken, gaps = taken | {name: value}, left
    return taken, gaps


def shown(module: nn.Module) -> dict[str, Any]:
    """Return the arguments of a network's constructor that it shows, as JSON has them."""
    found: dict[str, Any] = {}
    names = inspect.signature(type(module).__init__).parameters
    for name in names:
        if name in SHOWN and hasattr(module, "pretrained_cfg"):
            try:
                value = SHOWN[name](module)
            except (AttributeError, LookupError, TypeError, StopIteration):
                continue
        elif (name in ("self", "num_classes") and hasattr(module, "pretrained_cfg")) or not hasattr(module, name):
            continue
        else:
            value = getattr(module, name)
        if isinstance(value, tuple | list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        value = list(value) if isinstance(value, tuple) else value
        if _is_plain(value):
            found[name] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def differences(made: nn.Module, module: nn.Module) -> list[str]:
    """Say where a network that was built again has other tensors, or other numbers, than one that is there."""
    new, old = ({n: tuple(each.shape) for n, each in surgery.tensors_of(each).items()} for each in (made, module))
    gaps = [
        f"`{name}` has shape {_shape(old.get(name))}, and {_shape(new.get(name))} when it is built again"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    others = dict(made.named_modules())
    for name, each in module.named_modules():
        theirs, ours = _counted(others[name]) if name in others else {}, _counted(each)
        gaps += [
            f"`{name}.{key}`".replace("`.", "`") + f" is {ours[key]}, and {theirs[key]} when it is built again"
            for key in ours
            if key in theirs and ours[key] != theirs[key]
        ]
    return gaps


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) or "of one number"


def _counted(module: nn.Module) -> dict[str, Any]:
    """Return the numbers that a module computes with, as its strides and heads; of a class of one's own its arguments.

    Others may count there, as a network that counts its steps. Those of transformers follow from its config.
    """
    home = type(module).__module__.split(".")[0]
    own = vars(module).keys() if home in ("torch", "timm") else inspect.signature(type(module).__init__).parameters
    return {
        key: value
        for key, value in vars(module).items()
        if home != "transformers" and key in own and key not in IDLE and "drop" not in key and _is_count(value)
    }


def _is_count(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_count, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
