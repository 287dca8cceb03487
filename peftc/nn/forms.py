"""How a module's weight is seen as one matrix (out, in), which an update changes.

``linear``, ``transposed``, ``embedding`` and ``channel`` are as in `lowrank`, the last for Conv1d, Conv2d and Conv3d
alike; ``factored`` is a LowRankLinear, whose matrix is the product of its factors.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.nn.lowrank import LowRankLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = {nn.Linear: "linear", nn.Embedding: "embedding", **dict.fromkeys(CONVOLUTIONS, "channel")}
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def form_of(module: Any) -> str | None:
    """Return the form, None for a module that has no weight or does something else with it."""
    if isinstance(module, LowRankLinear):
        return "factored"
    weight = module._parameters.get("weight")  # a parametrized or quantized weight is none of these
    if weight is None or not weight.is_floating_point() or getattr(module, "max_norm", None) is not None:
        return None
    return kind_of(module) if computes_plainly(module) else None


def kind_of(module: nn.Module) -> str | None:
    """Return the form of a module's class, whatever is special about it; None for a class that has none."""
    if is_conv1d(module):
        return "transposed"
    return next((form for kind, form in PLAIN.items() if isinstance(module, kind)), None)


def computes_plainly(module: nn.Module) -> bool:
    """Return whether a module of a class with a form uses its weight as that class does."""
    plain = (type(module).forward is kind.forward for kind in PLAIN if isinstance(module, kind))
    return next(plain, True) or pads_itself(module) or acts_as_linear(module)


def acts_as_linear(module: nn.Module) -> bool:
    """Return whether a class with a `forward` of its own does what `Linear` does, as transformers' `FalconLinear`.

    A stand-in of it with a few random weights is tried, in training and not: whatever scales, rounds, normalises or
    adds to the weight, or depends on its size, is told apart. What holds more than weight and bias is not tried.
    """
    more = {name for name, _ in (*module.named_parameters(), *module.named_buffers())} - {"weight", "bias"}
    if not isinstance(module, nn.Linear) or more or list(module.children()):
        return False
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    bias = None if module.bias is None else nn.Parameter(drawn(7))
    stand_in, weight = copy.copy(module), nn.Parameter(drawn(7, 5))
    stand_in.__dict__ |= {"_parameters": {"weight": weight, "bias": bias}, "in_features": 5, "out_features": 7}
    for training, x in itertools.product((False, True), (drawn(3, 5), 100 * drawn(2, 3, 5))):
        stand_in.__dict__["training"] = training
        try:
            found = type(module).forward(stand_in, x)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError):
            return False
        if not isinstance(found, Tensor) or not torch.allclose(found, F.linear(x, weight, bias), rtol=1e-9):
            return False
    return True


def matrix_size(module: Any) -> tuple[int, int]:
    """Return (out, in) of the matrix of a module that has a form."""
    form = form_of(module)
    if form == "factored":
        return module.out_features, module.in_features
    if form == "transposed":
        return module.weight.shape[1], module.weight.shape[0]
    return module.weight.shape[0], module.weight[0].numel()


def dense(module: nn.Module, parameters: int) -> tuple[str, ...] | None:
    """Return the names of the weights to train in place of an update of so many parameters, None if it has fewer."""
    weights = {name: each for name, each in module.named_parameters() if name.endswith("weight")}
    return tuple(weights) if parameters >= sum(each.numel() for each in weights.values()) else None


def as_weight(matrix: Tensor, weight: Tensor, form: str) -> Tensor:
    """Return a matrix (out, in) in the shape of ``weight``."""
    return matrix.T if form == "transposed" else matrix.reshape(weight.shape)


def convolve(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve as ``base`` does, padding mode and groups included, with a weight (any, in / groups, ...), no bias."""
    if not pads_itself(base):
        return base._conv_forward(x, weight, None)
    return F.conv2d(padded(base, x), weight, None, base.stride, 0, base.dilation, base.groups)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 if it is that."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, a linear one with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def pads_itself(module: nn.Module) -> bool:
    """Return whether a module is timm's Conv2dSame, which pads by TensorFlow's rule."""
    return type(module).__name__ == "Conv2dSame" and isinstance(module, nn.Conv2d)


def padded(conv: Any, x: Tensor) -> Tensor:
    """Return an input (batch, in, h, w) as a convolution that `pads_itself` pads it."""
    from timm.layers.padding import pad_same

    return pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
