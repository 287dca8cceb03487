"""Networks on the meta device, no larger than the weights beside their config allow."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from peftc.errors import SourceError
from peftc.models.inputs import DOES_NOT_RUN
from peftc.store.manifest import Manifest

# what a constructor of another library may raise on a configuration that it does not understand
UNBUILDABLE = (*DOES_NOT_RUN, OSError, MemoryError)


@dataclass
class Limits:
    """What a config may ask for: a network that is some times as large as the weights beside it.

    A config that says ten million layers would otherwise be built until the memory is full.
    """

    stored: int  # bytes of the weight files
    entries: int = 0  # of the parameters that were built so far
    parameters: int = 0  # number of them

    @property
    def most_bytes(self) -> int:
        """Bytes of all parameters, and of any one tensor that a constructor makes: files may hold 4 bits for 32."""
        return max(SMALL, 16 * self.stored)

    @property
    def most_parameters(self) -> int:
        """Number of parameters, most of which have many entries."""
        return 5_000 + self.stored // 1000

    def count(self, parameter: nn.Parameter) -> None:
        """Take note of a parameter that was built (SourceError: there are too many)."""
        self.entries += parameter.numel()
        self.parameters += 1
        if self.parameters > self.most_parameters or 4 * self.entries > self.most_bytes:
            raise self.refusal(f"{self.parameters:,} parameters of {self.entries:,} entries and more")

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse more layers than there can be parameters, as constructors may list them all first (SourceError)."""
        for name, value in config.items():
            if isinstance(value, dict):
                self.check(value)
            numbers = value if isinstance(value, list) else [value]
            if COUNTS.search(name) and any(type(n) is int and n > self.most_parameters for n in numbers):
                raise self.refusal(f"`{name}` {value}")

    def refusal(self, what: str) -> SourceError:
        """Return the refusal of a config that asks for ``what``."""
        return SourceError(
            f"the config asks for {what}",
            why=f"its weights have {self.stored:,} bytes: at most {self.most_parameters:,} parameters and "
            f"{self.most_bytes:,} bytes are built for them",
            hint="look at the numbers of layers and the sizes in it",
        )


COUNTS = re.compile(r"(^|_)(layers?|depths?|blocks?)$")
SMALL = 512 * 1024 * 1024  # bytes that any config may ask for
MAKE = "arange empty eye full linspace logspace ones rand randint randn zeros"
FILL = "add_ clamp_ erfinv_ fill_ mul_ normal_ uniform_ zero_"
FACTORIES = {getattr(torch, name) for name in MAKE.split()}
FILLS = {getattr(Tensor, name) for name in FILL.split()}


class _Watching(TorchFunctionMode):
    """Refuse a tensor that is larger than the limits allow before it takes memory, and fill none on the meta device.

    What is there holds no numbers, and torch takes milliseconds to draw none for a parameter.
    """

    def __init__(self, limits: Limits | None) -> None:
        super().__init__()
        self.limits = limits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in FILLS and args[0].is_meta:
            return args[0]
        if self.limits is not None and function in FACTORIES and not kwargs.keys() & {"out", "generator"}:
            empty = function(*args, **{**kwargs, "device": "meta"})
            if empty.nbytes > self.limits.most_bytes:
                raise self.limits.refusal(f"a tensor of {empty.nbytes:,} bytes")
        return function(*args, **kwargs)


@contextmanager
def parameters_on_meta(limits: Limits | None = None, *, meta: bool = True) -> Iterator[None]:
    """Build networks whose parameters stay within the limits and, unless ``meta`` is False, take no memory.

    Buffers, which may be computed, stay real. A parameter that is already on the meta device is kept as the same
    object, so ties made by constructors survive.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and limits is not None:
            limits.count(param)
        if param is not None and meta and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with _Watching(limits):
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def on_meta(
    make: Callable[[], nn.Module], stored: int | None = None, config: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return the network that ``make`` builds, its parameters on the meta device (SourceError: it is far too large).

    A constructor that looks into its own parameters cannot run there: it runs for real, and the parameters are let go.

    Args:
        stored: bytes of the weights that are to fill it, where a file says what to build: `Limits` follow from them.
        config: what that file says.
    """
    if stored is not None:
        Limits(stored).check(config or {})
    try:
        with parameters_on_meta(None if stored is None else Limits(stored)):
            network = make()
        computed = not any(buffer.is_meta for buffer in network.buffers())  # some take the device of a parameter
        if computed and not any(parametrize.is_parametrized(module) for module in network.modules()):
            return network
    except (NotImplementedError, RuntimeError):
        pass  # run it for real; what is wrong for another reason fails there again
    with parameters_on_meta(None if stored is None else Limits(stored), meta=False):
        network = make()
    moved: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)
    return network


def stored_in(folder: Path, record: Manifest | None = None) -> int | None:
    """Return the bytes of the weights that a folder's config is about; None where they are elsewhere, as on a hub.

    Args:
        record: of an artifact: its base may have had many times as many, and a delta leaves most of them elsewhere.
    """
    if record is not None:
        return 50 * max(record.weight_bytes, 4 * record.parameters)
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")) or None
