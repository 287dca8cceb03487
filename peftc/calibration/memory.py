"""Fit a calibration into memory: how many samples at once, and which modules in which pass over the calibration set.

What a forward (and backward) pass holds is measured on one and on two samples, tensor by tensor, so that it does not
depend on the moment. The sums of all modules may be larger than the memory; then each pass collects those of some.
"""

import ctypes
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftc.calibration import statistics
from peftc.calibration.statistics import Collector
from peftc.errors import PlanError, UsageError
from peftc.models.model import Model
from peftc.models.place import place_of
from peftc.report import SIZES, scaled
from peftc.report import size as bytes_text
from peftc.store import artifact

FILE = "passes.json"
PROCESS = 500_000_000  # bytes that Python and its libraries hold, at most as a rule: fixed, to decide the same again
SPARE = 0.85  # of what is left; the rest is for work space inside kernels and for holes in the heap
LARGE = 50_000_000  # parameters, from which on it is looked at what a pass takes where no limit was set
PASS = 1_500_000_000  # bytes that it may take then
MMAP_THRESHOLD = -3  # of glibc's mallopt
SMALL = 1 << 16  # bytes; what is larger goes back to the system when it is freed


def bounded(model: Model, max_memory: str | float | None) -> Model:
    """Return a model that remembers what running it may take; what is freed goes back to the system from now on.

    Raises:
        UsageError: that is no number of bytes, with a unit or without.
    """
    try:
        found = replace(model, max_memory=None if max_memory is None else scaled(str(max_memory), SIZES))
    except ValueError as error:
        raise UsageError(f"`--max-memory {max_memory}` {error}", hint="write it as `--max-memory 8GB`") from None
    return_freed(found)
    return found


