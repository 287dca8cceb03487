"""Ranks within a budget: from the losses of each module at each rank to one rank for each."""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor

from peftc.errors import PlanError, one_of
from peftc.measure.intervals import Interval
from peftc.plans import allocate
from peftc.plans.allocate import Curve
from peftc.plans.plan import Aim, Budget, Target

Ranks = Mapping[str, int | None]  # by module; None is dense


def allocation_of(allocation: str, needs: Sequence[str]) -> str:
    """Return the allocation that ``auto`` means for a method (figures in tests/benchmarks/RESULTS.md).

    Raises:
        UsageError: there is none of that name.
    """
    one_of("--allocation", allocation, ("auto", *allocate.ALLOCATIONS))
    comparable = "output_gradient_gram" in needs  # losses in nats, whatever the module
    return allocation if allocation != "auto" else "convex" if comparable else "energy"


@dataclass(frozen=True)
class Whole:
    """Size of the whole model: parameters, and multiply-adds per sample where they could be measured."""

    parameters: int
    macs: int | None


@dataclass(frozen=True)
class Decision:
    """The rank of every eligible module, None for dense, and what was measured of them.

    Attributes:
        slow: module -> why it stays dense, for those whose factors are not faster.
        figures: for a speed-up what was measured, JSON-ready; empty where nothing was.
        lost: divergence from the dense model in nats, with all modules at these ranks; None where it was not measured.
        samples: kept apart from calibration, on which it was.
    """

    ranks: dict[str, int | None]
    slow: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    lost: Interval | None = None
    samples: int = 0


def decide(
    targets: Mapping[str, Target], aim: Aim, losses: Callable[[str], Tensor], whole: Whole
) -> dict[str, int | None]:
    """Return the rank of each eligible module under a budget, None for dense; PlanError where it is out of reach.

    Args:
        targets, aim, whole: the modules, the budget, and the size of the model.
        losses: module -> (k + 1,) squared errors at ranks 0 to k.
    """
    budget, multiple = aim.budget, aim.multiple
    if budget.kind == "rank":
        rank = int(budget.amount)
        return {name: allocate.fitting(t.shape, t.form, rank, multiple) for name, t in targets.items()}
    if budget.kind == "energy":
        share = float(budget.amount)
        return {name: _at_energy(target, losses(name), share, multiple) for name, target in targets.items()}
    unit = "macs" if budget.kind == "target-macs" else "entries"
    if aim.allocation == "uniform" and budget.kind == "ratio":
        return _uniform(targets, Fraction(budget.amount), multiple)
    limit = _limit(targets, budget, unit, whole)
    if aim.allocation == "uniform":
        return uniform_within(targets, limit, lambda target, rank: target.cost(rank, unit), multiple)
    rule = allocate.ALLOCATIONS[aim.allocation]
    curves = {name: _curve(target, rule.weigh(losses(name)), unit, multiple) for name, target in targets.items()}
    return allocate.spend(curves, limit, foresee_dense=rule.foresee_dense)


def _at_energy(target: Target, losses: Tensor, share: float, multiple: int) -> int | None:
    """Return the smallest rank that keeps a share of the energy, or None where its factors would not be smaller."""
    least = max(1, int((losses > (1 - share) * float(losses[0])).sum()))
    rank = -(-least // multiple) * multiple
    return rank if rank <= allocate.break_even_rank(target.shape, target.form) else None


def _uniform(targets: Mapping[str, Target], ratio: Fraction, multiple: int) -> dict[str, int | None]:
    return {name: allocate.uniform_rank(t.shape, t.form, ratio, multiple) for name, t in targets.items()}


def _limit(targets: Mapping[str, Target], budget: Budget, unit: str, whole: Whole) -> int:
    """Return what the eligible modules may cost together, in ``unit``."""
    dense = sum(target.cost(None, unit) for target in targets.values())
    if budget.kind == "ratio":
        return int(Fraction(budget.amount) * dense)
    size = whole.macs if unit == "macs" else whole.parameters
    if size is None:
        raise PlanError("cannot keep `--target-macs`", why="the multiply-adds of this model could not be measured")
    limit = int(budget.amount) - (size - dense)
    if limit <= 0:
        why = f"the model takes {size:,}; all but {dense:,} of it is not eligible and stays"
        hint = f"ask for more than {size - dense:,}, or make more modules eligible with `--include`"
        raise PlanError(f"`{budget}` is out of reach", why=why, hint=hint)
    return limit


def uniform_within(
    targets: Mapping[str, Target], limit: int, price: Callable[[Target, int | None], int], multiple: int
) -> dict[str, int | None]:
    """Return uniform ranks at the largest ratio, in steps of 1e-6, that cost at most ``limit``, or a PlanError."""

    def at(share: int) -> dict[str, int | None]:
        return _uniform(targets, Fraction(share, 1_000_000), multiple)

    def cost(share: int) -> int:
        return sum(price(targets[name], rank) for name, rank in at(share).items())

    low, high = 1, 1_000_000
    if cost(low) > limit:
        why = f"rank {multiple} in each takes {cost(low):,}"
        raise PlanError(f"the budget leaves {limit:,} for the eligible modules", why=why)
    if cost(high) <= limit:
        return at(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return at(low)


def _curve(target: Target, losses: Tensor, unit: str, multiple: int) -> Curve:
    """Return loss against cost, in ``unit``, at the multiples at which a module is smaller, and cheaper than dense."""
    largest, dense = allocate.break_even_rank(target.shape, target.form), target.cost(None, unit)
    # arrays, as all modules' curves are held at once, and Python's own numbers take four times as much
    ranks = array("q", range(multiple, largest + 1, multiple))
    costs = array("q", (target.cost(rank, unit) for rank in ranks))
    kept = array("d", losses[multiple : largest + 1 : multiple].tolist())
    following, cheaper = (len(ranks) + 1) * multiple, bisect_left(costs, dense)
    next_loss = float(losses[following]) if following < len(losses) else 0.0
    return Curve(ranks[:cheaper], costs[:cheaper], kept[:cheaper], dense, next_loss)
