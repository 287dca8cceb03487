"""PELA's formula to the digit, and a greedy pass that keeps its budget and is optimal where it says so."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest

from peftc.errors import PlanError
from peftc.factors.ranks import Whole, decide
from peftc.plans import allocate
from peftc.plans.allocate import (
    Curve,
    Use,
    break_even_rank,
    entries,
    fill,
    fitting,
    max_rank,
    spend,
    uniform_rank,
)

HALF = Fraction(1, 2)
FORMS = ["linear", "transposed", "embedding", "channel", "spatial"]
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 64), (64, 48), (100, 101), (768, 3072)]


def shape_of(form: str, shape: tuple[int, int]) -> tuple[int, ...]:
    return (*shape, 3, 2) if form in ("channel", "spatial") else shape


@pytest.mark.parametrize(
    ("shape", "divisor", "rank"),
    [
        ((2304, 768), "2", 288), ((768, 768), "2", 192), ((3072, 768), "2", 307), ((768, 3072), "2", 307),
        ((2304, 768), "3/2", 384), ((768, 768), "3/2", 256), ((3072, 768), "3/2", 409),
        ((2304, 768), "3", 192), ((768, 768), "3", 128), ((3072, 768), "3", 204),
        ((192 * 3, 192), "2", 72), ((192, 192), "2", 48), ((768, 192), "2", 76),
        ((384, 128), "3/2", 64), ((512, 128), "3/2", 68), ((3072, 1024), "3/2", 512), ((4096, 1024), "3/2", 546),
    ],
)  # fmt: skip
def test_the_uniform_rank_is_pelas(shape: tuple[int, int], divisor: str, rank: int) -> None:
    out, in_ = shape
    ratio = 1 / Fraction(divisor)
    assert uniform_rank(shape, "linear", ratio) == rank == math.floor(in_ * out / (Fraction(divisor) * (in_ + out)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [Fraction(1, 1000), Fraction(1, 3), HALF, Fraction(2, 3), Fraction(99, 100)])
def test_a_uniform_rank_keeps_at_most_the_ratio_or_is_the_smallest(
    form: str, shape: tuple[int, int], ratio: Fraction
) -> None:
    full = shape_of(form, shape)
    rank = uniform_rank(full, form, ratio)
    if rank is None:
        return
    kept = entries(full, form, rank)
    assert kept < math.prod(full), "a module that would grow stays dense"
    assert kept <= ratio * math.prod(full) or rank == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_break_even_is_the_last_rank_that_saves_entries(form: str, shape: tuple[int, int]) -> None:
    full = shape_of(form, shape)
    rank = break_even_rank(full, form)
    assert entries(full, form, rank) < math.prod(full) or rank == 0
    assert entries(full, form, rank + 1) >= math.prod(full) or rank == max_rank(full, form)
    assert fitting(full, form, rank + 1) is None or rank == max_rank(full, form)


@pytest.mark.parametrize("shape", [(1, 5), (2, 2), (3, 1)])
def test_a_module_too_small_to_save_stays_dense_at_every_ratio(shape: tuple[int, int]) -> None:
    assert all(uniform_rank(shape, "linear", Fraction(part, 10)) is None for part in range(1, 11))


@pytest.mark.parametrize("form", FORMS)
def test_ratio_one_leaves_everything_dense(form: str) -> None:
    assert uniform_rank(shape_of(form, (64, 48)), form, Fraction(1)) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_larger_ratio_never_gives_a_smaller_rank(form: str, shape: tuple[int, int]) -> None:
    full = shape_of(form, shape)
    kept = [entries(full, form, uniform_rank(full, form, Fraction(part, 20))) for part in range(1, 21)]
    assert kept == sorted(kept)


def test_entries_are_those_of_the_factors() -> None:
    out, in_, kh, kw = shape = (16, 12, 3, 5)
    assert entries(shape, "channel", 4) == 4 * in_ * kh * kw + out * 4
    assert entries(shape, "spatial", 4) == 4 * in_ * kh + out * 4 * kw
    assert entries(shape, "channel", None) == math.prod(shape)


def test_multiply_adds_follow_the_pixels() -> None:
    shape, pixels = (16, 12, 3, 5), 49
    between = 3 * pixels  # rows of the output, columns of the input

    def macs(form: str, rank: int | None) -> int:
        return allocate.macs(shape, Use(form, pixels, between), rank)

    assert macs("channel", None) == pixels * math.prod(shape)
    assert macs("channel", 4) == pixels * entries(shape, "channel", 4)
    assert macs("spatial", 4) == 4 * (between * 12 * 3 + pixels * 16 * 5)


def test_a_look_up_is_free_until_it_is_factored() -> None:
    assert allocate.macs((1000, 64), Use("embedding", 7), None) == 0
    assert allocate.macs((1000, 64), Use("embedding", 7), 8) == 7 * 8 * 64


def convex(seed: int, modules: int = 3, length: int = 5, *, unit: bool = False) -> dict[str, Curve]:
    """Return modules whose losses fall along convex curves down to nothing at their dense weights."""
    chance = random.Random(seed)
    curves = {}
    for number in range(modules):
        price = 1 if unit else chance.randint(1, 6)
        falls = sorted((chance.random() * 10 for _ in range(length)), reverse=True)
        losses = [sum(falls[rank:]) for rank in range(1, length)]
        ranks = range(1, length)
        curves[f"m{number}"] = Curve(ranks, [rank * price for rank in ranks], losses, length * price)
    return curves


def cost(curves: Mapping[str, Curve], ranks: Mapping[str, int | None]) -> int:
    return sum(c.dense if ranks[n] is None else c.costs[c.ranks.index(ranks[n])] for n, c in curves.items())


def loss(curves: Mapping[str, Curve], ranks: Mapping[str, int | None]) -> float:
    return sum(0.0 if ranks[n] is None else c.losses[c.ranks.index(ranks[n])] for n, c in curves.items())


def choices(curves: Mapping[str, Curve]) -> list[dict[str, int | None]]:
    """Return every way to choose ranks."""
    options: Sequence[Sequence[int | None]] = [[*curve.ranks, None] for curve in curves.values()]
    return [dict(zip(curves, picked, strict=True)) for picked in itertools.product(*options)]


def smallest(curves: Mapping[str, Curve]) -> int:
    return sum(curve.costs[0] for curve in curves.values())


def total(curves: Mapping[str, Curve]) -> int:
    return sum(curve.dense for curve in curves.values())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("foresee_dense", [True, False])
def test_spending_never_exceeds_the_budget(seed: int, foresee_dense: bool) -> None:
    curves = convex(seed)
    for budget in range(smallest(curves), total(curves) + 1):
        spent = cost(curves, spend(curves, budget, foresee_dense=foresee_dense))
        assert spent <= budget, f"seed {seed}, budget {budget}"


@pytest.mark.parametrize("seed", range(20))
def test_more_budget_never_means_more_loss(seed: int) -> None:
    curves = convex(seed)
    budgets = range(smallest(curves), total(curves) + 1)
    losses = [loss(curves, spend(curves, budget, foresee_dense=True)) for budget in budgets]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses)), f"seed {seed}: {losses}"


@pytest.mark.parametrize("seed", range(10))
def test_with_equal_prices_the_pass_is_optimal_at_every_budget(seed: int) -> None:
    curves = convex(seed, unit=True)
    ways = [(cost(curves, ranks), loss(curves, ranks)) for ranks in choices(curves)]
    for budget in range(smallest(curves), total(curves) + 1):
        best = min(lost for spent, lost in ways if spent <= budget)
        found = loss(curves, spend(curves, budget, foresee_dense=True))
        assert found == pytest.approx(best), f"seed {seed}, budget {budget}"


@pytest.mark.parametrize("seed", range(10))
def test_on_convex_curves_every_stop_of_the_pass_is_optimal_for_its_cost(seed: int) -> None:
    curves = convex(seed)
    ways = [(cost(curves, ranks), loss(curves, ranks)) for ranks in choices(curves)]
    every_step = [step for curve in curves.values() for step in allocate.steps(curve, foresee_dense=True)]
    budget = smallest(curves)
    for _, price, _ in sorted(every_step, key=lambda step: -step[0]):
        budget += price
        best = min(lost for spent, lost in ways if spent <= budget)
        found = loss(curves, spend(curves, budget, foresee_dense=True))
        assert found == pytest.approx(best), f"seed {seed}, budget {budget}"


@pytest.mark.parametrize("foresee_dense", [True, False])
def test_the_whole_budget_leaves_everything_dense(foresee_dense: bool) -> None:
    curves = convex(0)
    assert set(spend(curves, total(curves), foresee_dense=foresee_dense).values()) == {None}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_is_filled_without_a_loss_or_a_debt(seed: int) -> None:
    curves = convex(seed)
    for share in (0.4, 0.6, 0.8, 0.95):
        floor = sum(curve.costs[0] for curve in curves.values())
        budget = floor + int(share * (total(curves) - floor))
        before = spend(curves, budget, foresee_dense=False)
        after = fill(curves, before, budget)

        def price(ranks: dict[str, int | None]) -> int:
            return sum(c.dense if ranks[n] is None else c.costs[c.ranks.index(ranks[n])] for n, c in curves.items())

        def loss(ranks: dict[str, int | None]) -> float:
            return sum(0 if ranks[n] is None else c.losses[c.ranks.index(ranks[n])] for n, c in curves.items())

        assert price(after) <= budget and loss(after) <= loss(before)


def test_a_part_of_a_step_that_does_not_fit_is_taken() -> None:
    curve = Curve([1, 2, 3, 4], [10, 20, 30, 40], [9.0, 8.9, 8.8, 1.0], 50)
    assert spend({"a": curve}, 35, foresee_dense=False) == {"a": 1}
    assert fill({"a": curve}, {"a": 1}, 35) == {"a": 3}
    assert fill({"a": curve}, {"a": None}, 60) == {"a": None}


def test_multiples_are_rounded_down_but_are_one_at_least() -> None:
    assert [fitting((64, 48), "linear", rank, 8) for rank in (1, 7, 8, 15, 16)] == [8, 8, 8, 8, 16]
    assert uniform_rank((64, 48), "linear", HALF, 8) == 8 and uniform_rank((64, 48), "linear", HALF) == 13
    assert uniform_rank((64, 48), "linear", Fraction(1, 100), 16) == 16
    assert uniform_rank((64, 48), "linear", HALF, 32) is None, "at rank 32 it would grow"
    assert fitting((64, 48), "linear", 27, 4) == 24


def test_a_dent_in_a_curve_is_stepped_over() -> None:
    curve = Curve([1, 2, 3], [1, 2, 3], [10.0, 9.9, 1.0], 9)
    assert [rank for *_, rank in allocate.steps(curve, foresee_dense=True)] == [3, None]


def test_only_a_foreseen_dense_weight_is_worth_a_jump() -> None:
    flat = Curve([1, 2], [10, 20], [9.0, 8.9], 25, next_loss=8.8)
    other = Curve([1, 2, 3], [10, 20, 30], [3.0, 2.5, 2.0], 35, next_loss=1.9)
    budget = 35
    assert spend({"a": flat, "b": other}, budget, foresee_dense=True) == {"a": None, "b": 1}
    assert spend({"a": flat, "b": other}, budget, foresee_dense=False) == {"a": 1, "b": 2}


def test_a_module_without_a_cheaper_rank_stays_dense() -> None:
    curves = {"small": Curve([], [], [], 4), **convex(1)}
    assert spend(curves, total(curves), foresee_dense=False)["small"] is None


def test_a_budget_out_of_reach_is_refused_with_the_least_ratio() -> None:
    curves = convex(3)
    least = smallest(curves)
    assert set(spend(curves, least, foresee_dense=True).values()) == {1}
    with pytest.raises(PlanError, match=f"leaves {least - 1} for the eligible modules; .* takes {least}") as refusal:
        spend(curves, least - 1, foresee_dense=True)
    assert refusal.match(f"a ratio of at least {least / total(curves):.4f}")


@pytest.mark.parametrize("allocation", ["energy", "global"])
def test_only_energy_is_blind_to_the_scale_of_a_module(allocation: str) -> None:
    torch = pytest.importorskip("torch")
    from peftc.plans.plan import Aim, Budget, Target

    targets = {name: Target(name, "linear", (40, 30)) for name in "ab"}
    chance = random.Random(0)
    sigma = {name: sorted((chance.random() for _ in range(30)), reverse=True) for name in "ab"}

    def ranks(scale: float) -> dict[str, int | None]:
        tails = {n: [sum(s * s for s in sigma[n][r:]) * (scale if n == "a" else 1) for r in range(31)] for n in "ab"}
        losses = {name: torch.tensor(tail, dtype=torch.float64) for name, tail in tails.items()}
        return decide(targets, Aim(Budget("ratio", HALF), allocation), losses.__getitem__, Whole(2400, None))

    one, other = ranks(1.0), ranks(1024.0)
    assert (one == other) == (allocation == "energy"), f"{one} and {other}"
