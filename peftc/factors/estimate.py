"""What carrying out a plan will take: memory and time, counted from shapes and a rate measured in a moment. Estimates.

Counted are eigenproblems and products of the factors, and the passes of a calibration; building and checking a network
take a second or so that nothing here knows of.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from peftc.calibration import memory, statistics
from peftc.calibration.collection import DRAWS, Statistics
from peftc.calibration.prepared import Prepared
from peftc.errors import PlanError
from peftc.factors.factoring import Factoring
from peftc.measure import costs
from peftc.models.inputs import run
from peftc.models.model import Model, detached
from peftc.plans.plan import Target
from peftc.report import Report, size
from peftc.tasks.task import batches

PROBE = 384  # side of the eigenproblem and of the product that are timed
DOUBLE = 8  # bytes
COPIES = 6  # float64 matrices of a module's shape, and of each eigenproblem's, that live at once while it is solved
SUMS = 3  # running sums that live at once: of a lane, of all before it, and what is stored of them
LIVE = 4  # outputs that live at once in a pass without gradients
PRODUCTS = 6  # products of weight by small side for the factors, their balance and their certificate


def _rates(device: torch.device) -> tuple[float, float, float]:
    """Return seconds by the cube of the side: of an eigenproblem and a product in float64, and of one in float32."""
    matrix = torch.randn(PROBE, PROBE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    square, single = matrix @ matrix.T, matrix.float()

    def seconds(call: Any) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            float(call().flatten()[0])  # reading a number off the result waits for a device
            times.append(time.perf_counter() - start)
        return min(times[1:]) / PROBE**3

    return (
        seconds(lambda: torch.linalg.eigh(square)[0]),
        seconds(lambda: matrix @ matrix),
        seconds(lambda: single @ single),
    )


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


def add(report: Report, work: Factoring, source: Prepared | Statistics | None) -> None:
    """Add estimates of peak memory and seconds to the report of a dry run."""
    eigen, product, single = _rates(work.device)
    needs, seconds, peak = work.factorize.needs, 0.0, 0
    for target in work.targets.values():
        out, in_ = statistics.matrix_shape(target)
        seconds += sum(side**3 for side in eigenproblems(target, needs)) * eigen
        seconds += PRODUCTS * out * in_ * min(out, in_) * product
        peak = max(peak, solving(target, needs))
    if isinstance(source, Prepared):
        held, multiplied = _calibration(work, source)
        peak = max(peak, held)
        seconds += multiplied * single
    found = {"peak_memory_bytes": int(float(f"{peak:.2g}")), "seconds": float(f"{seconds:.2g}")}
    report.data["estimate"] = found
    report.notes.append(
        f"estimated for the real run, beside what its imports take: about {size(found['peak_memory_bytes'])} of memory "
        f"at the peak, {found['seconds']:g} s on this machine"
    )


def _calibration(work: Factoring, source: Prepared) -> tuple[int, float]:
    """Return bytes, of the running sums and what a batch leaves for its backward pass, and multiply-adds.

    They are counted on the meta device, with the batch of the longest samples for all of them in proportion.
    """
    encoded, needs = source.encoded, work.factorize.needs
    runs, lengths = batches(encoded.lengths, encoded.size, source.request.batch_size), encoded.lengths
    longest = runs[-1 if lengths else 0]
    inputs = encoded.batch(longest).inputs
    meta = {key: each.to("meta") for key, each in inputs.items()} if isinstance(inputs, dict) else inputs.to("meta")
    subject = replace(source.model, module=detached(source.model.module).to("meta"))
    there = max(lengths[each] for each in longest) * len(longest) if lengths else len(longest)
    share = (sum(lengths) if lengths else encoded.size) / there
    gradients = any(need in statistics.OF_GRADIENTS for need in needs)
    counted = costs.work(subject, meta)
    outer, sums = 0, 0
    for name, target in work.targets.items():
        out, in_ = statistics.matrix_shape(target)
        side = min(out, in_) if "second_moment" in needs else 0
        gram = out if "output_gradient_gram" in needs and out <= statistics.LARGEST_GRAM else 0
        outer += counted.positions.get(name, 0) * (side**2 + DRAWS * gram**2)
        sums += DOUBLE * (side**2 + gram**2)
    multiplied = counted.macs * (1 + 2 * DRAWS if gradients else 1) + outer
    return SUMS * sums + _activations(subject, meta, gradients=gradients), multiplied * share


def _activations(model: Model, inputs: Any, *, gradients: bool) -> int:
    """Return the bytes that a forward pass keeps for a backward pass; without one, those of the largest outputs."""
    with torch.enable_grad(), memory.saved(model.module) as kept:
        outputs = run(model.module, inputs)
    del outputs
    return sum(kept.values()) if gradients else max(kept.values(), default=0) * LIVE
