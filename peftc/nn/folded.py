"""Compute with a weight and its change without keeping the change between forward and backward.

A change is what ``rebuild(*tensors)`` gives, a dense tensor of the shape of the weight, float32 or float64; ``tensors``
are what it is made of: parameters, and what must not be found anew, as a threshold. The input, the tensors and the
frozen weight are all that is kept; the backward pass rebuilds the change (section A.1.5 of the papers notes on SNELLA).
The gradient of the tensors comes from ``pull(gradient, *tensors)``, one for each or None, where a closed form is known,
else from autograd through ``rebuild``.

In float32 weight and change are summed and there is one product. In half precision that sum would round away a change
smaller than 2^-9 (bfloat16) or 2^-12 (float16) of the weight it meets, so there the change gets a product of its own.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.nn import forms

Rebuild = Callable[..., Tensor]
Pull = Callable[..., Sequence[Tensor | None]]


def form_of(module: nn.Module) -> str | None:
    """Return the form of a module, ``linear``, ``transposed`` or ``channel``; None for what `folded` cannot compute."""
    form = forms.form_of(module)
    return form if form in ("linear", "transposed", "channel") else None


def folded(
    base: nn.Module,
    x: Tensor,
    rebuild: Rebuild,
    tensors: Sequence[Tensor],
    *,
    pull: Pull | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Return what ``base`` gives for ``x`` with its weight changed.

    Args:
        base: for which `form_of` has a name; its weight gets no gradient here.
        x: as ``base`` takes it.
        rebuild: gives the change.
        tensors: what it is given.
        pull: maps the gradient of the change, and the tensors, to gradients of the tensors.
        seen: what the change sees in the place of ``x``, as after dropout; it then has a product of its own.
    """
    weight: Any = base.weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    together = seen is None and dtype.itemsize >= 4
    given = None if together else base(x)
    with without_autocast(x.device.type):  # which would pad in float32
        operation, x = _operation(base, (x if seen is None else seen).to(dtype))
        bias: Any = base.bias if together else None
        y = _Folded.apply(operation, rebuild, pull, x, weight.detach() if together else None, bias, *tensors)
    if isinstance(operation, _Convolution) and operation.unbatched:
        y = y.squeeze(0)
    return y if given is None else given + y


def rebuilt(rebuild: Rebuild, tensors: Sequence[Tensor], *, pull: Pull | None = None) -> Tensor:
    """Return the change itself; its gradient, too, comes from ``pull``."""
    with without_autocast(tensors[0].device.type):
        return _Rebuilt.apply(rebuild, pull, *tensors)


