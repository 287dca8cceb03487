"""Ranks within a budget: from the losses of each module at each rank to one rank for each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from torch import Tensor

from peftc.errors import PlanError
from peftc.plans import allocate
from peftc.plans.allocate import Curve
from peftc.plans.plan import Budget, Target


class Losses(Protocol):
    """All that a decision needs of a decomposition."""

    def losses(self) -> Tensor:
        """Return squared errors by rank."""


def allocation_of(allocation: str, needs: Sequence[str]) -> str:
    """Return the allocation that ``auto`` means for a method (figures in tests/benchmarks/RESULTS.md)."""
    comparable = "output_gradient_gram" in needs  # losses in nats, whatever the module
    return allocation if allocation != "auto" else "convex" if comparable else "energy"


@dataclass(frozen=True)
class Whole:
    """Size of the whole model: parameters, and multiply-adds per sample where they could be measured."""

    parameters: int
    macs: int | None


def needs_weights(budget: Budget, allocation: str) -> bool:
    """Return whether a network without numbers is not enough to decide."""
    return budget.kind == "speedup" or needs_spectra(budget, allocation)


def needs_spectra(budget: Budget, allocation: str) -> bool:
    """Return whether ranks depend on the weights, not on their shapes alone."""
    return budget.kind == "energy" or (budget.kind != "rank" and allocation != "uniform")


def decide(
    targets: Mapping[str, Target],
    budget: Budget,
    allocation: str,
    spectra: Callable[[Target], Losses],
    whole: Whole,
    multiple: int = 1,
) -> dict[str, int | None]:
    """Return the rank of each eligible module under a budget, in multiples; None leaves it dense.

    Raises:
        PlanError: the budget is out of reach.
    """
    if budget.kind == "rank":
        rank = int(budget.amount)
        return {name: allocate.fitting(t.shape, t.form, rank, multiple) for name, t in targets.items()}
    if budget.kind == "energy":
        share = float(budget.amount)
        return {name: _at_energy(target, spectra(target), share, multiple) for name, target in targets.items()}
    unit = "macs" if budget.kind == "target-macs" else "entries"
    limit = _limit(targets, budget, unit, whole)
    if allocation == "uniform":
        if budget.kind == "ratio":
            return _uniform(targets, Fraction(budget.amount), multiple)
        return uniform_within(targets, limit, lambda target, rank: target.cost(rank, unit), multiple)
    relative = allocation == "energy"
    curves = {
        name: curve(target, spectra(target), unit, relative=relative, multiple=multiple)
        for name, target in targets.items()
    }
    return allocate.spend(curves, limit, foresee_dense=allocation == "convex")


def _at_energy(target: Target, spectrum: Losses, share: float, multiple: int) -> int | None:
    """Return the smallest multiple that keeps the share, or None where its factors would not be smaller."""
    losses = spectrum.losses()
    allowed = (1 - share) * float(losses.flatten()[0])
    least = max(1, int((losses > allowed).sum()))
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
        raise PlanError(
            f"`{budget}` is out of reach",
            why=f"the model takes {size:,}; all but {dense:,} of it is not eligible and stays",
            hint=f"ask for more than {size - dense:,}, or make more modules eligible with `--include`",
        )
    return limit


def uniform_within(
    targets: Mapping[str, Target], limit: int, price: Callable[[Target, int | None], int], multiple: int
) -> dict[str, int | None]:
    """Return uniform ranks at the largest ratio, in steps of 1e-6, whose prices sum to at most ``limit``.

    Raises:
        PlanError: even the smallest rank everywhere costs more.
    """

    def at(share: int) -> dict[str, int | None]:
        return _uniform(targets, Fraction(share, 1_000_000), multiple)

    def cost(ranks: Mapping[str, int | None]) -> int:
        return sum(price(targets[name], rank) for name, rank in ranks.items())

    low, high = 1, 1_000_000
    if cost(at(low)) > limit:
        raise PlanError(
            f"the budget leaves {limit:,} for the eligible modules",
            why=f"rank {multiple} in each takes {cost(at(low)):,}",
        )
    if cost(at(high)) <= limit:
        return at(high)
    while high - low > 1:
        middle = (low + high) // 2
        if cost(at(middle)) <= limit:
            low = middle
        else:
            high = middle
    return at(low)


def curve(target: Target, spectrum: Losses, unit: str, *, relative: bool, multiple: int = 1) -> Curve:
    """Return loss against cost of one module, without the ranks that would make it grow.

    Args:
        target: the module.
        spectrum: its decomposition.
        unit: ``entries`` or ``macs``.
        relative: divide the losses by the module's energy.
        multiple: consider only ranks that are multiples of it.
    """
    losses = spectrum.losses()
    energy = float(losses.flatten()[0])
    scale = (1 / energy if energy else 0.0) if relative else 1.0
    largest = allocate.break_even_rank(target.shape, target.form)
    ranks = range(multiple, largest + 1, multiple)
    kept = (losses[multiple : largest + 1 : multiple] * scale).tolist()
    costs = [target.cost(rank, unit) for rank in ranks]
    dense = target.cost(None, unit)
    useful = [at for at, cost in enumerate(costs) if cost < dense]
    following = (len(ranks) + 1) * multiple
    next_loss = float(losses[following]) * scale if following < len(losses) else 0.0
    return Curve(  # arrays, as all modules' curves are held at once, and Python's own numbers take four times as much
        array("q", (ranks[at] for at in useful)),
        array("q", (costs[at] for at in useful)),
        array("d", (kept[at] for at in useful)),
        dense,
        next_loss,
    )