def return_freed(model: Model) -> None:
    """Let glibc give back to the system what is free, and larger blocks once they are, where memory is limited.

    Of a large model on the CPU it gives back what is free now, limit or not, as a calibration leaves gigabytes.

    Without, the copies of half-precision weights and the small tensors of a backward pass leave holes in the heap that
    count as taken. Aligned blocks as torch asks for leave many (glibc before 2.38 cannot fill such a hole again with a
    block of its own size): with blocks up to 1 MB in the heap it grew by 400 MB in passes that held 97 MB at most.
    """
    if model.max_memory is None and not _is_wide(model):
        return
    try:
        library = ctypes.CDLL(None)
        if model.max_memory is not None:
            library.mallopt(MMAP_THRESHOLD, SMALL)
        library.malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def planned(
    collector: Collector, order: Sequence[int], batch_size: int, run: Callable[[list[int]], None], folder: Path
) -> tuple[int, list[list[str]]]:
    """Return how many samples to calibrate on at once, and the names of the modules that each pass is over.

    All of it fits into the model's memory, or is refused as PlanError; what was decided before in ``folder`` stays.
    Without a limit all modules are in one pass, and a large model on the CPU runs fewer samples at once.

    Args:
        collector: of what is asked for; it keeps nothing.
        order: of the samples, longest last.
        batch_size: samples at once, at most.
        run: a pass over some samples as one batch, watched by the collector.
        folder: of the job.
    """
    model = collector.model
    path, everything = folder / FILE, [list(collector.sites)]
    if model.max_memory is None and not (collector.gradients and _is_wide(model)):
        return batch_size, everything
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["batch_size"], found["groups"]
    if model.max_memory is None:
        with saved(model.module) as kept:
            run(list(order[-1:]))
        batch_size = max(1, min(batch_size, PASS // max(sum(kept.values()), 1)))
        artifact.write_json(path, {"batch_size": batch_size, "groups": everything})
        return batch_size, everything
    highest = []
    for samples in (1, 2):
        with _Held(model.module) as held:
            run(list(order[-samples:]))
        return_freed(model)
        highest.append(held.highest)
    one, two = highest
    each = max(two - one, one // 8, 1)
    batch_size, groups = _fitted(model, _units(collector), max(one - each, 0), each, batch_size)
    artifact.write_json(path, {"batch_size": batch_size, "groups": groups})
    return batch_size, groups


def _is_wide(model: Model) -> bool:
    """Return whether a pass of a few samples on the CPU may take gigabytes, which more samples at once would not repay.

    A device has memory of its own, and is idle with few.
    """
    entries = sum(parameter.numel() for parameter in model.module.parameters())
    return place_of(model.module).type == "cpu" and entries >= LARGE


@contextmanager
def saved(network: nn.Module) -> Iterator[dict[int, int]]:
    """Count the bytes, by storage, that forward passes inside keep for a backward pass, the network's own apart.

    A storage is known by its own address, as those of meta tensors have no memory.
    """
    own = {each.untyped_storage()._cdata for each in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _fitted(
    model: Model, units: Mapping[str, tuple[list[str], int]], fixed: int, each: int, batch_size: int
) -> tuple[int, list[list[str]]]:
    """Choose the batch size, then fill one pass after another."""
    assert model.max_memory is not None
    own = held_before(place_of(model.module))
    free = int((model.max_memory - own) * SPARE)
    total, largest = (function(size for _, size in units.values()) for function in (sum, max))
    if fixed + each + largest > free:
        name = next(name for name, (_, size) in units.items() if size == largest)
        needed = own + int((fixed + each + largest) / SPARE) + 1
        raise PlanError(
            f"`--max-memory` {bytes_text(model.max_memory)} is too little to calibrate `{model.name}`",
            why=f"one sample takes {bytes_text(fixed + each)}, the sums of `{name}` {bytes_text(largest)}, and "
            f"{bytes_text(own)} is held before",
            hint=f"ask for `--max-memory {-(-needed // 10**6)}MB`, or take shorter samples",
        )
    if fixed + batch_size * each + total <= free:
        return batch_size, [[name for names, _ in units.values() for name in names]]
    room = min(free - largest, max(free // 2, fixed + each))
    batch_size = max(1, min(batch_size, (room - fixed) // each))
    left = free - fixed - batch_size * each
    groups: list[list[str]] = []
    taken = left + 1
    for names, size in units.values():
        if taken + size > left:
            groups.append([])
            taken = 0
        groups[-1] += names
        taken += size
    return batch_size, groups


def _units(collector: Collector) -> dict[str, tuple[list[str], int]]:
    """Return, by leader, the modules that are collected together and the bytes of their sums."""
    units: dict[str, tuple[list[str], int]] = {}
    needs = collector.needs
    for name, site in collector.sites.items():
        out, in_ = statistics.matrix_shape(site.target)
        names, size = units.get(site.leader, ([], 0))
        width = {"input": in_ if name == site.leader else 0, "output": out}[site.side]
        size += 8 * (in_ + width * (width + 1) * ("second_moment" in needs))
        if "output_gradient_gram" in needs:
            size += 4 * out * (out + 128) if out <= statistics.LARGEST_GRAM else 8
        units[site.leader] = ([*names, name], size + 16 * in_)
    return units


def held_before(device: torch.device) -> int:
    """Return the bytes that are taken before anything is collected, in coarse steps, to decide the same again."""
    return taken(device) if device.type == "cuda" else -(-taken(device) // 100_000_000) * 100_000_000


def taken(device: torch.device) -> int:
    """Return the bytes that are taken now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return PROCESS
    anonymous = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
    return max(PROCESS, anonymous)


class _Held(TorchDispatchMode):
    """Counts the memory of the tensors that operations return, the network's own apart, until it is given back."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        known = [*network.parameters(), *network.buffers()]
        self.addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.now = self.highest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self.addresses:
            return
        self.addresses.add(address)
        self.now += size
        self.highest = max(self.highest, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self.addresses.discard(address)
        self.now -= size
