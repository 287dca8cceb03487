"""Measure what factors do to the outputs: each module's own, to correct the predicted losses, and those of whole plans.

A method's loss is a second-order, module-by-module prediction. Here every module is cut to one rank, alone, and the
divergence of the model's outputs from the dense model's is measured on a few other samples; the whole curve of
that module is then scaled by measured / predicted. One evaluation per module bounds the cost.

What a module loses alone and a little says too little of deep cuts in some networks: of ResNet-20 at half its weights
the correction kept 0.39 top-1 where the prediction kept 0.76. So both plans, and one between, are tried as a whole.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from peftc import progress
from peftc.calibration.collection import Statistics
from peftc.calibration.prepared import Prepared
from peftc.factors import joint
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import Ranks
from peftc.measure.intervals import Interval, bootstrap
from peftc.methods.spectrum import Spectrum
from peftc.models import inputs
from peftc.models.place import dtype_of, moved
from peftc.models.weights import save_part
from peftc.nn import lowrank
from peftc.nn.lowrank import Factors
from peftc.plans import allocate
from peftc.plans.plan import Target
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


@dataclass(frozen=True)
class Trial:
    """Samples that nothing is calibrated on, and what the network loses on them with factors in it."""

    work: Factoring  # with statistics; its network is not changed
    prepared: Prepared  # the calibration set, and a runnable copy of the model
    sensitivity: int  # samples for the measurement of one module, at most; whole plans are tried on four times as many
    folder: Path  # where measurements are kept for a resume

    @property
    def samples(self) -> int:
        """How many samples plans are tried on."""
        return min(WHOLE * self.sensitivity, self.prepared.tried.size)

    @property
    def fits(self) -> bool:
        """Whether the products of all modules can be held at once, beside the model."""
        limit = self.work.model.max_memory
        return limit is None or PRODUCT * sum(target.entries for target in self.work.targets.values()) < limit // 2

    def alone(self) -> dict[str, tuple[Tensor, float]]:
        """Return (k + 1,) squared errors by rank of every module as predicted, and what one measurement scales them by.

        One module at a time is cut, and measured by the samples' divergence from the dense model.
        """
        path = self.folder / KEPT
        scales: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        losses: dict[str, tuple[Tensor, float]] = {}
        batches, dense = self.batches(self.sensitivity), list[Tensor]()
        with progress.track("sensitivity", len(self.work.targets)) as advance:
            for name, target in self.work.targets.items():
                found = self.work.spectrum(target)
                if name not in scales:
                    dense = dense or self._dense(batches, self.folder)
                    scales[name] = self._scale(target, found, batches, dense)
                    artifact.write_bytes(path, json.dumps(scales).encode())
                losses[name] = found.losses().cpu(), scales[name]
                del found  # before the next one is solved
                advance(name)
        return losses

    def lost(self, ranks: Ranks) -> Interval:
        """Return the divergence, in nats, of the model with all modules cut: per token of text, else per sample."""
        batches = self.batches(self.samples)
        dense = self._dense(batches, self.folder / f"whole-{self.samples}")
        with ExitStack() as held:
            for name, rank in ranks.items():
                if rank is not None:
                    target = self.work.targets[name]
                    held.enter_context(self.cut(target, self.work.spectrum(target), rank))
            each = self._divergences(batches, dense).numpy() / tokens_of(self.work)
        return bootstrap(lambda rows: float(each[rows].mean()), len(each), seed=self.prepared.request.seed)

    def batches(self, samples: int) -> list[Batch]:
        """Return so many of the samples, at most, spread over them, as many at once as in the calibration."""
        tried, known = self.prepared.tried, self.work.factorize.statistics
        assert known is not None
        some = tried.some(tried.spread(min(samples, tried.size)))
        return [some.batch(run) for run in in_batches(some.lengths, some.size, known.batch_size)]

    def _dense(self, batches: list[Batch], folder: Path) -> list[Tensor]:
        """Return the dense model's outputs for every batch, kept in files and mapped, for they may be large."""
        folder.mkdir(exist_ok=True)
        parts = [folder / f"outputs-{number:05d}.safetensors" for number in range(len(batches))]
        for part, batch in zip(parts, batches, strict=True):
            if not part.is_file():
                save_part(part, {"outputs": outputs(self.prepared, batch)}, {})
        return [load_file(part)["outputs"] for part in parts]

    def _divergences(self, batches: list[Batch], dense: list[Tensor]) -> Tensor:
        """Return (samples,) divergences of what the model gives now from what the dense one gave, on the CPU."""
        parts = []
        for before, batch in zip(dense, batches, strict=True):
            now = outputs(self.prepared, batch)
            parts.append(divergence(self.prepared.task, before.to(now.device), now, batch.inputs))
        return torch.cat(parts).cpu()

    def _scale(self, target: Target, found: Spectrum, batches: list[Batch], dense: list[Tensor]) -> float:
        """Return the measured divergence over the predicted one, of one module at one rank."""
        rank, losses = rank_of(target), found.losses()
        predicted = float(losses[rank]) / 2
        if predicted <= FAINT * float(losses[0]) / 2:
            return 1.0
        with self.cut(target, found, rank):
            seen = float(self._divergences(batches, dense).mean())
        return min(max(seen / predicted, 1 / LARGEST), LARGEST)

    @contextmanager
    def cut(self, target: Target, found: Spectrum, rank: int) -> Iterator[None]:
        """Give a module, or every member of a group, the product of its factors as weight within a context."""
        network: Any = self.prepared.model.module
        factors = found.truncate(rank).factors
        before: list[tuple[Any, Tensor]] = []
        for at, up in enumerate(factors.up.split(target.outs or len(factors.up))):
            one = joint.member(self.work.model, target, at) if target.members else target
            module, mine = network.get_submodule(one.name), Factors(up, factors.down)
            product = lowrank.dense_weight(lowrank.tensors(mine, one.shape, one.form), one.shape, one.form)
            bias = self.work.corrected_bias(one, mine)
            changes = [(module.weight, product), *([] if bias is None else [(module.bias, bias)])]
            before += [(parameter, parameter.data) for parameter, _ in changes]
            for parameter, tensor in changes:
                parameter.data = tensor.to(parameter.device, dtype_of(network))
        try:
            yield
        finally:
            for parameter, data in before:
                parameter.data = data


def trial_of(work: Factoring, source: Prepared | Statistics | None, samples: int, folder: Path) -> Trial | None:
    """Return what ranks are tried on; None where no samples are there or wanted, or losses are no divergences."""
    if not samples or not isinstance(source, Prepared) or not is_in_nats(work):
        return None
    return Trial(work, source, samples, folder)


def tokens_of(work: Factoring) -> float:
    """Return the tokens of a sample, where the model is one of language: what it loses is said of each; else 1."""
    known, task = work.factorize.statistics, guess(work.model)
    if known is None or task is None or not task.is_language:
        return 1.0
    return float(known.note["rows"] / known.note["samples"])


def rank_of(target: Target) -> int:
    """Return the rank at which a module is tried."""
    return max(1, int(SHARE * allocate.break_even_rank(target.shape, target.form)))


def outputs(prepared: Prepared, batch: Batch) -> Tensor:
    """Return what the model gives for a batch."""
    return inputs.outputs(prepared.model, moved(prepared.model, batch.inputs))


def is_in_nats(work: Factoring) -> bool:
    """Return whether the losses of a method count divergence from the dense model."""
    return "output_gradient_gram" in work.factorize.needs
