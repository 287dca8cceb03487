"""What carrying out a plan will take: memory, and time from what deciding took. Estimates.

Counted from shapes are eigenproblems and products of the factors, at a rate measured in a moment, and what a batch of
the calibration holds; building and checking a network take a second or so that nothing here knows of.
"""

import time
from typing import Any

import torch

from peftc.calibration import memory, statistics
from peftc.calibration.collection import Statistics
from peftc.calibration.prepared import Prepared
from peftc.errors import PlanError
from peftc.factors.factoring import Factoring
from peftc.models import unread
from peftc.models.model import Model
from peftc.models.place import moved
from peftc.plans.plan import Target
from peftc.report import Report, size
from peftc.tasks.task import batches

PROBE = 384  # side of the eigenproblem and of the product that are timed
DOUBLE = 8  # bytes
COPIES = 6  # float64 matrices of a module's shape, and of each eigenproblem's, that live at once while it is solved
SUMS = 3  # running sums that live at once: of a lane, of all before it, and what is stored of them
LIVE = 4  # outputs that live at once in a pass without gradients
PRODUCTS = 6  # products of weight by small side for the factors, their balance and their certificate


def _rates(device: torch.device) -> tuple[float, float]:
    """Return seconds by the cube of the side, of an eigenproblem and of a product in float64."""
    matrix = torch.randn(PROBE, PROBE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    square = matrix @ matrix.T

    def seconds(call: Any) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            float(call().flatten()[0])  # reading a number off the result waits for a device
            times.append(time.perf_counter() - start)
        return min(times[1:]) / PROBE**3

    return seconds(lambda: torch.linalg.eigh(square)[0]), seconds(lambda: matrix @ matrix)


def eigenproblems(target: Target, needs: tuple[str, ...]) -> list[int]:
    """Return the sides of the eigenproblems of one module."""
    out, in_ = statistics.matrix_shape(target)
    if "second_moment" not in needs:
        return [min(out, in_)]
    has_gram = "output_gradient_gram" in needs and max(target.outs or (out,)) <= statistics.LARGEST_GRAM
    return [*([out] if has_gram else []), *([out] if out <= in_ else [in_, in_])]


def solving(target: Target, needs: tuple[str, ...]) -> int:
    """Return the bytes that solving one module takes."""
    out, in_ = statistics.matrix_shape(target)
    return COPIES * DOUBLE * (out * in_ + sum(side**2 for side in set(eigenproblems(target, needs))))


def refuse_unsolvable(work: Factoring) -> None:
    """Refuse, as PlanError, a `--max-memory` in which a module cannot be factored under statistics, even alone."""
    limit, needs = work.model.max_memory, work.factorize.needs
    needed = {name: solving(target, needs) for name, target in work.targets.items()}
    if limit is None or not needed or not needs:  # plain methods take far less
        return
    name = max(needed, key=lambda each: needed[each])
    own, solver = memory.taken(work.device), int(needed[name] / memory.SPARE)
    if own + solver > limit:
        enough = -(-(memory.held_before(work.device) + solver) // 10**7) * 10
        why = f"solving it takes {size(needed[name])}, and {size(own)} is held before"
        hint = f"ask for `--max-memory {enough}MB`, or leave it dense: `--skip {name}`"
        raise PlanError(f"`--max-memory` {size(limit)} is too little to factor `{name}`", why=why, hint=hint)


def add(report: Report, work: Factoring, source: Prepared | Statistics | None, decided: float) -> None:
    """Add estimates of peak memory and seconds to the report of a dry run, which has ``decided`` in so many seconds."""
    eigen, product = _rates(work.device)
    needs, seconds, peak = work.factorize.needs, decided, 0
    for target in work.targets.values():
        out, in_ = statistics.matrix_shape(target)
        seconds += sum(side**3 for side in eigenproblems(target, needs)) * eigen
        seconds += PRODUCTS * out * in_ * min(out, in_) * product
        peak = max(peak, solving(target, needs))
    if isinstance(source, Prepared):
        peak = max(peak, _calibrating(work, source))
    found = {"peak_memory_bytes": int(float(f"{peak:.2g}")), "seconds": float(f"{seconds:.2g}")}
    report.data["estimate"] = found
    report.notes.append(
        f"estimated for the real run, beside what its imports take: about {size(found['peak_memory_bytes'])} of memory "
        f"at the peak, {found['seconds']:g} s on this machine"
    )


def _calibrating(work: Factoring, source: Prepared) -> int:
    """Return the bytes of the running sums and of what a batch of the longest samples leaves for its backward pass.

    One sample is run for that, and counted as often as there are samples in a batch.
    """
    encoded, needs, known = source.encoded, work.factorize.needs, work.factorize.statistics
    longest = batches(encoded.lengths, encoded.size, known.batch_size if known else source.request.batch_size)[-1]
    gradients = any(need in statistics.OF_GRADIENTS for need in needs)
    sums = 0
    for target in work.targets.values():
        out, in_ = statistics.matrix_shape(target)
        side = min(out, in_) if "second_moment" in needs else 0
        gram = out if "output_gradient_gram" in needs and out <= statistics.LARGEST_GRAM else 0
        sums += DOUBLE * (side**2 + gram**2)
    kept = _kept(source.model, encoded.batch(longest[-1:]).inputs)
    return SUMS * sums + len(longest) * (sum(kept) if gradients else max(kept, default=0) * LIVE)


def _kept(model: Model, inputs: Any) -> list[int]:
    """Return the bytes of what a forward pass keeps for a backward pass to all weights."""
    head = unread.head_of(model)
    model.module.requires_grad_(True)
    try:
        with torch.enable_grad(), memory.saved(model.module) as kept:
            outputs = unread.forward(model, moved(model, inputs), head)
        del outputs
    finally:
        model.module.requires_grad_(False)
    return list(kept.values())
