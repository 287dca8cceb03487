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
the base of an embedding         base_layer.weight                  its own; read, never written
===============================  =================================  ========================================

Reading works from a list of what is understood: a setting of a configuration that is not known to be without effect is
refused by its name, and the modules and ranks that it names have to be those of the tensors.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mode
from typing import Any

from peftc.errors import OutputError, SourceError
from peftc.store import documents

METHODS = ("lora", "rslora", "dora")
PREFIX = "base_model.model."
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is
TASK_TYPES = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
NAMED = (str, [str], None)  # module names, or a pattern of them
READ = {  # settings that are read here, in shape
    "peft_type": str,
    "r": int,
    "lora_alpha": float,
    "target_modules": (str, [str]),
    "bias?": (str, None),
    "rank_pattern?": ({str: int}, None),
    "alpha_pattern?": ({str: float}, None),
    "use_rslora?": (bool, None),
    "use_dora?": (bool, None),
    "init_lora_weights?": (bool, str, None),
    "exclude_modules?": NAMED,
    "layers_pattern?": NAMED,
    "layers_to_transform?": (int, [int], None),
    "modules_to_save?": ([str], None),
    "lora_dropout?": float,
    "base_model_name_or_path?": (str, None),
    "revision?": (str, None),
    "task_type?": (str, None),
}
SET_UP = (dict, None)
WITHOUT_EFFECT = {  # on what a trained adapter computes: how it began, on what it was trained, by which version
    "auto_mapping?": SET_UP,
    "peft_version?": (str, None),
    "inference_mode?": (bool, None),
    "fan_in_fan_out?": (bool, None),
    "loftq_config?": SET_UP,
    "eva_config?": SET_UP,
    "corda_config?": SET_UP,
    "lora_ga_config?": SET_UP,
    "megatron_core?": (str, None),
    "qalora_group_size?": (int, None),
    "runtime_config?": SET_UP,
    "ensure_weight_tying?": (bool, None),
}
OFF: tuple[Any, ...] = (None, False, {})  # of any other setting but these, which peft does not take so
NEVER_OFF = (("use_bdlora", False), ("self", None))
PATIENCE = 1.0  # seconds that a pattern may take on the names of all modules


