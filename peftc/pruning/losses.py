"""What a network loses without some of its layers, measured on samples by leaving them out; and what one backward says.

With labels it is the task's own loss. Without, the reference is what the whole network gives, and the loss the
divergence from that in nats per sample.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from peftc import processes, progress
from peftc.errors import DataError, PlanError, WeightError
from peftc.measure.intervals import Interval
from peftc.models import layers, unread
from peftc.models.model import Model
from peftc.models.place import moved
from peftc.nn.vocabulary import Logits
from peftc.tasks.figures import interval_of
from peftc.tasks.task import Batch, Columns, Metric, batches
from peftc.tasks.unlabelled import divergence
from peftc.training import samples
from peftc.training.held import Held
from peftc.training.samples import Samples

MEASURED = 500  # samples at most: each layer tried costs a forward pass over them


@dataclass(frozen=True)
class Removal:
    """A layer that went, or would have; the rise of the loss with those before it, and what all of them cost.

    The cost is in the task's first metric, with its interval; either is None where it was not measured.
    """

    layer: int
    rise: float | None = None
    cost: Interval | None = None


@dataclass
class Trial:
    """Samples to measure a runnable network on without some layers.

    Attributes:
        model, given, held, batch_size: the network, its samples, those of them to measure on, and how many at once.
        repaired: gives the network without some layers, its gaps closed; None where they stay open.
        seed: of resampling.
        tried: passes that were made over the samples so far.
        stopped: the layer that would have cost too much.
    """

    model: Model
    given: Samples
    held: Held
    batch_size: int
    repaired: Callable[[Sequence[str]], Model] | None = None
    seed: int = 0
    tried: int = 0
    stopped: Removal | None = None
    _whole: list[Logits] = field(default_factory=list)

    def loss(self, dropped: Sequence[str] = ()) -> float:
        """Return the loss without some layers, mean over samples; WeightError where it is not finite."""
        objective = objective_of(self.given)
        total = 0.0
        with layers.bypassed(self.model.module, dropped):
            for at, batch in enumerate(self._batches):
                outputs = unread.outputs(self.model, moved(self.model, batch.inputs), unread.head_of(self.model))
                if objective is not None:
                    total += float(objective(outputs, batch)) * len(batch.targets)
                elif at < len(self._whole):
                    whole = self._whole[at].to(outputs.device)
                    total += float(divergence(self.given.task, whole, outputs, batch.inputs).sum())
                else:
                    self._whole.append(outputs.to("cpu"))  # the first pass is that of the whole network
        self.tried += 1
        found = total / len(self.held)
        if not math.isfinite(found):
            without = f"without {', '.join(dropped)}" if dropped else "with all its layers"
            raise WeightError(f"`{self.model.name}` has a loss that is not finite", why=without)
        return found

    def cost(self, dropped: Sequence[str]) -> Interval:
        """Return how much worse the task's first metric is without some layers, with its 95 % interval.

        PlanError where the network does not run without them.
        """
        self.tried += 1
        if self.repaired is None:
            with layers.bypassed(self.model.module, dropped):
                without = samples.observed(self.model, self.given, self.held, self.batch_size)
        else:
            without = samples.observed(self.repaired(dropped), self.given, self.held, self.batch_size)
        more = interval_of(self._metric, self.seed, without, self._observed)
        return -more if self._metric.higher_is_better else more

    @property
    def quality(self) -> float:
        """The task's first metric of the whole network."""
        return float(np.mean(self._metric.of(self._observed)))

    @functools.cached_property
    def _observed(self) -> Columns:
        self.tried += 1
        return samples.observed(self.model, self.given, self.held, self.batch_size)

    @property
    def _metric(self) -> Metric:
        assert self.given.task is not None
        return self.given.task.metrics[0]

    @functools.cached_property
    def _batches(self) -> list[Batch]:
        lengths = self.held.encoded.lengths
        own = None if lengths is None else [lengths[row] for row in self.held.rows]
        return [self.given.mapped(self.held.batch(run)) for run in batches(own, len(self.held), self.batch_size)]


def objective_of(given: Samples) -> Callable[[Logits, Batch], Tensor] | None:
    """Return the task's loss; None where there are no labels for it."""
    return given.task.objective if given.labelled and given.task is not None else None


def measured_on(given: Samples, *, scored_on_the_rest: bool) -> tuple[Held, str]:
    """Return the samples to measure on, and how to call them.

    Those of a validation split, where there is one. Else a share of the train split, which scores do not look at; all
    of it where nothing else looks at samples.
    """
    held = given.held
    assert held is not None
    if held.encoded is not given.train.encoded:
        return held, f"{len(held)} samples of the validation split"
    if not scored_on_the_rest:
        rows = sorted([*held.rows, *given.train.rows])
        step = max(1, math.ceil(len(rows) / MEASURED))
        held = Held(held.encoded, rows[::step])
    return held, f"{len(held)} samples of the train split, which the model may know"


