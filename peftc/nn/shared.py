"""One down factor for several modules that read the same input, multiplied once.

q, k and v of an attention each call the factor with the very same tensor. It keeps its last product until that tensor
is gone or all members have asked, and hands it out only where nothing can have changed: the same tensor object, at the
same version, the same weight at the same version, the same modes of autograd. Inference tensors have no version, so in
inference mode a change of the input in place between two members' calls is not seen; no network whose members were
found to share an input makes one. What writes to ``tensor.data`` hides its change from PyTorch, and from here.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Product:
    """A product that was computed, what it hangs on, and how many members may still ask for it."""

    of: weakref.ref[Tensor]
    key: tuple[Any, ...]
    value: Tensor | None
    left: int

    def forget(self) -> None:
        """Let the product go: its input is gone, or a gradient went through it, which frees its graph."""
        self.value = None


class SharedDown(nn.Linear):
    """The down factor (rank, in) of several members, without a bias.

    Args:
        in_features, rank: of the factor.
        members: how many modules call it, >= 2.
    """

    def __init__(self, in_features: int, rank: int, members: int) -> None:
        super().__init__(in_features, rank, bias=False)
        self.members = members
        self._kept = threading.local()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., rank)."""
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):  # the compiler merges equal products itself
            return super().forward(x)
        kept: _Product | None = getattr(self._kept, "product", None)
        key = self._key(x)
        if kept is not None and kept.value is not None and kept.of() is x and _same(kept.key, key):
            value = kept.value
            kept.left -= 1
            if not kept.left:
                kept.forget()
            return value
        value = super().forward(x)
        product = self._kept.product = _Product(weakref.ref(x), key, value, self.members - 1)
        gone = weakref.WeakMethod(product.forget)  # what calls it does not itself keep the product

        def forget(_by: object) -> None:
            if there := gone():
                there()

        product.of = weakref.ref(x, forget)
        if value.requires_grad:
            value.register_hook(forget)
        return value

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        """Return what else a product hangs on; compared by identity where it is an object."""
        weight, kind = self.weight, x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (
            None if x.is_inference() else x._version,
            weight,
            None if weight.is_inference() else weight._version,
            weight.dtype,
            weight.device,
            weight.requires_grad,
            x.requires_grad,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            autocast,
            # those of the checkpoint that is being recorded: what one checkpoint computed is not another's
            *(torch._C._autograd._top_saved_tensors_default_hooks(True) or ()),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was kept out of copies and pickles."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start a copy with nothing kept."""
        super().__setstate__(state)
        self._kept = threading.local()


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(
        a is b if isinstance(a, Tensor) or callable(a) else a == b for a, b in zip(one, other, strict=True)
    )


def share(members: Sequence[Any]) -> SharedDown:
    """Give two or more `LowRankLinear`s of one width and rank one empty down factor (ValueError: they are unlike)."""
    shapes = {(member.in_features, member.rank) for member in members}
    if len(shapes) != 1 or len(members) < 2:
        raise ValueError(f"{len(members)} modules cannot share a down factor of (in, rank) {sorted(shapes)}")
    ((in_features, rank),) = shapes
    with torch.device("meta"):
        down = SharedDown(in_features, rank, len(members)).train(members[0].training)
    for member in members:
        member.down = down
    return down