@dataclass(frozen=True)
class Adapter:
    """How one module is adapted."""

    method: str  # of `METHODS`
    rank: int
    alpha: float
    dropout: float = 0.0
    form: str = "linear"  # or ``embedding``, ``channel``, ``transposed``, which is read as ``linear``
    window: tuple[int, ...] = ()  # of a convolution, the sizes of its kernel


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
    """Return peft's configuration and tensors (OutputError: its format has no place for something).

    Args:
        adapters: name of each adapted module -> how; none of them refused by `why_not`.
        tensors: of their updates, and of modules that train whole, by the names above.
        base: what peft is told that the adapter belongs to.
    """
    methods = {each.method for each in adapters.values()}
    if len(methods) != 1 or not methods <= set(METHODS):
        what = f"adapters of {', '.join(f'`{name}`' for name in sorted(methods)) or 'no method'}"
        raise _no_place(what, f"a file is of one method of {', '.join(METHODS)}")
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
    rank = mode(each.rank for each in adapters.values())
    alpha = mode(each.alpha for each in adapters.values())
    exact = {name: f"^{re.escape(name)}" for name in adapters}
    config = {
        "alpha_pattern": {exact[name]: _whole(each.alpha) for name, each in adapters.items() if each.alpha != alpha},
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
        "rank_pattern": {exact[name]: each.rank for name, each in adapters.items() if each.rank != rank},
        "target_modules": sorted(adapters),
        "task_type": None,
        "use_dora": method == "dora",
        "use_rslora": method == "rslora",
    }
    return config, made


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """Return how each module is adapted, and tensors by our names, of what peft's two files say (SourceError)."""
    method = _method(config)
    found: dict[str, Any] = {}
    factors: dict[str, dict[str, Any]] = {}  # module -> part -> its tensor as peft has it
    forms: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        module, lora, rest = name.partition(".lora_")
        if name == key or (lora and rest not in _PARTS):
            why = "it is no factor of LoRA or DoRA on one module"
            raise SourceError(f"`{key}` of the adapter is not read", why=why)
        if not lora:
            found[name] = tensor
            continue
        part, form = _PARTS[rest]
        if not tensor.is_floating_point() or tensor.ndim < (1 if part == "magnitude" else 2):
            why = f"it holds {tensor.dtype} of shape {list(tensor.shape)}"
            raise SourceError(f"`{key}` of the adapter is not read", why=why)
        factors.setdefault(module, {})[part] = tensor
        if part == "down":
            forms[module] = form
        if form == "embedding":
            tensor = tensor.T.contiguous()
        else:
            tensor = tensor.reshape(-1) if part == "magnitude" else tensor.reshape(tensor.shape[0], -1)
        found[f"{module}.update.{part}"] = tensor
    parts = ("up", "down", *(("magnitude",) if method == "dora" else ()))
    lacking = [f"{module}.{part}" for module, there in factors.items() for part in parts if part not in there]
    if lacking or not factors:
        what = f"the adapter lacks {', '.join(f'`{name}`' for name in lacking[:3]) or 'all factors'}"
        raise SourceError(what, why=f"each module that {method} adapts has {', '.join(parts)}")
    for module, there in factors.items():
        up, down = there["up"].shape, there["down"].shape
        if len(up) != len(down) or any(side != 1 for side in up[2:]):
            shapes = f"{list(up)} and {list(down)}"
            raise SourceError(f"the factors of `{module}` are of no one module", why=f"their shapes are {shapes}")
    adapters = {name: _adapter(config, method, name, forms[name], each["down"]) for name, each in factors.items()}
    for name in [name for name in found if name.endswith(".base_layer.weight")]:
        owner = name.removesuffix(".base_layer.weight")
        if owner not in adapters:
            raise SourceError(f"`{PREFIX}{name}` of the adapter is not read", why=f"it does not adapt `{owner}`")
        found[f"{owner}.base.weight"] = found.pop(name)
    return adapters, found


