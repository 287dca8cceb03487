"""Measure what each module's own factors do to the outputs, and correct the predicted losses by it.

A method's loss is a second-order, module-by-module prediction. Here every module is cut to one rank, alone, and the
divergence of the model's outputs from the dense model's is measured on a few other samples; the whole curve of
that module is then scaled by measured / predicted. One evaluation per module bounds the cost.

What a module loses alone and a little says too little of deep cuts in some networks: of ResNet-20 at half its weights
the correction kept 0.39 top-1 where the prediction kept 0.76. So both plans, and one between, are tried as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from peftc import progress
from peftc.calibration.prepared import Prepared
from peftc.factors import joint
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import needs_spectra
from peftc.measure.intervals import Interval, bootstrap
from peftc.methods.spectrum import Spectrum
from peftc.models import inputs
from peftc.models.parts import save_part
from peftc.models.place import dtype_of, moved
from peftc.nn import lowrank
from peftc.nn.lowrank import Factors
from peftc.plans import allocate
from peftc.plans.plan import Budget, Target
from peftc.store import artifact
from peftc.tasks.table import guess
from peftc.tasks.task import Batch
from peftc.tasks.task import batches as in_batches
from peftc.tasks.unlabelled import divergence

KEPT = "sensitivity.json"
SHARES = (1.0, 0.5, 0.0)  # of the correction, in the exponent, of the plans that are tried as a whole
WHOLE = 4  # times as many samples as for one module, for plans: they are few, and one sample in ten may hold the loss
SHARE = 0.45  # of the break-even rank, at which a module is tried
FAINT = 1e-6  # of the whole loss, below which both the prediction and the measurement are rounding
PRODUCT = 4  # bytes of an entry of a product of factors
LARGEST = 1e3  # the measured loss may differ from the predicted one by so much, either way


def measured(work: Factoring, prepared: Prepared, samples: int, folder: Path) -> dict[str, tuple[Tensor, float]]:
    """Return (k + 1,) squared errors by rank of every module as predicted, and what one measurement scales them by.

    Args:
        work: with statistics; its network is not changed.
        prepared: the calibration set, and a runnable copy of the model.
        samples: of those kept apart, for each measurement.
        folder: where measurements are kept for a resume.
    """
    path = folder / KEPT
    scales: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found_losses: dict[str, tuple[Tensor, float]] = {}
    known = work.factorize.statistics
    assert known is not None
    batches = samples_of(prepared, samples, known.batch_size)
    dense: list[Tensor] = []
    with progress.track("sensitivity", len(work.targets)) as advance:
        for name, target in work.targets.items():
            found = work.spectrum(target)
            if name not in scales and isinstance(found, Spectrum):
                dense = dense or _dense(prepared, batches, folder)
                scales[name] = _scale(work, prepared, target, found, batches, dense)
                artifact.write_bytes(path.with_suffix(".tmp"), json.dumps(scales).encode())
                path.with_suffix(".tmp").replace(path)
            found_losses[name] = found.losses().cpu(), scales.get(name, 1.0)
            del found  # before the next one is solved
            advance(name)
    return found_losses


def whole(work: Factoring, prepared: Prepared, ranks: Mapping[str, int | None], samples: int, folder: Path) -> Interval:
    """Return the measured divergence, in nats, of the model with all modules cut to ``ranks``.

    Of language models it is that per token, of others per sample.

    Args:
        work, prepared, folder: as for `measured`.
        ranks: of the modules.
        samples: of those kept apart, to measure on.
    """
    known = work.factorize.statistics
    assert known is not None
    batches = samples_of(prepared, samples, known.batch_size)
    dense = _dense(prepared, batches, folder / f"whole-{samples}")
    with ExitStack() as held:
        for name, rank in ranks.items():
            if isinstance(rank, int):
                found = work.spectrum(work.targets[name])
                assert isinstance(found, Spectrum)
                held.enter_context(cut(work, prepared.model.module, work.targets[name], found, rank))
                del found
        each = _divergences(prepared, batches, dense).numpy() / tokens_of(work)
    return bootstrap(lambda rows: float(each[rows].mean()), len(each), seed=prepared.request.seed)


def tokens_of(work: Factoring) -> float:
    """Return the tokens of a sample, where the model is one of language: what it loses is said of each; else 1."""
    known, task = work.factorize.statistics, guess(work.model)
    if known is None or task is None or not task.is_language:
        return 1.0
    return float(known.note["rows"] / known.note["samples"])


def _divergences(prepared: Prepared, batches: list[Batch], dense: list[Tensor]) -> Tensor:
    """Return (samples,) divergences of what the model gives now from what the dense one gave, on the CPU."""
    parts = []
    for one, batch in zip(dense, batches, strict=True):
        now = outputs(prepared, batch)
        parts.append(divergence(prepared.task, one.to(now.device), now, batch.inputs))
    return torch.cat(parts).cpu()


def _dense(prepared: Prepared, batches: list[Batch], folder: Path) -> list[Tensor]:
    """Return the dense model's outputs for every batch, on the CPU; kept in files and mapped, for they may be large."""
    folder.mkdir(exist_ok=True)
    found = []
    for number, batch in enumerate(batches):
        part = folder / f"outputs-{number:05d}.safetensors"
        if not part.is_file():
            save_part(part, {"outputs": outputs(prepared, batch)}, {})
        with safe_open(part, "pt") as file:
            found.append(file.get_tensor("outputs"))
    return found


