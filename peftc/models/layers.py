"""Where a network's layers are: the residual blocks that run one after the other.

A layer is found by what it does, not by its name: siblings of one class that hold modules of their own, each reading
what the one before it gave. Of stacks within stacks the inner ones are meant, as the blocks in a stage of Swin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from peftc.models import inputs
from peftc.models.load import Model


@contextmanager
def registered(handles: Iterable[Any]) -> Iterator[None]:
    """Register hooks, and remove them again."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def layers(model: Model) -> list[str]:
    """Return the dotted names of a network's layers, in the order in which they run.

    Args:
        model: runnable; a random input goes through it once.
    """
    own, any_parent = (list(_stacks(model.module, strict=strict)) for strict in (True, False))
    order, reads, gives = _flow(model, {name for stack in any_parent for name in stack})
    for stacks in (own, any_parent):
        chained: set[str] = set()
        for stack in stacks:
            ran = [name for name in stack if order.count(name) == 1 and gives[name] is not None]
            chained |= {name for pair in pairwise(ran) if reads[pair[1]] is gives[pair[0]] for name in pair}
        found = [name for name in order if name in chained]
        if found:
            return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return []


def _flow(model: Model, names: set[str]) -> tuple[list[str], dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Return in which order modules run on a random input, what each reads and what it gives."""
    order: list[str] = []
    reads: dict[str, Tensor | None] = {}
    gives: dict[str, Tensor | None] = {}  # both are kept alive, so that identity means what it says

    def watch(name: str) -> Callable[..., None]:
        def saw(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            order.append(name)
            reads[name] = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            gives[name] = main(output)

        return saw

    modules = {name: model.module.get_submodule(name) for name in names}
    handles = (module.register_forward_hook(watch(name), with_kwargs=True) for name, module in modules.items())
    with registered(handles), torch.no_grad():
        batch = inputs.probe(model)
        model.module(**batch) if isinstance(batch, dict) else model.module(batch)
    return order, reads, gives


def _stacks(network: nn.Module, *, strict: bool) -> Iterator[list[str]]:
    """Yield the names of siblings of one class that hold modules of their own.

    Args:
        network: to look through.
        strict: only those in a list, or alone with their kind; a network without any such may still have stages.
    """
    for path, container in network.named_modules():
        kinds = {type(child) for child in container.children()}
        listed = isinstance(container, nn.ModuleList | nn.Sequential)
        if strict and not listed and (len(kinds) != 1 or nn.Sequential in kinds):
            continue
        runs: dict[type, list[str]] = {}
        for leaf, child in container.named_children():
            if next(child.children(), None) is not None:
                runs.setdefault(type(child), []).append(f"{path}.{leaf}" if path else leaf)
        yield from (names for names in runs.values() if len(names) > 1)


def main(output: Any) -> Tensor | None:
    """Return the tensor that a layer hands on: its output, or the first part of it."""
    while isinstance(output, list | tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@contextmanager
def watched(network: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect the output of each layer, in the order of ``names``, of the first forward pass made inside."""
    seen: dict[str, Tensor] = {}
    found: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def saw(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = main(output)
            assert tensor is not None
            seen.setdefault(name, tensor)

        return saw

    with registered(network.get_submodule(name).register_forward_hook(watch(name)) for name in names):
        yield found
        found += [seen[name] for name in names]


@contextmanager
def tapped(network: nn.Module, names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Show what each layer reads and gives, in the forward passes made inside, as soon as it has run."""

    def tap(name: str) -> Callable[..., None]:
        def saw(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensor = main(output)
            assert tensor is not None
            see(name, _read(args, kwargs), tensor)

        return saw

    with registered(network.get_submodule(name).register_forward_hook(tap(name), with_kwargs=True) for name in names):
        yield


@contextmanager
def bypassed(network: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let layers hand on what they read, in the forward passes made inside."""

    def skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return in_place_of(output, _read(args, kwargs))

    with registered(network.get_submodule(name).register_forward_hook(skip, with_kwargs=True) for name in names):
        yield


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))


def in_place_of(output: Any, tensor: Tensor) -> Any:
    """Return an output of a layer with another tensor as the main one."""
    if isinstance(output, list | tuple):
        return type(output)([in_place_of(output[0], tensor), *output[1:]])
    return tensor