def _adapter(config: Mapping[str, Any], method: str, module: str, form: str, down: Any) -> Adapter:
    """Return how one module is adapted, from the configuration; its first factor has to be of that rank."""
    rank = down.shape[1] if form == "embedding" else down.shape[0]
    named = _matching(config.get("rank_pattern") or {}, module, config["r"])
    if rank != named:
        what = f"the adapter has factors of rank {rank} for `{module}`"
        raise SourceError(what, why=f"its configuration says {named}")
    form, window = ("channel" if down.ndim > 2 else form), tuple(down.shape[2:])
    alpha = _matching(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return Adapter(method, int(rank), float(alpha), float(config.get("lora_dropout", 0.0)), form, window)


def refuse_other_modules(
    config: Mapping[str, Any], adapters: Iterable[str], own: Iterable[str], names: Sequence[str]
) -> None:
    """Refuse an adapter whose configuration names others of a base's modules than its tensors are of (SourceError)."""
    there = set(adapters)
    if foreign := sorted(there - set(names)):
        hint = "name the model that it was made for: `--base MODEL`"
        raise SourceError(f"the adapter adapts `{foreign[0]}`, which the model does not have", hint=hint)
    meant = {name for name in names if _is_meant(config, name)}
    if without := sorted(meant - there):
        why = f"its `target_modules` name {len(meant)} modules of the base, and it has factors for {len(there)}"
        hint = "name the model that it was made for: `--base MODEL`"
        raise SourceError(f"the adapter holds no factors for `{without[0]}`", why=why, hint=hint)
    if others := sorted(there - meant):
        why = "its `target_modules`, as peft reads them, leave that module alone"
        raise SourceError(f"the adapter holds factors for `{others[0]}`", why=why)
    own = list(own)  # tensors of modules that train whole
    for name in (name for name in names if any(name.endswith(saved) for saved in config.get("modules_to_save") or [])):
        if not any(tensor.startswith(f"{name}.") for tensor in own):
            raise SourceError(f"the adapter lacks `{name}`", why="its `modules_to_save` name that module")


def _is_meant(config: Mapping[str, Any], name: str) -> bool:
    """Return whether peft adapts a module: the rules of its `target_modules` and what limits them."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if _names(excluded, name):
        return False
    if any(_match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.get("modules_to_save") or []):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or name in targets or not _names(targets, name) or layers in (None, []):
        return _names(targets, name)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = next((at for each in patterns if (at := _match(rf"(?:^|.*?\.){each}\.(?P<at>\d+)\.", name))), None)
    return found is not None and int(found["at"]) in ([layers] if isinstance(layers, int) else layers)


def _names(wanted: str | Sequence[str], name: str) -> bool:
    """Return whether a pattern is all of a module's name, or one of several names its end."""
    if isinstance(wanted, str):
        return bool(wanted) and _match(f"(?:{wanted})\\Z", name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


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


def _method(config: Mapping[str, Any]) -> str:
    if config.get("peft_type") == "LORA" and (why := documents.misfit(config, READ | WITHOUT_EFFECT)):
        raise SourceError("the configuration of the adapter is not as peft writes it", why=why)
    why, layers = None, config.get("layers_to_transform")
    known = {name.removesuffix("?") for name in (READ | WITHOUT_EFFECT)}
    on = {name for name, value in config.items() if value not in OFF or (name, value) in NEVER_OFF}
    others = [name for name in config if name in on - known]
    if config.get("peft_type") != "LORA":
        why = f"its peft_type is {config.get('peft_type')}"
    elif str(config["target_modules"]).lower() == "all-linear":
        why = "it names no modules but `all-linear`, which peft replaces by names when it trains"
    elif (config.get("bias") or "none") != "none":
        why = f"it trained biases (`bias` is {config['bias']}), which the file may hold in part"
    elif config.get("init_lora_weights", True) not in PLAIN_STARTS:
        why = f"its start, {config['init_lora_weights']}, changed the base model"
    elif config.get("task_type") not in TASK_TYPES:
        why = f"its task_type is {config['task_type']}"
    elif isinstance(config["target_modules"], str) and (config.get("layers_pattern") or layers is not None):
        why = "`layers_pattern` and `layers_to_transform` go with names of modules, and `target_modules` is a pattern"
    elif config.get("layers_pattern") and layers is None:
        why = "`layers_pattern` goes with `layers_to_transform`, which is not there"
    elif config.get("use_dora") and config.get("use_rslora"):
        why = "it is DoRA scaled as rsLoRA"
    elif others:
        why = f"it uses {', '.join(f'`{key}`' for key in others[:4])}, of which peftc does not know what it changes"
    if why:
        raise SourceError(f"the adapter is none of {', '.join(METHODS)} as they are here", why=why)
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as peft finds it."""
    return next((value for key, value in patterns.items() if _match(rf"(.*\.)?({key})$", module)), default)


def _match(pattern: str, name: str) -> Any:
    """Match a pattern from a file with a name, within `PATIENCE`: some patterns take longer than the universe."""
    if re.escape(pattern) == pattern:
        return re.match(pattern, name)
    import regex

    try:
        return regex.match(pattern, name, timeout=PATIENCE)
    except (regex.error, OverflowError, RecursionError) as error:
        raise SourceError(f"`{pattern}` in the configuration of the adapter is no pattern", why=str(error)) from None
    except TimeoutError:
        why = f"it is not done with the name `{name}` after {PATIENCE:g} seconds"
        raise SourceError(f"`{pattern}` in the configuration of the adapter is no pattern for names", why=why) from None


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _no_place(what: str, why: str) -> OutputError:
    hint = "export the whole model: `--format safetensors`"
    return OutputError(f"peft's format has no place for {what}", why=why, hint=hint)
