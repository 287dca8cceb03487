"""A base network on the meta device, and what is known about it before its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from peftc.models.weights import Weights


@dataclass
class Base:
    """A base network and where its weights are; ``weights`` is None when the network already holds them."""

    module: nn.Module
    library: str
    name: str
    record: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    weights: Weights | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build networks whose parameters take no memory, while buffers, which may be computed, stay real.

    A parameter that is already on the meta device is kept as the same object, so ties made by constructors survive.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that ``make`` builds, its parameters on the meta device.

    A constructor that looks into its own parameters cannot run there: it runs for real, and the parameters are let go.
    """
    try:
        with parameters_on_meta():
            network = make()
        computed = not any(buffer.is_meta for buffer in network.buffers())  # some take the device of a parameter
        if computed and not any(parametrize.is_parametrized(module) for module in network.modules()):
            return network
    except (NotImplementedError, RuntimeError):
        pass  # run it for real; what is wrong for another reason fails there again
    network = make()
    moved: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)
    return network
