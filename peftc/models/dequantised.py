"""Weights that a transformers folder stores quantised, as the plain ones that its modules compute with.

A weight is dequantised when it is read, in float32, and kept in the dtype that the config names. What it is made of
lies beside it, by the name of its module ``X``:

======================  =======================================================================
``fp8``                 ``X.weight`` in 8-bit floats, ``X.weight_scale_inv`` for blocks of it
``fbgemm_fp8``          the same with ``X.weight_scale`` for rows
``bitsandbytes``        8 bits: ``X.weight``, ``X.SCB`` for rows; 4 bits: two entries a byte, each
                        a place in a code, scaled by blocks, whose scales may be places as well
``gptq``, ``awq``       int32 that hold several entries, scales and zeros for groups of inputs
``compressed-tensors``  ``X.weight`` in 8 bits or ``X.weight_packed``, and ``X.weight_scale``
======================  =======================================================================
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftc.errors import WeightError
from peftc.models.model import Model
from peftc.models.weights import Weights
from peftc.store import documents

Parts = Mapping[str, Tensor]  # what a weight is made of, by the end of its name
Told = Mapping[str, Any]  # `quantization_config`


def _spread(scale: Tensor, weight: Tensor, block: list[int] | None = None) -> Tensor:
    """Return for each entry of a weight (out, in) its scale, of one for all, for rows, or for blocks.

    Args:
        block: rows and columns of one; where None they divide the weight evenly.
    """
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    even = [-(-side // number) for side, number in zip(weight.shape, scale.shape, strict=True)]
    sides = even if block is None or scale.shape == (1, 1) else block
    if [-(-side // each) for side, each in zip(weight.shape, sides, strict=True)] != list(scale.shape):
        raise ValueError(f"scales {list(scale.shape)} do not divide a weight {list(weight.shape)} into blocks {sides}")
    rows, columns = (torch.arange(side) // each for side, each in zip(weight.shape, sides, strict=True))
    return scale.float()[rows][:, columns]


def _unpacked(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Return what int32 hold, lowest bits first, along ``axis``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    entries = (packed.movedim(axis, -1)[..., None] >> shifts) & (2**bits - 1)
    return entries.flatten(-2).movedim(-1, axis).float()


def _fp8(parts: Parts, told: Told) -> Tensor:
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    if scale.dtype == torch.uint8:  # exponents of two
        scale = (scale.float() - 127).exp2()
    return parts["weight"].float() * _spread(scale, parts["weight"], told.get("weight_block_size"))


def _bitsandbytes(parts: Parts, told: Told) -> Tensor:
    if "SCB" in parts:
        return parts["weight"].float() * _spread(parts["SCB"], parts["weight"]) / 127
    (packed_state,) = (each for name, each in parts.items() if name.startswith("weight.quant_state."))
    state = json.loads(bytes(packed_state.tolist()))
    scale = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        inner = parts["weight.nested_absmax"][torch.arange(len(scale)) // state["nested_blocksize"]]
        scale = parts["weight.nested_quant_map"][scale.long()] * inner + state["nested_offset"]
    packed = parts["weight"].flatten().view(torch.uint8)
    places = torch.stack((packed >> 4, packed & 15), -1).flatten()[: torch.Size(state["shape"]).numel()].long()
    entries = parts["weight.quant_map"][places] * scale[torch.arange(len(places)) // state["blocksize"]]
    return entries.reshape(state["shape"])


def _gptq(parts: Parts, told: Told) -> Tensor:
    scales = parts["scales"].float()  # (groups, out)
    entries = _unpacked(parts["qweight"], told["bits"], 0)  # (in, out)
    zeros = _unpacked(parts["qzeros"], told["bits"], 1)
    zeros += 0 if told.get("checkpoint_format") == "gptq_v2" else 1  # which the first version takes off
    even = torch.arange(len(entries)) // -(-len(entries) // len(scales))
    group = parts["g_idx"].long() if "g_idx" in parts else even
    return ((entries - zeros[group]) * scales[group]).T


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each four bits of an int32 are of


def _awq(parts: Parts, told: Told) -> Tensor:
    def columns(packed: Tensor) -> Tensor:
        entries = _unpacked(packed, 4, 1).unflatten(1, (-1, 8))
        ordered = torch.empty_like(entries)
        ordered[..., AWQ_ORDER] = entries
        return ordered.flatten(1)

    entries, zeros, scales = columns(parts["qweight"]), columns(parts["qzeros"]), parts["scales"].float()
    group = torch.arange(len(entries)) // -(-len(entries) // len(scales))
    return ((entries - zeros[group]) * scales[group]).T


def _compressed(parts: Parts, told: Told) -> Tensor:
    if "weight_packed" in parts:
        (group,) = _groups(told)
        bits = group["weights"]["num_bits"]
        out, in_ = parts["weight_shape"].tolist()
        weight = (_unpacked(parts["weight_packed"], bits, 1)[:, :in_] - 2 ** (bits - 1)).reshape(out, in_)
    else:
        weight = parts["weight"].float()
    if "weight_zero_point" in parts:
        weight = weight - _spread(parts["weight_zero_point"], weight)
    return weight * _spread(parts["weight_scale"], weight)


NESTED = "absmax quant_map nested_absmax nested_quant_map quant_state.bitsandbytes__nf4 quant_state.bitsandbytes__fp4"
# method -> how a weight is made, how the names of what it is made of end; those of the first kind are there for each
READ: dict[str, tuple[Callable[[Parts, Told], Tensor], list[str]]] = {
    "fp8": (_fp8, ["weight_scale_inv"]),
    "fbgemm_fp8": (_fp8, ["weight_scale"]),
    "bitsandbytes": (
        _bitsandbytes,
        ["SCB", "weight_format", *(f"weight.{end}" for end in NESTED.split())],
    ),
    "gptq": (_gptq, ["qweight", "qzeros", "scales", "g_idx"]),
    "awq": (_awq, ["qweight", "qzeros", "scales"]),
    "compressed-tensors": (_compressed, ["weight_scale", "weight_packed", "weight_shape", "weight_zero_point"]),
}
MARKS = {"SCB", "weight.absmax", "weight_scale_inv", "weight_scale", "qweight"}  # one of them lies beside each
OF_INPUTS = "input_scale activation_scale activation_scale_ub input_zero_point output_scale q_scale k_scale v_scale"
SHAPES: dict[str, Any] = {
    "fp8": {"weight_block_size?": ([int], None)},
    "gptq": {"bits": int, "checkpoint_format?": (str, None)},
    "awq": {"bits": int, "version?": (str, None)},
    "compressed-tensors": {"format": str, "config_groups": {str: {"weights": {"num_bits": int, "symmetric?": bool}}}},
}
OTHERWISE = (
    "name the model from before it was quantised, or write a plain one with transformers: "
    "`from_pretrained(FOLDER).dequantize(dtype=torch.bfloat16)`, then `save_pretrained(PLAIN)`"
)


def unread(told: Any) -> str | None:
    """Return why weights of which a config says so much are not read; None where they are."""
    if why := documents.misfit(told, {"quant_method?": str}):
        return why
    method = _method(told)
    if method not in READ:
        return f"its weights are quantised by `{method}`, and peftc dequantises {', '.join(READ)} and GGUF alone"
    if why := documents.misfit(told, SHAPES.get(method, {})):
        return why
    words = f"its weights are quantised by `{method}`"
    if method == "gptq" and told["bits"] not in (2, 4, 8):
        return f"{words} in {told['bits']} bits, and peftc reads 2, 4 and 8"
    if method == "awq" and (told["bits"] != 4 or (told.get("version") or "gemm").lower() != "gemm"):
        return f"{words} in {told['bits']} bits by `{told.get('version')}`, and peftc reads 4 by `gemm`"
    if method == "compressed-tensors":
        if told["format"] not in ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"):
            return f"{words} as `{told['format']}`, which peftc does not read"
        kinds = [(each["weights"]["num_bits"], each["weights"].get("symmetric", True)) for each in _groups(told)]
        if told["format"] == "pack-quantized" and kinds not in ([(4, True)], [(8, True)]):
            return f"{words} in several ways at once, or about another middle than zero, which peftc does not read"
    return None


def _method(told: Told) -> str:
    of_old = "bitsandbytes" if {"load_in_8bit", "load_in_4bit"} & told.keys() else "nothing"
    return str(told.get("quant_method", of_old))


def _groups(told: Told) -> list[Any]:
    return list(told["config_groups"].values())


def plain(tensors: Weights, told: Told, model: Model, dtype: torch.dtype) -> Weights:
    """Return weights as modules compute with them, each made when it is read; a note of the model says so.

    Args:
        tensors: of the files.
        told: what the config says of them; `unread` has nothing against it.
        model: that they are for. Those of modules that hold them the other way round (transformers' Conv1D) are turned.
        dtype: of the weights.
    """
    method = _method(told)
    make, ends = READ[method]
    names = set(tensors.names())
    stems = {
        name.removesuffix(f".{end}") for end in MARKS.intersection(ends) for name in names if name.endswith(f".{end}")
    }
    left = {name for name in names if name.rpartition(".")[2] not in OF_INPUTS.split()}
    turned = [f".{name}" for name, module in model.module.named_modules() if type(module).__name__ == "Conv1D"]
    if not stems:
        return tensors  # the config says what the files do not hold
    found = Weights(tensors.where, tensors.files)
    for stem in sorted(stems):
        parts = {end: f"{stem}.{end}" for end in ["weight", *ends] if f"{stem}.{end}" in names}
        left -= set(parts.values())
        is_turned = any(each.endswith(f".{stem}") or f".{stem}".endswith(each) for each in turned)
        weight = partial(_made, tensors, stem, parts, make, told)
        found.made[f"{stem}.weight"] = partial(_stored, weight, is_turned, dtype)
    found.infos = {name: info for name, info in tensors.infos.items() if name in left}
    found.loaded = {name: tensor for name, tensor in tensors.loaded.items() if name in left}
    words = str(dtype).removeprefix("torch.")
    model.notes.append(
        f"`{model.name}` is quantised by `{method}`: {len(stems)} of its modules were dequantised to {words}, "
        "in memory, and what is made of it is stored so"
    )
    return found


def _made(
    tensors: Weights, stem: str, parts: Mapping[str, str], make: Callable[[Parts, Told], Tensor], told: Told
) -> Tensor:
    """Return the weight of a module (WeightError: what it is to be made of does not fit)."""
    try:
        return make({end: tensors.read(name) for end, name in parts.items()}, told)
    except (LookupError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightError(f"`{stem}` in `{tensors.where}` cannot be dequantised", why=why) from error


def _stored(weight: Callable[[], Tensor], is_turned: bool, dtype: torch.dtype) -> Tensor:
    found = weight()
    return (found.T if is_turned else found).to(dtype).contiguous()
