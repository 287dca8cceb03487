"""What a model costs: parameters, bytes, multiply-adds, time and memory.

A time is a measurement, so it never comes alone: `latency` interleaves all candidates in one run, one of them twice
(the A/A control), and `speedup` says nothing that the control does not allow.
"""

import ctypes
import gc
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peftc import progress
from peftc.measure.intervals import Interval
from peftc.models.inputs import outputs, probe
from peftc.models.layers import registered
from peftc.models.model import Model
from peftc.report import UNCHANGED

Call = Callable[[], object]
Seconds = dict[str, list[float]]  # of each candidate, one call's in every round

SHORT = 0.005  # seconds; calls below it are repeated until a block lasts BLOCK
BLOCK = 0.010
PRIMED = 0.1  # seconds; above it, finding one's own weights in the caches no longer matters
WARM_UP = 3.0  # seconds per candidate, at most
SETTLED = 0.95  # a call that takes more than this share of the best so far brings nothing new
GAIN = 1.05  # a doubled batch has to raise throughput by this much
LARGEST_BATCH = 256
LONGEST_CALL = 2.0  # seconds
FLOOR = 0.01  # a change below 1 % is never claimed, however quiet the machine
RESAMPLES = 2000


# -- multiply-adds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one sample costs.

    Attributes:
        macs: multiply-adds of products, convolutions and attention; look-ups and element-wise work count nothing.
        by_module: multiply-adds inside each module that has any, its children included, by dotted name.
        positions: how often each Linear, Conv or Embedding weight is applied (rows, pixels, ids); 0 = never called.
        between: for each 2-D convolution, its output rows times input columns.
    """

    macs: int
    by_module: dict[str, int]
    positions: dict[str, int]
    between: dict[str, int]


def work(model: Model, batch: Any = None) -> Work:
    """Count the work of one forward pass over one sample, `probe`'s own if none is given; meta tensors serve too."""
    batch = probe(model) if batch is None else batch
    positions, between, hooks = dict[str, int](), dict[str, int](), []
    for name, child in model.module.named_modules():
        weight = child._parameters.get("weight")
        if weight is None or weight.ndim < 2:
            continue
        positions[name] = 0
        axis = 1 if isinstance(child, nn.modules.conv._ConvNd) else -1

        def add(child: nn.Module, inputs: Any, output: Any, name: str = name, axis: int = axis) -> None:
            if isinstance(output, Tensor):
                positions[name] += output.numel() // output.shape[axis]
            if isinstance(child, nn.Conv2d) and inputs:
                between[name] = between.get(name, 0) + output.shape[-2] * inputs[0].shape[-1]

        hooks.append(child.register_forward_hook(add))
    with (
        registered(hooks),
        without_fused_layers(),
        sdpa_kernel(SDPBackend.MATH),  # as two products: no counter knows every fused kernel of every torch
        ExitStack() as after,
        FlopCounterMode(display=False) as counter,
    ):
        for parameter in model.module.parameters():  # the counter puts gradient hooks on any that has a gradient
            after.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        outputs(model, batch)
    by_name = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    by_module = {name.partition(".")[2]: macs for name, macs in by_name.items() if "." in name}
    return Work(by_name.get("Global", 0), by_module, positions, between)


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Switch off torch's fused transformer layer, an operation that neither counters nor other runtimes know."""
    with ExitStack() as after:
        after.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield


# -- time -------------------------------------------------------------------------------------------------------------


def processor() -> str:
    """Return the name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def latency(calls: Mapping[str, Call], *, rounds: int, device: torch.device, title: str = "timing") -> Seconds:
    """Time all candidates in one interleaved run: seconds per call of each, one entry per round.

    Each round times every candidate once, in an order that makes each follow each other one equally often. Calls under
    5 ms are repeated to a block of at least 10 ms. An untimed call (unless calls last over 0.1 s) goes first, so that
    each candidate finds its own weights in the caches, not those of the one before.
    """
    seconds: Seconds = {label: [] for label in calls}
    gc.collect()
    with ExitStack() as after, progress.track(title, rounds) as advance:
        after.callback(gc.enable if gc.isenabled() else gc.disable)
        gc.disable()
        typical = {label: _warm_up(call, device) for label, call in calls.items()}
        orders = list(islice(permutations(calls), 24))
        for index in range(rounds):
            for label in orders[index % len(orders)]:
                if typical[label] < PRIMED:
                    calls[label]()
                seconds[label].append(_time_block(calls[label], device, typical[label]))
            advance("")
    return seconds


def saturating_batch(forward: Callable[[int], Call], device: torch.device) -> int:
    """Double the batch until throughput gains less than 5 %; ``forward`` makes a call of a batch's size.

    Also ends at 256 samples, before a call would last over 2 s, and where memory runs out.
    """
    best, best_rate, batch = 1, 0.0, 1
    with progress.track("finding the saturating batch") as advance:
        while batch <= LARGEST_BATCH:
            try:
                call = forward(batch)
                typical = _warm_up(call, device)
                seconds = min(_time_block(call, device, typical) for _ in range(3))
            except RuntimeError as error:
                if batch == 1 or not out_of_memory(error):
                    raise
                break
            advance(f"{batch}: {batch / seconds:.1f}/s")
            if batch / seconds < GAIN * best_rate:
                break
            best, best_rate = batch, batch / seconds
            if 2 * seconds > LONGEST_CALL:
                break
            batch *= 2
    return best


def out_of_memory(error: Exception) -> bool:
    """Return whether torch says, in one of its ways, that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


