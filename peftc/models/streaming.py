"""Run a network whose parameters, as it computes with them, would not fit into memory: a module at a time.

Each module that owns parameters gets a copy of them on the device and in the dtype of the computation just before it
runs, and loses it right after. A backward pass needs some of them again; they are copied again then, and not kept.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

STREAM = "stream"  # attribute of a streamed network
WHOLE = (nn.MultiheadAttention,)  # modules that read the parameters of their children without calling them


@dataclass
class Stream:
    """The copies that are in place now."""

    device: torch.device  # of the computation
    dtype: torch.dtype  # of the computation; integers keep theirs
    origin: dict[int, Tensor] = field(default_factory=dict)  # address of a copy's memory -> what it is a copy of

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it is computed with: itself where it already is so."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def pack(self, tensor: Tensor) -> Any:
        """Stand in for a copied parameter that a backward pass will need: say where it comes from, and which view."""
        there = self.origin.get(tensor.untyped_storage().data_ptr())
        if there is None:  # the tensor itself would hold on to the graph that holds it, for good
            return tensor.detach()
        return there, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        """Return what `pack` was given."""
        if isinstance(kept, Tensor):
            return kept
        there, *view = kept
        return self.copied(there).as_strided(*view)


def install(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let a network compute on a device in a dtype; its parameters, which need no gradient, stay where they are."""
    stream = Stream(device, dtype)
    network.requires_grad_(False)
    for module in network.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else stream.copied(buffer)
    inside = {id(child) for module in network.modules() if isinstance(module, WHOLE) for child in module.modules()}
    inside -= {id(module) for module in network.modules() if isinstance(module, WHOLE)}
    for module in network.modules():
        owners = list(module.modules()) if isinstance(module, WHOLE) else [module]
        if id(module) not in inside and any(owner._parameters for owner in owners):
            _attach(module, owners, stream)
    network.__dict__[STREAM] = stream


def _attach(module: nn.Module, owners: list[nn.Module], stream: Stream) -> None:
    stored: dict[tuple[int, str], nn.Parameter] = {}

    def fetch(_module: nn.Module, _inputs: Any) -> None:
        for at, owner in enumerate(owners):
            for name, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                source = parameter.detach()
                copy = stream.copied(source)
                if copy is not source:
                    stored[at, name] = parameter
                    owner._parameters[name] = nn.Parameter(copy, requires_grad=False)
                    stream.origin[copy.untyped_storage().data_ptr()] = source

    def drop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        for (at, name), parameter in stored.items():
            copy: Any = owners[at]._parameters[name]
            stream.origin.pop(copy.untyped_storage().data_ptr(), None)
            owners[at]._parameters[name] = parameter
        stored.clear()

    module.register_forward_pre_hook(fetch, prepend=True)
    module.register_forward_hook(drop, always_call=True)


def recomputing(network: nn.Module) -> AbstractContextManager[Any]:
    """Keep no copy of a parameter for a backward pass; of a network that is not streamed, all as it is."""
    stream: Stream | None = network.__dict__.get(STREAM)
    return nullcontext() if stream is None else torch.autograd.graph.saved_tensors_hooks(stream.pack, stream.unpack)
