"""Adapters in the format of Hugging Face peft: what its `adapter_config.json` and `adapter_model.safetensors` say.

Both directions only rename and reshape; neither imports torch nor peft. Tensors are named as in the state of an adapted
network: ``NAME.update.up`` (out, rank), ``NAME.update.down`` (rank, in), for DoRA ``NAME.update.magnitude`` (out,), and
by their own names where a module trains whole, as a head. There they are

===============================  =================================  ========================================
here                             there                              shape there
===============================  =================================  ========================================
up, down of a linear module      lora_B.weight, lora_A.weight       (out, rank), (rank, in)
up, down of a convolution        the same                           (out, rank, 1 ...), (rank, in, kh ...)
up, down of an embedding         lora_embedding_A, lora_embedding_B  (rank, words), (width, rank)
magnitude                        lora_magnitude_vector              (out,); (1, out, 1 ...) of a convolution
a module that trains whole       its own name, `modules_to_save`    its own
===============================  =================================  ========================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftc.errors import OutputError, SourceError

METHODS = ("lora", "rslora", "dora")
PREFIX = "base_model.model."
# what changes the base or the product itself, so that its factors say something else than ours
OTHER_PRODUCTS = ("use_bdlora", "use_qalora", "alora_invocation_tokens", "arrow_config", "kasa_config", "lora_bias")
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


@dataclass(frozen=True)
class Adapter:
    """How one module is adapted.

    Attributes:
        method: one of `METHODS`.
        rank, alpha, dropout: its settings.
        form: ``linear`` (which stands for ``transposed`` too when read), ``transposed``, ``embedding`` or ``channel``.
        window: of a convolution, the sizes of its kernel.
    """

    method: str
    rank: int
    alpha: float
    dropout: float = 0.0
    form: str = "linear"
    window: tuple[int, ...] = ()


def why_not(module: Any) -> str | None:
    """Return why peft computes something else than we do on a module, or None."""
    if getattr(module, "groups", 1) > 1:
        return "peft's update of a grouped convolution reads all groups, which no weight of it can"
    if any(step != 1 for step in getattr(module, "dilation", ())):
        return "peft's update of a convolution has no dilation"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "peft's update of a convolution pads with zeros"
    if type(module).__name__.startswith("LowRank"):
        return "peft knows no factored module"
    return None


def to_peft(
    adapters: Mapping[str, Adapter], tensors: Mapping[str, Any], base: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return peft's configuration and tensors.

    Args:
        adapters: name of each adapted module -> how; none of them refused by `why_not`.
        tensors: of their updates, and of modules that train whole, by the names above.
        base: what peft is told that the adapter belongs to.

    Raises:
        OutputError: peft's format has no place for something.
    """
    methods = {each.method for each in adapters.values()}
    if len(methods) != 1 or not methods <= set(METHODS):
        raise _no_place(
            f"adapters of {', '.join(f'`{name}`' for name in sorted(methods)) or 'no method'}",
            f"a file is of one method of {', '.join(METHODS)}",
        )
    (method,) = methods
    made, saved = {}, set()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".update.")
        if not module:
            owner = name.rpartition(".")[0]
            if not owner:
                raise _no_place(f"`{name}`", "it saves modules, and this is a parameter of the network itself")
            saved.add(owner)
            made[PREFIX + name] = tensor
        elif module in adapters and part in ("up", "down", "magnitude"):
            key, there = _to(adapters[module], module, part, tensor)
            made[f"{PREFIX}{module}.{key}"] = there
        else:
            raise _no_place(f"`{name}`", "it is no part of an update that peft has")
    rank = _commonest(each.rank for each in adapters.values())
    alpha = _commonest(each.alpha for each in adapters.values())
    config = {
        "alpha_pattern": {_exactly(name): _whole(each.alpha) for name, each in adapters.items() if each.alpha != alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(each.form == "transposed" for each in adapters.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(alpha),
        "lora_dropout": max(each.dropout for each in adapters.values()),
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_exactly(name): each.rank for name, each in adapters.items() if each.rank != rank},
        "target_modules": sorted(adapters),
        "task_type": None,
        "use_dora": method == "dora",
        "use_rslora": method == "rslora",
    }
    return config, made


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """Return how each module is adapted, and the tensors by our names.

    Args:
        config: what `adapter_config.json` holds.
        tensors: what `adapter_model.safetensors` holds.

    Raises:
        SourceError: it is another method than `METHODS`, or holds something that this does not read.
    """
    method = _method(config)
    found: dict[str, Any] = {}
    adapters: dict[str, Adapter] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        module, lora, rest = name.partition(".lora_")
        if name == key or (lora and rest not in _PARTS):
            raise SourceError(
                f"`{key}` of the adapter is not read", why="it is no factor of LoRA or DoRA on one module"
            )
        if not lora:
            found[name] = tensor
            continue
        part, form = _PARTS[rest]
        found[f"{module}.update.{part}"] = _from(rest, tensor)
        if part == "down":
            rank = tensor.shape[1] if form == "embedding" else tensor.shape[0]
            form, window = ("channel" if tensor.ndim > 2 else form), tuple(tensor.shape[2:])
            alpha = _matching(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
            dropout = float(config.get("lora_dropout", 0.0))
            adapters[module] = Adapter(method, int(rank), float(alpha), dropout, form, window)
    parts = ("up", "down", *(("magnitude",) if method == "dora" else ()))
    modules = dict.fromkeys(name.rpartition(".update.")[0] for name in found if ".update." in name)
    lacking = [f"{module}.{part}" for module in modules for part in parts if f"{module}.update.{part}" not in found]
    if lacking or not adapters:
        raise SourceError(
            f"the adapter lacks {', '.join(f'`{name}`' for name in lacking[:3]) or 'all factors'}",
            why=f"each module that {method} adapts has {', '.join(parts)}",
        )
    return adapters, found


_PARTS = {
    "A.weight": ("down", "linear"),
    "B.weight": ("up", "linear"),
    "embedding_A": ("up", "embedding"),
    "embedding_B": ("down", "embedding"),
    "magnitude_vector": ("magnitude", ""),
    "magnitude_vector.weight": ("magnitude", ""),  # as peft 0.9 to 0.11 wrote it
}


def _to(adapter: Adapter, module: str, part: str, tensor: Any) -> tuple[str, Any]:
    if part != "magnitude" and adapter.rank != (rank := tensor.shape[0 if part == "down" else 1]):
        raise _no_place(f"`{module}` of rank {adapter.rank} with a `{part}` of {rank}", "peft knows no such layout")
    ones = [1 for _ in adapter.window]
    if part == "magnitude":
        return "lora_magnitude_vector", tensor.reshape(1, -1, *ones) if adapter.form == "channel" else tensor
    if adapter.form == "embedding":
        return f"lora_embedding_{'A' if part == 'up' else 'B'}", tensor.T.contiguous()
    if part == "up":
        return "lora_B.weight", tensor.reshape(*tensor.shape, *ones)
    return "lora_A.weight", tensor.reshape(adapter.rank, -1, *adapter.window) if ones else tensor


def _from(rest: str, tensor: Any) -> Any:
    if rest.startswith("embedding"):
        return tensor.T.contiguous()
    return tensor.reshape(-1) if rest.startswith("magnitude") else tensor.reshape(tensor.shape[0], -1)


def _method(config: Mapping[str, Any]) -> str:
    why = None
    other = [key for key in OTHER_PRODUCTS if config.get(key)]
    if config.get("peft_type") != "LORA":
        why = f"its peft_type is {config.get('peft_type')}"
    elif config.get("bias", "none") != "none":
        why = f"it trained biases (`bias` is {config['bias']}), which the file may hold in part"
    elif config.get("init_lora_weights", True) not in PLAIN_STARTS:
        why = f"its start, {config['init_lora_weights']}, changed the base model"
    elif config.get("use_dora") and config.get("use_rslora"):
        why = "it is DoRA scaled as rsLoRA"
    elif other:
        why = f"it uses {', '.join(f'`{key}`' for key in other)}"
    if why:
        raise SourceError(f"the adapter is none of {', '.join(METHODS)} as they are here", why=why)
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as peft finds it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _no_place(what: str, why: str) -> OutputError:
    hint = "export the whole model: `--format safetensors`"
    return OutputError(f"peft's format has no place for {what}", why=why, hint=hint)
