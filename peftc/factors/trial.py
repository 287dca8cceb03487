"""What a network loses with factors in it, on a few samples that nothing is calibrated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc.calibration.collection import Statistics
from peftc.calibration.prepared import Prepared
from peftc.factors import joint
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import Ranks
from peftc.methods.spectrum import Spectrum
from peftc.models import layers, unread
from peftc.models.inputs import DOES_NOT_RUN
from peftc.models.place import dtype_of, moved
from peftc.models.resumed import Passes
from peftc.models.weights import save_part
from peftc.nn import lowrank
from peftc.nn.lowrank import Factors
from peftc.nn.vocabulary import Logits, Unread
from peftc.plans.plan import Target
from peftc.tasks.table import guess
from peftc.tasks.task import Batch
from peftc.tasks.task import batches as in_batches
from peftc.tasks.unlabelled import divergence

WHOLE = 4  # times as many samples as for one module, for plans: they are few, and one sample in ten may hold the loss
TOKENS = 8192  # of text that plans are tried on, at most
FEWER = 1024  # of text that one module is tried on, at most
FEW = 8  # samples of another kind, at least, that most plans are tried on at first
POSITIONS = 64  # tokens of a window at which logits of a large vocabulary are compared
PRODUCT = 4  # bytes of an entry of a product of factors


@dataclass(frozen=True)
class Tried:
    """Some samples, and what the dense model gives for them: its outputs, and what each of its layers does."""

    batches: list[Batch]
    dense: list[Tensor]  # as `Trial.run` gives it; mapped from files, for they may be large
    passes: Passes
    in_order: bool  # whether the first batches are like the others: not where shorter texts come first


@dataclass(frozen=True)
class Trial:
    """Samples that nothing is calibrated on, and what the network loses on them with factors in it."""

    work: Factoring  # with statistics; its network is not changed
    prepared: Prepared  # the calibration set, and a runnable copy of the model
    sensitivity: int  # samples for the measurement of one module, at most; whole plans are tried on four times as many
    folder: Path  # where measurements are kept for a resume

    @cached_property
    def samples(self) -> int:
        """How many samples plans are tried on."""
        most = min(WHOLE * self.sensitivity, self._windows(TOKENS))
        return min(max(most, self.singles), self.prepared.tried.size)

    @property
    def singles(self) -> int:
        """How many samples one module is tried on, at most."""
        return min(self.sensitivity, self._windows(FEWER))

    @property
    def few(self) -> int:
        """How many samples most plans are tried on at first."""
        return min(max(self.samples // 4, min(FEW, self._windows(TOKENS // 4))), self.samples)

    def _windows(self, tokens: int) -> int:
        """Return in how many samples there are so many tokens, one at least; of what is no text, any number."""
        own = tokens_of(self.work)
        return max(int(tokens // own), 1) if own > 1 else self.prepared.tried.size

    @property
    def fits(self) -> bool:
        """Whether the products of all modules can be held at once, beside the model."""
        limit = self.work.model.max_memory
        return limit is None or PRODUCT * sum(target.entries for target in self.work.targets.values()) < limit // 2

    @cached_property
    def head(self) -> nn.Linear | None:
        """The head whose logits are compared in parts; None where they are whole, or where it may be factored."""
        names = (name for target in self.work.targets.values() for name in (target.name, *target.aliases))
        return unread.head_of(self.prepared.model, names)

    @cached_property
    def layers(self) -> list[str]:
        """The model's layers, in running order; none where it has none."""
        try:
            return layers.layers(self.prepared.model)
        except DOES_NOT_RUN:
            return []

    @cached_property
    def trusted(self) -> dict[int, bool]:
        """From which layers on the model was seen to give what a whole pass gives, and from which not."""
        return {}

    def passes(self, folder: Path) -> Passes:
        """Return passes of the model, kept in a folder."""
        return Passes(self.prepared.model, self.layers, folder, self.trusted)

    def layer_of(self, target: Target) -> int:
        """Return the first layer that a target, or one that shares its weight or factor, is in."""
        passes = self.passes(self.folder)
        return min(passes.layer_of(name) for name in (target.name, *target.aliases, *target.members))

    # -- samples ------------------------------------------------------------------------------------------------------

    def on(self, samples: int, folder: Path, *, keep: bool = False) -> Tried:
        """Return so many of the samples, at most, spread over them, as many at once as in the calibration.

        With ``keep`` what each layer gives is kept, to start from.
        """
        tried, known = self.prepared.tried, self.work.factorize.statistics
        assert known is not None
        some = tried.some(tried.spread(min(samples, tried.size)))
        batches = [some.batch(run) for run in in_batches(some.lengths, some.size, known.batch_size)]
        folder.mkdir(exist_ok=True)
        passes = self.passes(folder / "passes")
        dense, _ = [], self.head  # found before anything watches the model
        for at, batch in enumerate(batches):
            part = folder / f"outputs-{at:05d}.safetensors"
            if keep:
                save_part(part, {"outputs": passes.record(at, partial(self.run, batch)).contiguous()}, {})
            elif not part.is_file():
                save_part(part, {"outputs": self.run(batch).contiguous()}, {})
            dense.append(load_file(part)["outputs"])
        return Tried(batches, dense, passes, some.lengths is None)

    def run(self, batch: Batch) -> Tensor:
        """Return what is compared of the model's outputs; of a large vocabulary, what its head reads at some tokens."""
        found = outputs(self.prepared, batch, self.head)
        if isinstance(found, Tensor):
            return found
        step = max(1, found.shape[1] // POSITIONS)
        return found.hidden[:, step - 1 :: step]

    def _read(self, given: Tensor) -> Logits:
        return given if self.head is None else Unread(given, self.head.weight, self.head.bias)

    def divergences(self, tried: Tried, at: int, start: int = 0, passes: Passes | None = None) -> Tensor:
        """Return (samples,) divergences of what the model gives now from what the dense one gave for a batch.

        Args:
            tried: the samples.
            at: number of the batch.
            start: the first layer that is another than in ``passes``.
            passes: those of the dense model when None.
        """
        now = (passes or tried.passes).resume(start, at, partial(self.run, tried.batches[at]))
        return self._apart(tried, at, now)

    def _apart(self, tried: Tried, at: int, now: Tensor) -> Tensor:
        before = tried.dense[at].to(now.device)
        return divergence(self.prepared.task, self._read(before), self._read(now), tried.batches[at].inputs).cpu()

    # -- factors in the network ---------------------------------------------------------------------------------------

    @contextmanager
    def cut(self, target: Target, found: Spectrum, rank: int) -> Iterator[list[tuple[Any, Tensor]]]:
        """Give a module, or every member of a group, the product of its factors as weight within a context.

        Yields the parameters that were changed and what they held before.
        """
        network: Any = self.prepared.model.module
        factors = found.rough(rank)
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
            yield before
        finally:
            for parameter, data in before:
                parameter.data = data

    @contextmanager
    def cut_all(self, ranks: Ranks) -> Iterator[dict[str, list[tuple[Any, Tensor]]]]:
        """Do so to all modules that have a rank, by name."""
        with ExitStack() as held:
            yield {
                name: held.enter_context(
                    self.cut(self.work.targets[name], self.work.spectrum(self.work.targets[name]), rank)
                )
                for name, rank in ranks.items()
                if rank is not None
            }

    def lost(self, ranks: Ranks, tried: Tried) -> np.ndarray:
        """Return the divergence of each sample in nats with all modules cut; of text, per token."""
        with self.cut_all(ranks):
            parts = [self.divergences(tried, at) for at in range(len(tried.batches))]
        return torch.cat(parts).numpy() / tokens_of(self.work)

    def slopes(self, ranks: Ranks, tried: Tried, groups: Iterable[list[str]]) -> list[float]:
        """Return how much less a plan loses, in nats, mean over samples, with each group of its modules left dense.

        A pass with a group left dense begins at the first layer of it, from what the plan's layers before it give.
        """
        number, passes, found = len(tried.batches), self.passes(self.folder / "plan"), []
        with self.cut_all(ranks) as changed:
            now = [passes.record(at, partial(self.run, batch)) for at, batch in enumerate(tried.batches)]
            lost = float(torch.cat([self._apart(tried, at, each) for at, each in enumerate(now)]).mean())
            for group in groups:
                start = min(self.layer_of(self.work.targets[name]) for name in group)
                passes.check(start, 0, partial(self.run, tried.batches[0]), now[0])
                with _dense([change for name in group for change in changed.get(name, ())]):
                    parts = [self.divergences(tried, at, start, passes) for at in range(number)]
                found.append(lost - float(torch.cat(parts).mean()))
        return [each / tokens_of(self.work) for each in found]


@contextmanager
def _dense(changes: list[tuple[Any, Tensor]]) -> Iterator[None]:
    """Put back what parameters held before they were changed, within a context."""
    now = [(parameter, parameter.data) for parameter, _ in changes]
    for parameter, before in changes:
        parameter.data = before
    try:
        yield
    finally:
        for parameter, data in now:
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


def outputs(prepared: Prepared, batch: Batch, head: nn.Linear | None = None) -> Logits:
    """Return what the model gives for a batch."""
    return unread.outputs(prepared.model, moved(prepared.model, batch.inputs), head)


def is_in_nats(work: Factoring) -> bool:
    """Return whether the losses of a method count divergence from the dense model."""
    return "output_gradient_gram" in work.factorize.needs
