"""Frozen weights that stay in bfloat16, as they are stored, where a training multiplies in it.

Autocast rounds the weights of products to bfloat16 each time they run, so that to have widened them first changes
nothing: of those that were stored so, each bit is the same. Norms, embeddings and what is shared with one compute in
float32, and are widened. Where no autocast is on, as where the network is measured, a module has float32 copies of its
weights while it runs.
"""

from typing import Any

import torch
from torch import nn

from peftc.models import inputs
from peftc.models.model import Model
from peftc.models.streaming import STREAM, WHOLE, Stream
from peftc.nn import folded, surgery
from peftc.nn.adapted import Adapted
from peftc.options import Recipe

HOOKS = "halved"  # attribute of such a network


def suits(network: nn.Module, recipe: Recipe) -> bool:
    """Return whether a training by a recipe has such weights of a network; compiled layers take no hooks."""
    half = any(each.dtype == torch.bfloat16 for each in network.parameters())
    return half and recipe.mixed_precision == "bf16" and not recipe.spread and not recipe.compile


def widen(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device and widen it to float32 in place, but for weights that autocast would round again."""
    kept = _kept(network)
    with torch.no_grad():
        for each in {id(each): each for each in (*network.parameters(), *network.buffers())}.values():
            dtype = torch.float32 if each.is_floating_point() and id(each) not in kept else each.dtype
            each.data = each.data.to(device, dtype)
    if kept:
        network.__dict__[STREAM] = Stream(device, torch.float32)  # what it reads, wherever its first parameter lies
    return network


def _kept(network: nn.Module) -> set[int]:
    """Return which parameters stay as they are: those of products, where nothing else reads them."""
    shared = {name for names in surgery.stored_names(network).values() if len(names) > 1 for name in names}
    inside = {id(each) for module in network.modules() if isinstance(module, WHOLE) for each in module.modules()}
    return {
        id(each)
        for path, module in network.named_modules()
        if id(module) not in inside and folded.form_of(module) is not None
        for name, each in module.named_parameters(recurse=False)
        if each.dtype == torch.bfloat16 and f"{path}.{name}".removeprefix(".") not in shared
    }


def attach(model: Model) -> None:
    """Let each module with such weights run with float32 copies of them where no autocast is on.

    It is tried; a network that reads weights without calling their module, and stops, is widened as a whole.
    """
    network = model.module
    inside = {id(each) for module in network.modules() if isinstance(module, Adapted) for each in module.base.modules()}
    network.__dict__[HOOKS] = [
        hook
        for module in network.modules()
        if id(module) not in inside
        for hook in _attached(module, list(module.base.modules()) if isinstance(module, Adapted) else [module])
    ]
    try:
        inputs.outputs(model, inputs.probe(model, max_length=4))
    except inputs.DOES_NOT_RUN:
        release(network)
        network.float()


def _attached(module: nn.Module, owners: list[Any]) -> list[Any]:
    """Return the hooks of a module that reads the parameters of ``owners``."""
    if not any(each.dtype == torch.bfloat16 for owner in owners for each in owner.parameters(recurse=False)):
        return []
    stored: list[tuple[Any, str, nn.Parameter]] = []

    def fetch(_module: nn.Module, _inputs: Any) -> None:
        for owner in owners:
            for name, each in owner._parameters.items():
                if each is None or each.dtype != torch.bfloat16 or torch.is_autocast_enabled(each.device.type):
                    continue
                stored.append((owner, name, each))
                owner._parameters[name] = nn.Parameter(each.detach().float(), requires_grad=False)

    def drop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        while stored:
            owner, name, each = stored.pop()
            owner._parameters[name] = each

    return [module.register_forward_pre_hook(fetch, prepend=True), module.register_forward_hook(drop, always_call=True)]


def release(network: nn.Module) -> None:
    """Leave a network that was widened as any other: its weights as they are, and nothing beside them."""
    for hook in network.__dict__.pop(HOOKS, []):
        hook.remove()
    network.__dict__.pop(STREAM, None)
