"""A network in pieces: each process of a launch holds its share of every weight, and layers are whole while they run.

The pieces are torch's (`fully_shard`, FSDP2). Weights of peftc are windows on files, and a process copies of each no
more than its share, layer by layer, in the precision and on the device of the training. Beside the pieces the network
stays as it was, on its files: what was learnt is put there in the end, tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import processes
from peftc.errors import UsageError
from peftc.models import streaming, weights
from peftc.models.model import Model, Shards, detached
from peftc.nn import surgery
from peftc.store import documents
from peftc.store.header import encode_header

KEPT = "work weights"  # in the note of the file that holds what was learnt


@dataclass(frozen=True)
class Spread:
    """How a network is spread over the processes of this launch.

    Attributes:
        device: where it computes.
        half: multiply, and travel, in bfloat16; gradients are summed in float32.
        offload: pieces, gradients and the optimizer's state wait in the memory of the CPU.
    """

    device: torch.device
    half: bool = False
    offload: bool = False


@processes.watched()
def shard(model: Model, layers: Iterable[str], dtype: torch.dtype, spread: Spread, *, learns: bool) -> Model:
    """Return a model in pieces; the one that is given stays whole, and as it is.

    Args:
        model: on the CPU, as it is stored.
        layers: names of its layers, as `peftc.models.layers` finds them in the whole one.
        dtype: of its floating tensors.
        spread: where, and how.
        learns: whether it is trained; what reads the weights of its head then finds them whole until the backward pass
            is over.

    Raises:
        UsageError: it cannot be cut, with the reason.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    names = list(layers)
    refuse_uncuttable(model, names)
    if spread.device.type == "cuda":
        torch.cuda.set_device(spread.device)
    module = detached(model.module)
    half = torch.bfloat16 if spread.half and dtype == torch.float32 else None
    inner = MixedPrecisionPolicy(half, None if half is None else torch.float32)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(spread.device.type, (processes.size(),)),
        "offload_policy": CPUOffloadPolicy() if spread.offload else OffloadPolicy(),
    }
    for each in [module.get_submodule(name) for name in _units(module, names)]:
        _own(each, spread.device, dtype)
        fully_shard(each, reshard_after_forward=True, mp_policy=inner, **options)
    _own(module, spread.device, dtype)
    outer = replace(inner, output_dtype=None if half is None else dtype)
    fully_shard(module, reshard_after_forward=not learns, mp_policy=outer, **options)
    if spread.offload:
        module.__dict__[streaming.STREAM] = streaming.Stream(spread.device, dtype)  # where inputs go
    return replace(model, module=module, shards=Shards(tuple(names), model.module))


def refuse_uncuttable(model: Model, layers: Iterable[str]) -> None:
    """Refuse a network that has no layers to cut it by, or a parameter without axes (UsageError)."""
    hint = "train it with whole weights in each process: leave `--shard` out"
    if not list(layers):
        raise UsageError(
            f"`--shard` finds no layers in `{model.name}`", why="weights are cut layer by layer", hint=hint
        )
    for name, each in model.module.named_parameters():
        if not each.ndim:
            raise UsageError(f"`--shard` cannot cut `{name}` of `{model.name}`", why="it is a single number", hint=hint)


def _units(module: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return what is put together at once: layers, and the embedding, unless they share a tensor with others."""
    find = getattr(module, "get_input_embeddings", None)
    try:
        embedding = find() if callable(find) else None
    except NotImplementedError:
        embedding = None
    names = list(layers)
    names += [
        name
        for name, each in module.named_modules()
        if each is embedding and not any(f"{name}.".startswith(f"{layer}.") for layer in names)
    ]
    shared = [group for group in surgery.stored_names(module).values() if len(group) > 1]

    def apart(name: str) -> bool:
        inside = [{each.startswith(f"{name}.") for each in group} for group in shared]
        return all(len(each) == 1 for each in inside)

    return [name for name in names if apart(name)]


def _own(unit: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a unit parameters and buffers of its own, where they are not in pieces yet: no window is written to."""
    from torch.distributed.tensor import DTensor

    made: dict[int, Any] = {}

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    for module in unit.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(moved(parameter).contiguous(), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else moved(buffer).clone()


def whole(model: Model) -> Model:
    """Return the model as it was before it was cut; itself where it is whole."""
    return model if model.shards is None else replace(model, module=model.shards.whole, shards=None)


def is_cut(module: nn.Module) -> bool:
    """Return whether a network lies in pieces."""
    return hasattr(module, "reshard")


def rest(module: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has put together."""
    if is_cut(module):
        module.reshard()  # type: ignore[operator]


def full(tensor: Tensor) -> Tensor:
    """Return a tensor put together from all processes, which ask for it at once; itself where it is no piece."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that this process holds."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.nbytes


@processes.watched()
def together(model: Model, path: Path, learnt: Iterable[str], stored: Callable[[str], torch.dtype | None]) -> Model:
    """Return a model whole again; what it learnt goes to a file, tensor by tensor, on which the first process maps it.

    All processes call it at once; in the others the result holds what was there before.

    Args:
        model: in pieces.
        path: of the file.
        learnt: names of the tensors that may differ from before.
        stored: name -> the precision in which it is stored; None for its own.
    """
    assert model.shards is not None
    wanted, found = set(learnt), surgery.tensors_of(model.module)
    groups = [names for names in surgery.stored_names(model.module).values() if wanted & set(names)]
    types = {names[0]: stored(names[0]) or found[names[0]].dtype for names in groups}

    def blocks() -> Iterator[Any]:
        for names in groups:
            tensor = full(found[names[0]].detach())
            yield from weights.piece(tensor.to(types[names[0]])).blocks() if not processes.rank() else ()

    entries = {name: (weights.DTYPE_NAMES[types[name]], tuple(found[name].shape)) for name in types}
    with documents.replacing(path) if not processes.rank() else nullcontext() as unfinished:
        if unfinished is None:
            list(blocks())
        else:
            with unfinished.open("wb") as file:
                file.write(encode_header(entries, {"note": json.dumps(KEPT)}))
                for block in blocks():
                    file.write(block)
    if not processes.rank():
        kept = weights.from_file(path)
        for names in groups:
            surgery.assign(model.shards.whole, names, kept.read(names[0]))
    return whole(model)
