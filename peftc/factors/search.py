"""Among plans of one budget, the one that loses least as a whole.

What modules lose one by one does not add up: errors grow on their way through the network, and those of one layer meet
those of the others. So plans are tried as a whole, on samples kept apart from calibration:

1. by the predicted losses, by the measured ones, and in between: what a module loses alone and a little says too little
   of deep cuts in some networks (of ResNet-20 at half its weights the correction kept 0.39 top-1 where the prediction
   kept 0.76);
2. the best of them with the losses of early layers weighted up, by LEMS's ``1 + gamma s``, with s the tail sum of a
   power law over depth (lems-svd/lems);
3. the best of 1 again, with each layer's losses weighted by what leaving it dense wins in that plan over what was
   predicted of it: the slope of what is minimised, at the plan itself. Then once more from there.

Most are tried on a quarter of the samples, and the best of each kind on all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from peftc import progress
from peftc.factors import ranks, sensitivity
from peftc.factors.ranks import Decision
from peftc.factors.trial import Trial, Tried, tokens_of
from peftc.measure.intervals import Interval, bootstrap
from peftc.plans.plan import Aim

SHARES = (1.0, 0.5, 0.0)  # of the correction, in the exponent
DEPTHS = (
    (0.0, 0.5),
    (0.0, 1.5),
    (0.0, 4.0),
    (0.75, 0.5),
    (0.75, 1.5),
    (0.75, 4.0),
    (1.5, 0.5),
    (1.5, 1.5),
    (1.5, 4.0),
    (3.0, 4.0),
)  # alpha, gamma, in the ranges that LEMS searches
POWERS = (0.5, 1.0)  # of the slopes
ROUNDS = 2  # of slopes
LAYERS = 24  # that have a slope of their own; of deeper networks neighbours share one
FEW = 8  # samples, at least, on which a plan is tried first
FAINT, TINY = 1e-4, 1e-12  # of the plan's loss, and in nats, that a layer counts for at least
LESS = 0.997  # of the loss, at which another round is worth its time

Losses = Mapping[str, Tensor]


@dataclass
class Candidate:
    """A plan: the losses that it was made by, its ranks, and what it lost on the samples tried so far."""

    losses: Losses
    ranks: dict[str, int | None]
    lost: float = math.inf


@dataclass
class Search:
    """Plans of one budget and the samples that they are tried on.

    Attributes:
        trial, aim: as for `best`.
        few: the samples that most plans are tried on.
        known: what plans lost there, by their ranks.
    """

    trial: Trial
    aim: Aim
    few: Tried
    known: dict[tuple[int | None, ...], float] = field(default_factory=dict)

    def least(self, several: Sequence[Losses], first: Candidate | None = None) -> Candidate:
        """Return the plan that loses least on few samples, among those by several losses and the ``first``."""
        found = [] if first is None else [first]
        for losses in several:
            plan = ranks.decide(self.trial.work.targets, self.aim, losses.__getitem__, self.trial.work.whole)
            key = tuple(plan.values())
            if key not in self.known:
                self.known[key] = float(self.trial.lost(plan, self.few).mean())
            found.append(Candidate(losses, plan, self.known[key]))
        return min(found, key=lambda one: one.lost)

    def of_depth(self, start: Candidate) -> list[Losses]:
        """Return losses with early layers weighted up."""
        number, where = len(self.trial.layers), self._layers()
        found: list[Losses] = []
        for alpha, gamma in DEPTHS:
            tails = np.cumsum([(at + 1.0) ** -alpha for at in range(number)][::-1])[::-1]
            weights = 1 + gamma * (tails - tails[-1]) / (tails[0] - tails[-1])
            found.append({name: each * float(weights[where[name]]) for name, each in start.losses.items()})
        return found

    def of_slopes(self, start: Candidate, plan: Candidate) -> list[Losses]:
        """Return losses weighted by the slopes at a plan."""
        groups: dict[int, list[str]] = {}
        for name, at in self._layers().items():
            groups.setdefault(at * min(LAYERS, len(self.trial.layers)) // len(self.trial.layers), []).append(name)
        tokens = tokens_of(self.trial.work)
        predicted = {
            at: sum(float(start.losses[name][rank]) / 2 / tokens for name in names if (rank := plan.ranks[name]))
            for at, names in groups.items()
        }
        cut = {at: names for at, names in groups.items() if predicted[at] > 0}
        won = self.trial.slopes(plan.ranks, self.few, cut.values())
        least = max(FAINT * plan.lost, TINY)  # where a layer loses nothing, or the plan is better without it
        slopes = {at: max(each, least) / predicted[at] for at, each in zip(cut, won, strict=True)}
        middle = math.exp(sum(map(math.log, slopes.values())) / max(len(slopes), 1))
        layer = {name: at for at, names in groups.items() for name in names}
        return [
            {name: each * (slopes.get(layer[name], middle) / middle) ** power for name, each in start.losses.items()}
            for power in POWERS
        ]

    def _layers(self) -> dict[str, int]:
        trial = self.trial
        return {name: trial.layer_of(target, self.few.passes) for name, target in trial.work.targets.items()}


def best(trial: Trial, aim: Aim) -> Decision:
    """Return the ranks under a budget that lose least as a whole; PlanError where it is out of reach.

    The losses that ``trial.work`` goes on with are those that modules have alone, as far as they were believed.
    """
    each = sensitivity.alone(trial)
    few = trial.on(max(min(FEW, trial.samples), trial.samples // 4), trial.folder / "few")
    search = Search(trial, aim, few)
    with progress.track("trying plans", 4) as advance:
        start = search.least([corrected(each, share) for share in SHARES])
        finalists = [start]
        advance("")
        if len(trial.layers) > 1:
            finalists.append(search.least(search.of_depth(start), start))
            advance("")
            learnt = start
            for _ in range(ROUNDS):
                last, learnt = learnt, search.least(search.of_slopes(start, learnt), learnt)
                if learnt.lost > LESS * last.lost:
                    break
            finalists.append(learnt)
            advance("")
        trial.work.losses = dict(start.losses)
        return _finest(trial, finalists)


def _finest(trial: Trial, finalists: Sequence[Candidate]) -> Decision:
    """Try some plans on all samples, and return the one that loses least."""
    tried = trial.on(trial.samples, trial.folder / f"whole-{trial.samples}")
    found = {tuple(one.ranks.values()): one for one in finalists}
    lost = {key: trial.lost(one.ranks, tried) for key, one in found.items()}
    key = min(lost, key=lambda each: float(lost[each].mean()))
    return replace(Decision(found[key].ranks), lost=interval(lost[key], trial), samples=trial.samples)


def interval(lost: np.ndarray, trial: Trial) -> Interval:
    """Return the mean loss with its 95 % interval over the samples."""
    return bootstrap(lambda rows: float(lost[rows].mean()), len(lost), seed=trial.prepared.request.seed)


def corrected(each: Mapping[str, tuple[Tensor, float]], share: float) -> Losses:
    """Return losses scaled by a power of what was measured."""
    return {name: losses * scale**share for name, (losses, scale) in each.items()}
