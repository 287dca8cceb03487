"""One step of a training, shared by the processes of a launch: gradients are averaged while they are computed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftc import processes

Terms = Mapping[str, Tensor]  # name -> scalar of a step, weighted; their sum is minimised


class Step(nn.Module):
    """A network together with its loss: what it gives for a batch are the weighted terms.

    So what averages gradients sees a forward pass of the whole, whatever a loss reaches: features within, a second
    tower, the product of two factors, a penalty on what learns.
    """

    def __init__(self, module: nn.Module, loss: Callable[[nn.Module, Any], Tensor | Terms]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, given: Any) -> dict[str, Tensor]:
        """Return the weighted terms of a batch."""
        found = self.loss(self.module, given)
        return {"loss": found} if isinstance(found, Tensor) else dict(found)


def total(terms: Terms) -> Tensor:
    """Return what is minimised."""
    return torch.stack([each.float() for each in terms.values()]).sum()


def spread(accelerator: Accelerator, step: Step, first: Callable[[], Any]) -> nn.Module:
    """Return a step as Accelerate prepares it: in mixed precision, and by several processes with averaged gradients.

    Buckets of gradients travel while the backward pass goes on, and the gradients are views into them. Buffers are in
    each step those of the first process, which keeps them for a resume. What is frozen, which may be a window on a
    file, is left where it is.

    Args:
        accelerator: that was made for this launch.
        step: in the mode in which it will learn.
        first: gives a batch, to find out whether everything that learns gets a gradient. Nothing changes by that.
    """
    if processes.size() > 1:
        lost = any(processes.gathered([_leaves_out(step, first())]))
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, find_unused_parameters=lost
        )
        frozen = [name for name, each in step.named_parameters() if not each.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, frozen)
    prepared: nn.Module = accelerator.prepare(step)
    return prepared


def _leaves_out(step: Step, given: Any) -> bool:
    """Return whether something that learns has no gradient after a backward pass; buffers are put back."""
    held = {name: each.clone() for name, each in step.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        total(step(given)).backward()
    lost = any(each.requires_grad and each.grad is None for each in step.parameters())
    step.zero_grad()
    with torch.no_grad():
        for name, each in step.named_buffers():
            each.copy_(held[name])
    return lost


def alone(prepared: nn.Module, apart: bool) -> AbstractContextManager[Any]:
    """Let gradients add up in each process, unread by the others, within a context, where that is asked for."""
    return prepared.no_sync() if apart and isinstance(prepared, DistributedDataParallel) else nullcontext()
