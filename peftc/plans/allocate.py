"""Which rank for which module: prices of forms, PELA's uniform formula, and one greedy pass over a global budget.

Nothing here knows a tensor: a module is its shape and, for the greedy pass, a curve of loss against rank.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from peftc.errors import PlanError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """How one greedy pass weighs the losses of a module, (k + 1,) at ranks 0 to k, against those of others."""

    weigh: Callable[[Any], Any] = lambda losses: losses
    foresee_dense: bool = False  # as for `steps`


ALLOCATIONS: Mapping[str, Allocation] = {
    "uniform": Allocation(),  # PELA's formula, which looks at no losses
    "global": Allocation(),
    "energy": Allocation(lambda losses: losses * (1 / float(losses[0]) if losses[0] else 0.0)),  # in shares of its own
    "convex": Allocation(foresee_dense=True),
}


def sides(shape: Shape, form: str) -> tuple[int, int]:
    """Return the sides of the matrix that a weight is seen as: (out, in), but of a transposed one (in, out)."""
    if form == "spatial":
        out, in_, kh, kw = shape
        return out * kw, in_ * kh
    return shape[0], math.prod(shape[1:])


def entries_per_rank(shape: Shape, form: str) -> int:
    """Return how many weight entries one more unit of rank costs."""
    return sum(sides(shape, form))


def max_rank(shape: Shape, form: str) -> int:
    """Return the rank at which the factors are exact: the smaller side of the matrix."""
    return min(sides(shape, form))


def entries(shape: Shape, form: str, rank: int | None) -> int:
    """Return the number of weight entries at ``rank``, biases apart; None is the dense weight."""
    if rank is None:
        return math.prod(shape)
    return rank * entries_per_rank(shape, form)


@dataclass(frozen=True)
class Use:
    """How one sample runs through a weight."""

    form: str  # as which module: a tied weight may be an embedding here and an output head there
    positions: int  # how often it is applied: tokens, or output pixels
    between: int = 0  # output rows times input columns, on which the first part of a spatial form runs


def macs(shape: Shape, use: Use, rank: int | None) -> int:
    """Return the multiply-adds of one sample for one use of a weight of ``shape``; rank None is the dense weight."""
    form, positions = use.form, use.positions
    if form == "embedding":  # the look-up is free, the expansion is not
        return 0 if rank is None else positions * rank * shape[1]
    if rank is None or form in ("linear", "transposed", "channel"):
        return positions * entries(shape, form, rank)
    out, in_, kh, kw = shape
    return rank * (use.between * in_ * kh + positions * out * kw)


def break_even_rank(shape: Shape, form: str) -> int:
    """Return the largest rank whose factors hold fewer entries than the weight."""
    return min((math.prod(shape) - 1) // entries_per_rank(shape, form), max_rank(shape, form))


def uniform_rank(shape: Shape, form: str, ratio: Fraction, multiple: int = 1) -> int | None:
    """Return the rank that keeps at most ``ratio`` of one module's entries, or None where it stays dense.

    PELA, section 1.2 of the papers notes: floor(out in / (c (out + in))) with c = 1 / ratio, at least 1. A module whose
    factors would hold as many entries as the weight stays dense, and so does every module at ratio 1.
    """
    if ratio >= 1:
        return None
    rank = math.floor(ratio * math.prod(shape) / entries_per_rank(shape, form))
    return fitting(shape, form, rank, multiple)


def fitting(shape: Shape, form: str, rank: int, multiple: int = 1) -> int | None:
    """Return ``rank``, cut where it is exact and to one multiple or more, or None where factors are not smaller."""
    rank = max(min(rank, max_rank(shape, form)) // multiple, 1) * multiple
    return rank if rank * entries_per_rank(shape, form) < math.prod(shape) else None


@dataclass(frozen=True)
class Curve:
    """Loss against rank of one module."""

    ranks: Sequence[int]  # candidates, cheapest first, all cheaper than the dense weight
    costs: Sequence[int]  # of each candidate, in entries or multiply-adds
    losses: Sequence[float]  # of each candidate, squared error; the dense weight has none
    dense: int  # cost of the dense weight
    next_loss: float = 0.0  # squared error one rank further, at which the module would be as large as its dense weight


Point = tuple[int, float, int | None]  # cost, loss, rank
Step = tuple[float, int, int | None]  # fall of loss per cost, price, the rank that it leads to


def steps(curve: Curve, *, foresee_dense: bool) -> list[Step]:
    """Return the steps from a module's smallest rank to its dense weight, on the lower convex hull of its curve.

    Args:
        curve: of the module.
        foresee_dense: let the dense weight take part in the hull, so that a module may jump to it from afar; else the
            last step is worth only the one component that makes the factors as large as the weight.
    """
    points: list[Point] = [*zip(curve.costs, curve.losses, curve.ranks, strict=True)]
    hull = _hull([*points, (curve.dense, 0.0, None)] if foresee_dense or not points else points)
    found = [((a[1] - b[1]) / max(b[0] - a[0], 1), b[0] - a[0], b[2]) for a, b in pairwise(hull)]
    if not foresee_dense and points:
        last = points[-1]
        unit = last[0] - points[-2][0] if len(points) > 1 else last[0]
        gain = (last[1] - min(curve.next_loss, last[1])) / max(unit, 1)
        found.append((min(gain, found[-1][0]) if found else gain, curve.dense - last[0], None))
    return found


def _hull(points: Sequence[Point]) -> list[Point]:
    hull: list[Point] = []
    for c in points:
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0]):
                break
            hull.pop()  # it lies above the line from its neighbour to the new point
        hull.append(c)
    return hull


def spend(curves: Mapping[str, Curve], budget: int, *, foresee_dense: bool) -> dict[str, int | None]:
    """Return the rank of each module that minimises the summed loss within ``budget``, None meaning dense.

    One greedy pass over the steps of all modules, steepest fall of loss per cost first; along convex hulls every stop
    of such a pass is optimal for its own cost (Everett, 1963, generalized Lagrange multipliers). PlanError where even
    the smallest rank everywhere costs more.

    Args:
        curves: by module; their unit of cost is that of the budget.
        foresee_dense: as for `steps`.
    """
    ways = {name: steps(curve, foresee_dense=foresee_dense) for name, curve in curves.items()}
    ranks: dict[str, int | None] = {name: next(iter(curve.ranks), None) for name, curve in curves.items()}
    spent = sum(curve.costs[0] if curve.costs else curve.dense for curve in curves.values())
    if spent > budget:
        total = sum(curve.dense for curve in curves.values())
        raise PlanError(
            f"the budget leaves {budget:,} for the eligible modules; the smallest rank in each of them takes {spent:,}",
            why=f"dense, they take {total:,}",
            hint=f"ask for a ratio of at least {spent / max(total, 1):.4f}, or leave modules out with `--skip`",
        )
    queue = [(-way[0][0], name, 0) for name, way in ways.items() if way]
    heapq.heapify(queue)
    while queue:
        _, name, at = heapq.heappop(queue)
        _, price, rank = ways[name][at]
        if spent + price > budget:
            continue  # this module ends here; cheaper steps of others may still fit
        spent += price
        ranks[name] = rank
        if at + 1 < len(ways[name]):
            heapq.heappush(queue, (-ways[name][at + 1][0], name, at + 1))
    return ranks


def fill(curves: Mapping[str, Curve], ranks: Mapping[str, int | None], budget: int) -> dict[str, int | None]:
    """Spend what `spend` left of the budget: where a step between two corners of a hull did not fit, a part of it may.

    The costs of the curves are rising; ``ranks`` are as `spend` returned them.
    """
    filled = dict(ranks)
    places = {name: {rank: place for place, rank in enumerate(curve.ranks)} for name, curve in curves.items()}
    at = {name: places[name].get(rank, 0) for name, rank in ranks.items()}  # type: ignore[arg-type]
    left = budget - sum(curve.dense if filled[n] is None else curve.costs[at[n]] for n, curve in curves.items())
    while True:
        best: tuple[float, str, int] | None = None
        for name, curve in curves.items():
            if filled[name] is None or not curve.costs:
                continue
            to = bisect_right(curve.costs, curve.costs[at[name]] + left) - 1
            gain = curve.losses[at[name]] - curve.losses[to]
            if to > at[name] and (best is None or gain > best[0]):
                best = (gain, name, to)
        if best is None:
            return filled
        _, name, to = best
        left -= curves[name].costs[to] - curves[name].costs[at[name]]
        filled[name], at[name] = curves[name].ranks[to], to
