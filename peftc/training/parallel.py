"""A training shared by the processes of a launch: whole weights in each, or weights in pieces, a share in each.

Whole weights are those of `DistributedDataParallel`, pieces those of `peftc.models.sharding`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from peftc import processes
from peftc.errors import UsageError
from peftc.methods import registry
from peftc.models import sharding
from peftc.models.model import Model
from peftc.models.place import device_of, usual_dtype
from peftc.options import Recipe

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


def in_pieces(model: Model, layers: Sequence[str], recipe: Recipe, device: str, *, learns: bool) -> Model:
    """Return a model whose weights lie in pieces, in the precision in which it is trained or asked.

    Args:
        model: as it is stored, on the CPU.
        layers: its layers.
        recipe: how pieces lie and what is multiplied.
        device: where to compute.
        learns: whether it is trained.

    Raises:
        UsageError: it cannot be cut, or not on these devices.
    """
    place = device_of(device)
    if place.type == "mps" or (place.type == "cuda" and not processes.a_gpu_each()):
        hint = "start as many processes as there are GPUs, or compute on `--device cpu`"
        raise UsageError("`--shard` needs a GPU of its own for each process, or none", hint=hint)
    dtype = usual_dtype(model, place)
    if learns and dtype != torch.float64:
        dtype = torch.float32
    processes.wait()  # so that all have met
    offload = recipe.offloads and place.type == "cuda"
    spread = sharding.Spread(place, recipe.mixed_precision == "bf16", offload)
    return sharding.shard(model, layers, dtype, spread, learns=learns)


def refuse_method(name: str, function: Callable[..., Any]) -> None:
    """Refuse a method of finetuning that reads whole weights between steps (UsageError)."""
    if any(registry.trait(function, each, None) for each in ("after_step", "penalty")):
        why = "it looks at whole weights between the steps"
        hint = "use `--method lora`, `dora` or `full`, or whole weights in each process: leave `--shard` out"
        raise UsageError(f"`--method {name}` does not go with `--shard`", why=why, hint=hint)


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
    if sharding.is_cut(step.module):
        if any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in step.modules()):
            step.register_forward_pre_hook(_same_buffers)
        return step  # its precision is that of the pieces
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
            if not torch.equal(each, held[name]):
                each.copy_(held[name])
    return lost


def _same_buffers(step: nn.Module, _given: Any) -> None:
    for buffer in step.buffers():
        distributed.broadcast(buffer, 0)


def agreed(score: Callable[[], float], module: nn.Module) -> float:
    """Return a score that the first process finds, or of a network in pieces all of them at once."""
    if not sharding.is_cut(module):
        return processes.agreed(score)
    value = score()
    sharding.rest(module)
    return processes.agreed(lambda: value)


def alone(prepared: nn.Module, apart: bool) -> AbstractContextManager[Any]:
    """Let gradients add up in each process, unread by the others, within a context, where that is asked for."""
    return prepared.no_sync() if apart and isinstance(prepared, DistributedDataParallel) else nullcontext()
