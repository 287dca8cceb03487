"""Put updates beside the modules of a network: which modules take one, and what is frozen and what learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from peftc.errors import ArtifactError, UsageError
from peftc.methods import registry
from peftc.models import families, targets
from peftc.models.model import Model
from peftc.nn import lowrank, surgery
from peftc.nn.adapted import Adapted, without_scratch


@dataclass
class Placed:
    """What learns beside, or in, the modules of a network."""

    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)  # module -> method and settings, as in a manifest
    own: dict[str, tuple[str, ...]] = field(default_factory=dict)  # module -> its own parameters that learn
    whole: list[str] = field(default_factory=list)  # trained themselves: an update is no smaller
    left: dict[str, str] = field(default_factory=dict)  # module with a matrix -> why it has none


def place(
    model: Model,
    method: str,
    settings: Mapping[str, Any],
    *,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    on_product: bool = False,
) -> Placed:
    """Freeze a network and put updates beside its modules (UsageError: a wrong pattern, or a method refuses it).

    Args:
        model: in memory; random numbers are drawn from torch's state.
        method, settings: of the kind `adapter`, checked.
        include: patterns of modules that have none unless asked: embeddings, the patch embedding, the stem.
        skip: patterns of modules that have none.
        on_product: take a factored linear module as one matrix, not as its two factors.
    """
    network = model.module
    network.requires_grad_(False)
    function = registry.find("adapter", method, "--method")
    registry.trait(function, "refuse", lambda _: None)(network)
    whole = registry.trait(function, "whole", None)
    owners = _owners(network, on_product) if whole is None else {n: m for n, m in network.named_modules() if whole(m)}
    include, skip = targets.patterns_for(owners, include, skip)
    everywhere = registry.trait(function, "EVERYWHERE", False)
    weights = {name: getattr(each, "weight", None) for name, each in owners.items()}
    weighted = {n: owners[n] for n, weight in weights.items() if isinstance(weight, torch.Tensor) and weight.ndim >= 2}
    dense = {} if everywhere else targets.kept_dense(model, weighted, families.COMMON)
    found = Placed()
    for name, module in owners.items():
        if families.matches(name, *skip):
            continue
        why = _impossible(network, name, module) or (None if families.matches(name, *include) else dense.get(name))
        if why:
            found.left[name] = why
            continue
        given = function(module, **settings)
        if isinstance(given, nn.Module):
            surgery.replace(network, module, Adapted(module, given.to(next(module.parameters()).device)))
            resolved = getattr(given, "resolved", {})
            found.adapters[name] = {"method": method, "settings": {**settings, **resolved}}
        elif given:
            for owner, _, leaf in (f"{name}.{each}".removeprefix(".").rpartition(".") for each in given):
                found.own[owner] = (*found.own.get(owner, ()), leaf)  # a factored module's weights are its factors'
            found.whole += [] if everywhere else [name]
        elif name in weighted:
            found.left[name] = f"`{method}` has no update of a {type(module).__name__}"
    return found


def rebuild(network: nn.Module, adapters: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the updates of a manifest beside their modules, on the meta device (ArtifactError: one takes none)."""
    for name, entry in adapters.items():
        try:
            module = network.get_submodule(name)
            function = registry.find("adapter", entry["method"], "method")
            with torch.device("meta"):
                update = function(module, **registry.with_settings(function, entry["method"], entry["settings"]))
        except (AttributeError, TypeError, ValueError, UsageError) as error:
            what = f"the artifact adapts `{name}` by `{entry['method']}`, which cannot be built"
            raise ArtifactError(what, why=str(error)) from error
        if not isinstance(update, nn.Module):
            why = "that method has no update of such a module"
            raise ArtifactError(f"the artifact adapts `{name}` by `{entry['method']}`", why=why)
        surgery.replace(network, module, Adapted(module, without_scratch(update)))


def _owners(network: nn.Module, on_product: bool) -> dict[str, nn.Module]:
    """Return the modules with parameters of their own, factored ones as one where asked."""
    modules = dict(network.named_modules())
    whole = {name for name, each in modules.items() if on_product and isinstance(each, lowrank.LowRankLinear)}
    inside = tuple(f"{name}." for name in whole)
    owners = {name for name, each in modules.items() if any(own is not None for own in each._parameters.values())}
    return {name: each for name, each in modules.items() if name in whole | owners and not name.startswith(inside)}


def _impossible(network: nn.Module, name: str, module: Any) -> str | None:
    """Return why a module can have no update at all, or None."""
    if parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        return "its weight is computed by a parametrization"
    if any(nn.parameter.is_lazy(each) for each in module.parameters()):
        return "it has no weight before its first call"
    if not all(each.is_floating_point() for each in module.parameters()):
        return "its weight is quantized"
    own = {f"{name}.{leaf}" if name else leaf for leaf, each in module._parameters.items() if each is not None}
    for names in surgery.stored_names(network).values():
        if len(names) > 1 and own & set(names):
            return f"its weight is also `{next(iter(set(names) - own), names[0])}`"
    return None
