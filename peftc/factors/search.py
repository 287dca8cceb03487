"""Among plans of one budget, the one that loses least as a whole.

What modules lose one by one does not add up: errors grow on their way through the network, and those of one layer meet
those of the others. So plans are tried as a whole, on samples kept apart from calibration:

1. by the predicted losses, by the measured ones, and in between: what a module loses alone and a little says too little
   of deep cuts in some networks (of ResNet-20 at half its weights the correction kept 0.39 top-1 where the prediction
   kept 0.76);
2. the best of them with the losses of early layers weighted up, by LEMS's ``1 + gamma s``, with s the tail sum of a
   power law over depth (lems-svd/lems);
3. the best of 1 again, with the losses of each kind of module (q, k, ..., in all layers) weighted by what leaving
   that kind dense wins in that plan over what was predicted of it: the slope of what is minimised, at the plan itself;
4. the best so far, with each layer's losses weighted by its slope. Then once more from there.

Plans of 2 to 4 are tried on a quarter of the samples, and the best of each on all of them, as those of 1 are.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from peftc import progress
from peftc.factors import ranks, sensitivity
from peftc.factors.ranks import Decision
from peftc.factors.trial import Trial, Tried, tokens_of
from peftc.measure.intervals import Interval, bootstrap
from peftc.plans.plan import Aim

SHARES = (1.0, 0.5, 0.0)  # of the correction, in the exponent
DEPTHS = ((0.0, 1.5), (0.0, 4.0), (0.75, 1.5), (0.75, 4.0), (1.5, 1.5), (1.5, 4.0))  # alpha, gamma, of LEMS's ranges
POWERS = (0.5, 1.0)  # of the slopes
ROUNDS = 2  # of slopes of layers
LAYERS = 12  # that have a slope of their own; of deeper networks neighbours share one
KINDS = 12  # of modules, above which their slopes are not measured
FAINT, TINY = 1e-4, 1e-12  # of the plan's loss, and in nats, that a layer counts for at least
LESS = 0.997  # of the loss, at which another round is worth its time

Losses = Mapping[str, Tensor]


@dataclass
class Candidate:
    """A plan: the losses that it was made by, its ranks, and what it lost on the samples tried so far."""

    losses: Losses
    ranks: dict[str, int | None]
    lost: float


@dataclass
class Search:
    """Plans of one budget and the samples that they are tried on.

    Attributes:
        trial, aim: as for `best`.
        samples: that plans are tried on.
        known: what plans lost on each of them, by their ranks.
    """

    trial: Trial
    aim: Aim
    samples: Tried
    known: dict[tuple[int | None, ...], np.ndarray] = field(default_factory=dict)

    def least(self, several: Sequence[Losses], first: Candidate | None = None) -> Candidate:
        """Return the plan that loses least, among those by several losses and the ``first``."""
        found = [] if first is None else [first]
        for losses in several:
            plan = ranks.decide(self.trial.work.targets, self.aim, losses.__getitem__, self.trial.work.whole)
            key = tuple(plan.values())
            if key not in self.known:
                self.known[key] = self.trial.lost(plan, self.samples)
            found.append(Candidate(losses, plan, float(self.known[key].mean())))
        return min(found, key=lambda one: one.lost)

    def of(self, plan: Candidate) -> np.ndarray:
        """Return what a plan that was tried lost on each sample."""
        return self.known[tuple(plan.ranks.values())]

    def of_depth(self, start: Candidate) -> list[Losses]:
        """Return losses with early layers weighted up."""
        number, where = len(self.trial.layers), self._layers()
        found: list[Losses] = []
        for alpha, gamma in DEPTHS:
            tails = np.cumsum([(at + 1.0) ** -alpha for at in range(number)][::-1])[::-1]
            weights = 1 + gamma * (tails - tails[-1]) / (tails[0] - tails[-1])
            found.append({name: each * float(weights[where[name]]) for name, each in start.losses.items()})
        return found

    def of_slopes(self, start: Candidate, plan: Candidate, group_of: Mapping[str, Hashable]) -> list[Losses]:
        """Return losses weighted by the slopes at a plan, one for each group of modules."""
        groups: dict[Hashable, list[str]] = {}
        for name, group in group_of.items():
            groups.setdefault(group, []).append(name)
        tokens = tokens_of(self.trial.work)
        predicted = {
            group: sum(float(start.losses[name][rank]) / 2 / tokens for name in names if (rank := plan.ranks[name]))
            for group, names in groups.items()
        }
        cut = {group: names for group, names in groups.items() if predicted[group] > 0}
        won = self.trial.slopes(plan.ranks, self.samples, cut.values())
        least = max(FAINT * plan.lost, TINY)  # where a group loses nothing, or the plan is better without it
        slopes = {group: max(each, least) / predicted[group] for group, each in zip(cut, won, strict=True)}
        middle = math.exp(sum(map(math.log, slopes.values())) / max(len(slopes), 1))
        weight = {name: slopes.get(group, middle) / middle for name, group in group_of.items()}
        return [{name: each * weight[name] ** power for name, each in start.losses.items()} for power in POWERS]

    def kinds(self) -> dict[str, str]:
        """Return the kind of each module: its name within its layer; its own where no layer holds it."""
        return {name: name.removeprefix(self.trial.layers[at]) for name, at in self._layers().items()}

    def depths(self) -> dict[str, int]:
        """Return the layer of each module, or of neighbours in a deep network."""
        number = len(self.trial.layers)
        return {name: at * min(LAYERS, number) // number for name, at in self._layers().items()}

    def _layers(self) -> dict[str, int]:
        trial = self.trial
        return {name: trial.layer_of(target) for name, target in trial.work.targets.items()}


def best(trial: Trial, aim: Aim) -> Decision:
    """Return the ranks under a budget that lose least as a whole; PlanError where it is out of reach.

    The losses that ``trial.work`` goes on with are those that modules have alone, as far as they were believed.
    """
    each = sensitivity.alone(trial)
    few = trial.on(trial.few, trial.folder / "few")
    everything = trial.on(trial.samples, trial.folder / f"whole-{trial.samples}")
    search, last = Search(trial, aim, few), Search(trial, aim, everything)
    with progress.track("trying plans", 4) as advance:
        start = last.least([corrected(each, share) for share in SHARES])
        trial.work.losses = dict(start.losses)
        finalists = [start.losses]
        advance("")
        if len(trial.layers) > 1:
            first = search.least([start.losses])
            finalists.append(search.least(search.of_depth(first), first).losses)
            advance("")
            learnt, kinds = first, search.kinds()
            if len(set(kinds.values())) <= KINDS:
                learnt = search.least(search.of_slopes(first, first, kinds), first)
                finalists.append(learnt.losses)
            base = learnt
            for _ in range(ROUNDS):
                before, learnt = learnt, search.least(search.of_slopes(base, learnt, search.depths()), learnt)
                if learnt.lost > LESS * before.lost:
                    break
            finalists.append(learnt.losses)
            advance("")
        found = last.least(finalists)
        if not clearly_less(last.of(found), last.of(start)):
            found = start
        advance("")
    return Decision(found.ranks, lost=interval(last.of(found), trial), samples=trial.samples)


def clearly_less(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether samples lose less by more than the standard error of that: few samples may flatter a plan."""
    gain = other - one
    return bool(gain.mean() > gain.std() / len(gain) ** 0.5)


def interval(lost: np.ndarray, trial: Trial) -> Interval:
    """Return the mean loss with its 95 % interval over the samples."""
    return bootstrap(lambda rows: float(lost[rows].mean()), len(lost), seed=trial.prepared.request.seed)


def corrected(each: Mapping[str, tuple[Tensor, float]], share: float) -> Losses:
    """Return losses scaled by a power of what was measured."""
    return {name: losses * scale**share for name, (losses, scale) in each.items()}