def number(prepared: Prepared, samples: int) -> int:
    """Return how many samples there are to measure on, where so many were asked for."""
    return min(samples, prepared.tried.size)


def samples_of(prepared: Prepared, samples: int, batch_size: int) -> list[Batch]:
    """Return so many of the samples that plans are tried on, spread over them, in batches."""
    some = prepared.tried.some(prepared.tried.spread(number(prepared, samples)))
    return [some.batch(run) for run in in_batches(some.lengths, some.size, batch_size)]


def _scale(
    work: Factoring, prepared: Prepared, target: Target, found: Spectrum, batches: list[Batch], dense: list[Tensor]
) -> float:
    """Return the measured divergence over the predicted one, of one module at one rank."""
    rank = rank_of(target)
    predicted = float(found.losses()[rank]) / 2
    if predicted <= FAINT * float(found.losses()[0]) / 2:
        return 1.0
    with cut(work, prepared.model.module, target, found, rank):
        seen = float(_divergences(prepared, batches, dense).mean())
    return min(max(seen / predicted, 1 / LARGEST), LARGEST)


def rank_of(target: Target) -> int:
    """Return the rank at which a module is tried."""
    return max(1, int(SHARE * allocate.break_even_rank(target.shape, target.form)))


@contextmanager
def cut(work: Factoring, network: Any, target: Target, found: Spectrum, rank: int) -> Iterator[None]:
    """Give a module, or every member of a group, the product of its factors as weight, for the length of a context."""
    factors = found.truncate(rank).factors
    ups = factors.up.split(target.outs) if target.members else (factors.up,)
    before: list[tuple[Any, Tensor]] = []
    for at, up in enumerate(ups):
        one = joint.member(work.model, target, at) if target.members else target
        module = network.get_submodule(one.name)
        mine = Factors(up, factors.down)
        product = lowrank.dense_weight(lowrank.tensors(mine, one.shape, one.form), one.shape, one.form)
        changes: list[tuple[Any, Tensor | None]] = [(module.weight, product)]
        changes.append((getattr(module, "bias", None), work.corrected_bias(one, mine)))
        for parameter, tensor in changes:
            if tensor is not None:
                before.append((parameter, parameter.data))
                parameter.data = tensor.to(parameter.device, dtype_of(network))
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def outputs(prepared: Prepared, batch: Batch) -> Tensor:
    """Return what the model gives for a batch."""
    return inputs.outputs(prepared.model, moved(prepared.model, batch.inputs))


def is_of_use(work: Factoring, budget: Budget, allocation: str) -> bool:
    """Return whether losses decide the ranks, and are divergences, so that a measured one corrects them."""
    return needs_spectra(budget, allocation) and budget.kind != "energy" and is_in_nats(work)


def is_in_nats(work: Factoring) -> bool:
    """Return whether the losses of a method count divergence from the dense model."""
    return "output_gradient_gram" in work.factorize.needs


def fits(work: Factoring) -> bool:
    """Return whether the products of all modules can be held at once, beside the model."""
    held = PRODUCT * sum(target.entries for target in work.targets.values())
    return work.model.max_memory is None or held < work.model.max_memory // 2