def greedy(
    trial: Trial, names: Sequence[str], fixed: Sequence[int], *, keep: int, within: float | None
) -> tuple[list[float], list[Removal]]:
    """Leave out the layer that is missed least, measure all others again, and so on, until ``keep`` layers are left.

    Fixed layers stay. It stops, too, before the interval of what they cost together ends above ``within``.

    Returns:
        how much the loss rises without each layer alone, NaN for fixed ones; and the removals, in order.
    """
    whole = trial.loss()
    alone = [math.nan] * len(names)
    gone: list[Removal] = []
    left = [at for at in range(len(names)) if at not in fixed]
    rounds = max(1, len(names) - keep) if within is None else len(left)
    with progress.track("leaving out layers", rounds) as advance:
        while left and (not gone or len(names) - len(gone) > keep):
            without = [names[removal.layer] for removal in gone]
            with processes.together():
                mine = [(at, trial.loss([*without, names[at]]) - whole) for at in processes.share(left)]
            rises = dict(processes.gathered(mine))
            trial.tried += len(left) - len(mine)
            if not gone:
                for at, rise in rises.items():
                    alone[at] = rise
            if len(names) - len(gone) <= keep:
                break
            least = min(left, key=lambda at: (rises[at], -at))
            removal = Removal(least, rises[least], None if within is None else trial.cost([*without, names[least]]))
            if not _fits(removal, within):
                trial.stopped = removal
                break
            gone.append(removal)
            left.remove(least)
            advance(names[least])
    return alone, gone


def in_order(trial: Trial, names: Sequence[str], order: Sequence[int], within: float) -> list[Removal]:
    """Leave out layers in an order, until the interval of what they cost ends above ``within``; one layer stays.

    Layers that only go together, as those of Swin do in pairs, are tried together.
    """
    gone: list[Removal] = []
    waiting: list[Removal] = []
    with progress.track("leaving out layers", len(order)) as advance:
        for at in order[: len(names) - 1]:
            without = [names[removal.layer] for removal in (*gone, *waiting)]
            try:
                removal = Removal(at, cost=trial.cost([*without, names[at]]))
            except PlanError:
                waiting.append(Removal(at))
                continue
            if not _fits(removal, within):
                trial.stopped = removal
                break
            gone += [*waiting, removal]
            waiting = []
            advance(names[at])
    return gone


def _fits(removal: Removal, within: float | None) -> bool:
    return within is None or (removal.cost is not None and removal.cost.high <= within)


def gradient_products(model: Model, given: Samples, names: Sequence[str], batch_size: int) -> dict[str, Tensor]:
    """Return layer -> (n,): of each sample, what the gradient says of taking away what the layer adds.

    The train part is read, and no gradient is left in the model. DataError where there are no labels to take a loss of.
    """
    objective = objective_of(given)
    if objective is None:
        hint = "score layers without labels: `--score block-influence --keep N`"
        raise DataError("`--score taylor` needs labels or text to take a loss of", hint=hint)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    flow: dict[str, tuple[Tensor, Tensor]] = {}
    frozen = [each for each in model.module.parameters() if each.is_floating_point() and not each.requires_grad]

    def saw(name: str, before: Tensor, after: Tensor) -> None:
        flow[name] = (before, after)

    for each in frozen:
        each.requires_grad_(True)
    try:
        with (
            layers.tapped(model.module, names, saw),
            progress.track("looking at gradients", len(given.train)) as advance,
        ):
            for batch in map(given.mapped, given.train.batches(batch_size)):
                with torch.enable_grad():
                    loss = objective(unread.forward(model, moved(model, batch.inputs), unread.head_of(model)), batch)
                    total = loss * len(batch.targets)  # a sum, so that each sample has its own gradient
                gradients = torch.autograd.grad(total, [flow[name][1] for name in names])
                for name, gradient in zip(names, gradients, strict=True):
                    found[name].append(_products(gradient, *flow[name]))
                flow.clear()
                for _ in range(len(batch.targets)):
                    advance("")
    finally:
        for each in frozen:
            each.requires_grad_(False)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _products(gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return (batch,) products of a gradient with what was added; NaN between different shapes."""
    if before.shape != after.shape:
        return torch.full((len(after),), math.nan)
    added = (after - before).detach().double()
    return (gradient.double() * added).flatten(1).sum(1).cpu()