class _Folded(torch.autograd.Function):
    """y = operation(x, weight + change, bias), or operation(x, change) without a weight."""

    @staticmethod
    def forward(ctx: Any, operation: Any, rebuild: Rebuild, pull: Pull | None, *inputs: Any) -> Tensor:
        x, weight, bias, *tensors = inputs
        ctx.operation, ctx.rebuild, ctx.pull, ctx.bias = operation, rebuild, pull, bias is not None
        ctx.save_for_backward(x, weight, *tensors)
        return operation.forward(x, _sum(weight, rebuild(*tensors), tensors, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *tensors = ctx.saved_tensors
        with without_autocast(x.device.type):
            wanted = ctx.needs_input_grad[6:]
            change, leaves = _change(ctx, tensors, wanted)
            shape, dtype = change.shape, change.dtype
            of_x = None
            if ctx.needs_input_grad[3]:
                of_x = ctx.operation.of_input(gradient, x, _sum(weight, change, tensors, x.dtype))
            of_bias = ctx.operation.of_bias(gradient) if ctx.bias and ctx.needs_input_grad[5] else None
            if not any(wanted):
                return None, None, None, of_x, None, of_bias, *[None] * len(tensors)
            if ctx.pull is not None:
                del change  # before another dense tensor of its size is made
            dense = ctx.operation.of_weight(gradient, x, shape).to(dtype)
            found = _through(change, leaves, wanted, dense) if ctx.pull is None else ctx.pull(dense, *tensors)
        return None, None, None, of_x, None, of_bias, *found


class _Rebuilt(torch.autograd.Function):
    """The change, kept by nobody but who asked for it."""

    @staticmethod
    def forward(ctx: Any, rebuild: Rebuild, pull: Pull | None, *tensors: Tensor) -> Tensor:
        ctx.rebuild, ctx.pull = rebuild, pull
        ctx.save_for_backward(*tensors)
        return rebuild(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        tensors = ctx.saved_tensors
        with without_autocast(gradient.device.type):
            if ctx.pull is not None:
                return None, None, *ctx.pull(gradient, *tensors)
            change, leaves = _change(ctx, tensors, ctx.needs_input_grad[2:])
            return None, None, *_through(change, leaves, ctx.needs_input_grad[2:], gradient)


def _change(ctx: Any, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """Rebuild the change, with a graph to its tensors where only autograd knows the way back."""
    if ctx.pull is not None or not any(wanted):
        return ctx.rebuild(*tensors), []
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_(want) for each, want in zip(tensors, wanted, strict=True)]
        return ctx.rebuild(*leaves), leaves


def _through(change: Tensor, leaves: list[Tensor], wanted: Sequence[bool], gradient: Tensor) -> list[Tensor | None]:
    found = iter(torch.autograd.grad(change, [leaf for leaf in leaves if leaf.requires_grad], gradient))
    return [next(found) if want else None for want in wanted]


def _sum(weight: Tensor | None, change: Tensor, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return weight + change; in the change's place, where nobody else holds it, to have one dense tensor less."""
    if weight is None:
        return change.detach().to(dtype)
    held = {each.untyped_storage().data_ptr() for each in tensors}
    mine = not change.requires_grad and change.untyped_storage().data_ptr() not in held
    if mine and torch.promote_types(change.dtype, weight.dtype) == change.dtype:
        return change.add_(weight).to(dtype)
    return (weight + change.detach()).to(dtype)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Compute in the dtypes at hand on this type of device."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _operation(base: Any, x: Tensor) -> tuple[Any, Tensor]:
    """Return how ``base`` computes, and its input with the padding that is more than zeros on both sides."""
    form = forms.form_of(base)
    if form in ("linear", "transposed"):
        return _Product(transposed=form == "transposed"), x
    unbatched = x.ndim < base.weight.ndim
    x = x.unsqueeze(0) if unbatched else x
    padding = base.padding
    if forms.pads_itself(base):
        padding, x = (0, 0), forms.padded(base, x)
    elif base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        padding, x = (0,) * len(base.stride), F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
    return _Convolution(base.stride, padding, base.dilation, base.groups, unbatched), x


class _Product:
    """y (..., out) = x (..., in) @ weight^T + bias, with the weight (out, in), or (in, out) where it is transposed."""

    def __init__(self, *, transposed: bool) -> None:
        self.transposed = transposed

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.T if self.transposed else weight, bias)

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return gradient @ (weight.T if self.transposed else weight)

    def of_weight(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        outputs, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        return inputs.T @ outputs if self.transposed else outputs.T @ inputs

    def of_bias(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(0, -2).sum(0)


class _Convolution:
    """y (batch, out, ...) of x (batch, in, ...), padded with zeros on both sides."""

    def __init__(self, stride: Any, padding: Any, dilation: Any, groups: int, unbatched: bool) -> None:
        self.how = (stride, padding, dilation, groups)
        self.unbatched = unbatched

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return forms.CONVOLVE[weight.ndim - 2](x, weight, bias, *self.how)

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, (True, False, False))[0]

    def of_weight(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        # only its shape and dtype are read
        weight = torch.empty(1, dtype=x.dtype, device=x.device).expand(shape)
        return self._backward(gradient, x, weight, (False, True, False))[1]

    def of_bias(self, gradient: Tensor) -> Tensor:
        return gradient.transpose(0, 1).flatten(1).sum(1)

    def _backward(self, gradient: Tensor, x: Tensor, weight: Tensor, mask: Any) -> Any:
        stride, padding, dilation, groups = self.how
        nothing = [0] * len(stride)
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, stride, padding, dilation, False, nothing, groups, mask
        )
