"""Where a network's layers are: the residual blocks that run one after the other.

A layer is found by what it does, not by its name: siblings of one class that hold modules of their own, each reading
what the one before it gave, some of them adding to it. Of stacks within stacks the inner ones are meant, as the blocks
in a stage of Swin; but not the convolutions in a block of a ResNet, which add to nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from peftc.models import inputs
from peftc.models.model import Model
from peftc.nn.skipped import first_tensor

WEIGHTED = ("Addmm", "Mm", "Bmm", "Convolution", "Embedding", "Attention")  # in autograd's names of what multiplies


@contextmanager
def registered(handles: Iterable[Any]) -> Iterator[None]:
    """Register hooks, and remove them again."""
    with ExitStack() as kept:
        for handle in handles:
            kept.callback(handle.remove)
        yield


def layers(model: Model) -> list[str]:
    """Return the dotted names of the layers of a runnable model, in the order in which a random input meets them."""
    if model.shards is not None:
        return list(model.shards.layers)
    if model.manifest is not None and model.manifest.skipped:  # they have gaps, and keep their names
        return list(model.manifest.kept_layers)
    own, any_parent = (list(_stacks(model.module, strict=strict)) for strict in (True, False))
    flow = _Flow(model, {name for stack in any_parent for name in stack})
    for stacks in (own, any_parent):
        chains = [chain for stack in stacks if (chain := flow.chained(stack))]
        adding = [chain for chain in chains if any(flow.adds(name) for name in chain)]
        kept = {name for chain in adding or chains for name in chain}
        if kept:
            found = [name for name in flow.order if name in kept]
            return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return []


class _Flow:
    """In which order modules run on a random input, what each reads and what it gives."""

    def __init__(self, model: Model, names: set[str]) -> None:
        self.order: list[str] = []
        self.reads: dict[str, Tensor | None] = {}
        self.gives: dict[str, Tensor | None] = {}  # both are kept alive, so that identity means what it says
        self.starts: dict[str, Any] = {}  # nodes of autograd
        modules = {name: model.module.get_submodule(name) for name in names}
        before = [
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            for name, module in modules.items()
        ]
        with registered(before), seen(model.module, names, self._leave), torch.enable_grad():
            _run(model)

    def _enter(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = first_tensor(args, kwargs)
        self.reads[name] = read
        if read is None or not read.is_floating_point():
            return None
        followed = read if read.requires_grad else read.detach().requires_grad_() * 1
        self.starts[name] = followed.grad_fn
        swap = [followed if each is read else each for each in args]
        return tuple(swap), {key: followed if each is read else each for key, each in kwargs.items()}

    def _leave(self, name: str, _read: Tensor, output: Any) -> None:
        self.order.append(name)
        self.gives[name] = main(output)

    def chained(self, stack: Sequence[str]) -> set[str]:
        """Return those of a stack that run once and read what the one before them gave, or are read by the next."""
        ran = [name for name in stack if self.order.count(name) == 1 and self.gives[name] is not None]
        return {name for one, two in pairwise(ran) if self.reads[two] is self.gives[one] for name in (one, two)}

    def adds(self, name: str) -> bool:
        """Return whether what a module reads gets into what it gives without being multiplied with a weight."""
        start, given = self.starts.get(name), self.gives[name]
        left = [given.grad_fn] if given is not None and start is not None else []
        known = set()
        while left:
            node = left.pop()
            if node is start:
                return True
            if node is not None and node not in known and not any(word in node.name() for word in WEIGHTED):
                known.add(node)
                left += [before for before, _ in node.next_functions]
        return False


def _run(model: Model) -> None:
    batch = inputs.probe(model)
    with inputs.taken(model):
        inputs.run(model.module, batch)


def _stacks(network: nn.Module, *, strict: bool) -> Iterator[list[str]]:
    """Yield names of siblings of one class that hold modules; strictly, those in a list or alone with their kind."""
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
def seen(network: nn.Module, names: Iterable[str], see: Callable[[str, Tensor, Any], Any]) -> Iterator[None]:
    """Show ``see`` name, input and output of each layer that runs inside; what it returns, if any, replaces that."""

    def hook(name: str) -> Callable[..., Any]:
        return lambda _module, args, kwargs, output: see(name, first_tensor(args, kwargs), output)

    with registered(network.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names):
        yield


@contextmanager
def tapped(network: nn.Module, names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Show what each layer reads and what it hands on, in the forward passes made inside, as soon as it has run."""

    def saw(name: str, read: Tensor, output: Any) -> None:
        tensor = main(output)
        assert tensor is not None
        see(name, read, tensor)

    with seen(network, names, saw):
        yield


@contextmanager
def watched(network: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect the output of each layer, in the order of ``names``, of the first forward pass made inside."""
    first: dict[str, Tensor] = {}
    found: list[Tensor] = []

    def saw(name: str, _read: Tensor, given: Tensor) -> None:
        first.setdefault(name, given)

    with tapped(network, names, saw):
        yield found
        found += [first[name] for name in names]


def bypassed(network: nn.Module, names: Sequence[str]) -> AbstractContextManager[None]:
    """Let layers hand on what they read, in the forward passes made inside."""
    return seen(network, names, lambda _name, read, output: in_place_of(output, read))


def tuples(model: Model, names: Sequence[str]) -> dict[str, list[int]]:
    """Return the lengths of the tuples, from the outer one, that the main output of each layer stands first in."""
    found: dict[str, list[int]] = {}

    def saw(name: str, _read: Tensor, output: Any) -> None:
        found[name] = []
        while isinstance(output, list | tuple):
            found[name].append(len(output))
            output = output[0]

    with seen(model.module, names, saw), torch.no_grad():
        _run(model)
    return found


def in_place_of(output: Any, tensor: Tensor) -> Any:
    """Return an output of a layer with another tensor as the main one."""
    if isinstance(output, list | tuple):
        return type(output)([in_place_of(output[0], tensor), *output[1:]])
    return tensor
