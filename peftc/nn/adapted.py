"""A frozen module and the update that a method of finetuning puts beside it.

An *update* is an `nn.Module` that holds what learns, and

==================  ================================================================================================
forward(base, x)    what the adapted module gives for ``x``, in the dtype of what ``base`` gives; it starts at, or near,
                    ``base(x)``
weight(weight)      the weight that `merge` writes, in float32 and of the same shape; an update without this method, as
                    a bottleneck adapter, cannot be merged
factors()           optional: (up (out, rank), down (rank, in)), float32, where the change of a weight (out, in) is
                    their product, so that a factored module can take it in at a rank that is stated
ratio(weight)       optional, beside factors(): (out,) that the rows of weight plus change are multiplied by
settle()            optional: find anew what follows from what learns, as a threshold; to call before it is judged or
                    written, and after other values took its place, as those of a moving average
report()            optional: name -> count, as ``trainables``, ``entries`` of the weight, and ``changed`` of these
==================  ================================================================================================

A method's module may have

==========================  ========================================================================================
refuse(network)             raises where the method does not suit a network
whole(module)               true of modules that it adapts as a whole, where not those with weights of their own
after_step(updates, step,   called after each step of the optimizer, before its gradients are dropped: ``updates`` by
steps, steps_per_epoch)     name, the ``step`` from 1, and how many steps an epoch has
penalty(adapted)            gives what is added to the loss of a step, or None: ``adapted`` are the modules by name
==========================  ========================================================================================

Buffers whose name begins with ``_`` serve the training alone: checkpoints hold them, artifacts do not. What a method
found out from the values of the weights it says as ``resolved``, settings with which it builds the same update of a
module on the meta device.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftc.nn import merging, surgery
from peftc.nn.lowrank import LowRankLinear


class Adapted(nn.Module):
    """``base``, frozen, computing together with ``update``."""

    def __init__(self, base: nn.Module, update: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.update = update

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        """Return what the module gives with its update, which sees ``x`` alone, as beside an attention with a mask."""
        return self.update(functools.partial(self.base, **others) if others else self.base, x)

    @property
    def weight(self) -> Tensor:
        """The updated weight, for code that reads ``weight`` instead of calling the module; gradients reach the update.

        An update of what a module gives, and not of its weight, leaves it as it is.
        """
        weight: Any = self.base.weight
        return self.update.weight(weight).to(weight.dtype) if self.mergeable else weight  # type: ignore[operator]

    @property
    def mergeable(self) -> bool:
        """Whether the update is a change of the weight, and of factors one that they can take in."""
        if isinstance(self.base, LowRankLinear):
            return merging.why_not(self.base, self.update) is None
        return hasattr(self.update, "weight") and callable(self.update.weight)

    def __getattr__(self, name: str) -> Any:
        """Return what the update has no say in from the module: its bias, sizes, stride and so on."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def without_scratch(update: nn.Module) -> nn.Module:
    """Return an update without the buffers that serve its training alone."""
    for module in update.modules():
        for name in [name for name in module._buffers if name.startswith("_")]:
            delattr(module, name)
    return update


def adapted_modules(network: nn.Module) -> dict[str, Adapted]:
    """Return the adapted modules of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Adapted)}


@dataclass(frozen=True)
class TakenIn:
    """What `take_in` did to one module: its new rank where it is factored, and the error of cutting it back to that."""

    rank: int | None = None
    error: float = 0.0


@torch.no_grad()
def take_in(network: nn.Module, *, same_rank: bool = False) -> dict[str, TakenIn]:
    """Take every update that changes a weight into it, in place, summed in float32 and cast once; say what that did.

    Args:
        same_rank: cut a factored module that was adapted as a whole back to the rank it had; otherwise its rank grows
            by that of the update and nothing is lost.
    """
    found: dict[str, TakenIn] = {}
    for name, module in adapted_modules(network).items():
        base: Any = module.base
        if not module.mergeable:
            continue
        found[name] = TakenIn()
        if isinstance(base, LowRankLinear):
            base, error = merging.merged_factors(base, module.update, base.rank if same_rank else None)
            found[name] = TakenIn(base.rank, error)
        else:
            base.weight = nn.Parameter(module.update.weight(base.weight).to(base.weight.dtype), requires_grad=False)
        surgery.replace(network, module, base)
    return found
