"""A frozen module and the update that a method of finetuning puts beside it.

An *update* is an `nn.Module` that holds what learns, and

==================  ================================================================================================
forward(base, x)    what the adapted module gives for ``x``, in the dtype of what ``base`` gives; it starts at, or near,
                    ``base(x)``
weight(weight)      the weight that `merge` writes, in float32 and of the same shape; an update without this method, as
                    a bottleneck adapter, cannot be merged
factors()           optional: (up (out, rank), down (rank, in)), float32, where the change of a weight (out, in) is
                    their product, so that a factored module can take it in at a rank that is stated
settle()            optional: find anew what follows from what learns, as a threshold; to call before it is judged or
                    written, and after other values took its place, as those of a moving average
report()            optional: name -> count, as ``trainables``, ``entries`` of the weight, and ``changed`` of these
==================  ================================================================================================

A method's module may have ``after_step(updates, step, steps, steps_per_epoch)``, to be called after each step of the
optimizer, before its gradients are dropped: ``updates`` by name, the ``step`` from 1.

Buffers whose name begins with ``_`` serve the training alone: checkpoints hold them, artifacts do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """``base``, frozen, computing together with ``update``."""

    def __init__(self, base: nn.Module, update: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module gives with its update."""
        return self.update(self.base, x)

    @property
    def weight(self) -> Tensor:
        """The updated weight, for code that reads ``weight`` instead of calling the module; gradients reach the update.

        An update of what a module gives, and not of its weight, leaves it as it is.
        """
        weight: Any = self.base.weight
        return self.update.weight(weight).to(weight.dtype) if self.mergeable else weight  # type: ignore[operator]

    @property
    def mergeable(self) -> bool:
        """Whether the update is a change of the weight."""
        return hasattr(self.update, "weight") and callable(self.update.weight)

    def __getattr__(self, name: str) -> Any:
        """Return what the update has no say in from the module: its bias, sizes, stride and so on."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def adapted_modules(network: nn.Module) -> dict[str, Adapted]:
    """Return the adapted modules of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Adapted)}


@torch.no_grad()
def merged(module: Adapted) -> nn.Module:
    """Return ``module.base`` with the update taken into its weight, summed in float32 and cast once.

    The base must be a module with one weight; it is changed, not copied.
    """
    base: Any = module.base
    base.weight = nn.Parameter(module.update.weight(base.weight).to(base.weight.dtype), requires_grad=False)  # type: ignore[operator]
    return base