def _time_block(call: Call, device: torch.device, typical: float) -> float:
    repeats = math.ceil(BLOCK / max(typical, 1e-7)) if typical < SHORT else 1
    start = _now(device)
    for _ in range(repeats):
        call()
    return (_now(device) - start) / repeats


def _warm_up(call: Call, device: torch.device) -> float:
    """Call until two calls in a row bring no new best time, and return the best."""
    begin = end = _now(device)
    best, stale = math.inf, 0
    while stale < 2 and end - begin <= WARM_UP:
        start = _now(device)
        call()
        end = _now(device)
        stale = stale + 1 if end - start > SETTLED * best else 0
        best = min(best, end - start)
    return best


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


# -- what may be claimed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speedup:
    """How much quicker a candidate is than its baseline, and what the machine's noise leaves of it.

    Attributes:
        value: median over rounds of baseline time / candidate time.
        low, high: 95 % bootstrap interval of that median.
        noise_low, noise_high: the noise band of the same run, see `noise_band`.
        verdict: ``1.43x faster``, ``1.20x slower`` or ``no measurable change``.
    """

    value: float
    low: float
    high: float
    noise_low: float
    noise_high: float
    verdict: str

    @property
    def counted(self) -> float:
        """The value where it is outside the noise, else 1."""
        return 1.0 if self.verdict == UNCHANGED else self.value


def noise_band(baseline: Sequence[float], control: Sequence[float]) -> tuple[float, float]:
    """Return the ratios (low, high) that the same module shows against itself.

    With m the median over rounds of baseline time / control time and [a, b] its 95 % bootstrap interval, the band is
    exp(-w) to exp(w) for w = max(|log a|, |log b|) + |log m|, and at least 1 % wide on each side.
    """
    middle, low, high = _median_ratio(baseline, control)
    width = max(abs(math.log(low)), abs(math.log(high))) + abs(math.log(middle))
    width = max(width, math.log1p(FLOOR))
    return math.exp(-width), math.exp(width)


def noise_of(run: Seconds) -> dict[str, float]:
    """Return the `noise_band` of a run of ``control`` and ``against``, or ``model`` where nothing is compared."""
    low, high = noise_band(run.get("against", run["model"]), run["control"])
    return {"low": low, "high": high}


def speedup(baseline: Sequence[float], control: Sequence[float], candidate: Sequence[float]) -> Speedup:
    """Compare seconds per round of a baseline, the same baseline again, and a candidate, all of one interleaved run.

    A change is claimed only where the median ratio lies outside `noise_band` and its own 95 % interval excludes 1.
    """
    value, low, high = _median_ratio(baseline, candidate)
    noise_low, noise_high = noise_band(baseline, control)
    verdict = UNCHANGED
    if value > noise_high and low > 1:
        verdict = f"{value:.2f}x faster"
    elif value < noise_low and high < 1:
        verdict = f"{1 / value:.2f}x slower"
    return Speedup(value, low, high, noise_low, noise_high, verdict)


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    ratios = torch.tensor([a / b for a, b in zip(above, below, strict=True)], dtype=torch.float64)  # (rounds,)
    chosen = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=torch.Generator().manual_seed(0))
    medians = ratios[chosen].quantile(0.5, dim=1)  # (RESAMPLES,)
    return Interval(float(ratios.quantile(0.5)), float(medians.quantile(0.025)), float(medians.quantile(0.975)))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of all stay under; between two of them it rises evenly."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


# -- memory -----------------------------------------------------------------------------------------------------------


def working_memory(call: Call, device: torch.device) -> int | None:
    """Return the bytes that one call needs at its peak, over those held before it; None where nothing can tell.

    CUDA is asked for its allocator's peak. On Linux the kernel's high-water mark of the resident set is reset and read,
    after what earlier calls left free in the heap has gone back to the system.
    """
    call()  # so that weights mapped from a file are resident and kernels loaded
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resting = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or a sandbox that hides /proc
        return None
    call()
    return max(0, _resident("VmHWM") - resting)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that this process has held: of the device's allocator, or of its resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
