"""Budgets of entries fall along a cubic and are shared out among layers."""

import itertools
import math

import pytest

from peftc.plans import budgets


def test_the_cubic_is_exact_at_its_ends_and_falls() -> None:
    totals = [budgets.total(step, 100, 9_900, 1_000) for step in range(101)]
    assert totals[0] == 9_900
    assert totals[100] == 1_000
    assert all(a >= b for a, b in itertools.pairwise(totals))
    assert totals[50] == 1_000 + round(8_900 / 8)


def test_entries_are_shared_out_each_epoch_or_more_often_in_a_short_training() -> None:
    assert [step for step in range(1, 101) if budgets.refreshed(step, 2000, 50, 0)] == [50, 100]
    assert [step for step in range(1, 41) if budgets.refreshed(step, 40, 40, 0)] == list(range(2, 41, 2))
    assert [step for step in range(1, 11) if budgets.refreshed(step, 10, 40, 3)] == [3, 6, 9, 10]


SIZES = {"a": 100, "b": 1000, "c": 400}
ODD: list[dict[str, float]] = [
    {"a": 1.0, "b": 2.0, "c": 3.0},
    {"a": 0.0, "b": 0.0, "c": 0.0},
    {"a": math.nan, "b": math.inf, "c": 1e-300},
    {"a": math.inf, "b": math.inf, "c": math.inf},
    {"a": 1e308, "b": 1e308, "c": 1e308},
    {"a": 5e-324, "b": -1.0, "c": 0.0},
]


@pytest.mark.parametrize("scores", ODD, ids=str)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("budget", [0, 1, 2, 7, 333, 1499, 1500])
def test_shares_sum_to_the_budget_within_floors_and_sizes(scores: dict[str, float], floor: float, budget: int) -> None:
    kept = budgets.shares(scores, SIZES, budget, floor)
    assert sum(kept.values()) == budget
    assert all(int(floor * budget * size / 1500) <= kept[name] <= size for name, size in SIZES.items())


def test_shares_follow_scores_and_a_full_layer_passes_on_the_rest() -> None:
    assert budgets.shares({"a": 1, "b": 2, "c": 3}, SIZES, 60) == {"a": 10, "b": 20, "c": 30}
    assert budgets.shares({"a": 1e9, "b": 1, "c": 3}, SIZES, 500) == {"a": 100, "b": 100, "c": 300}
    assert budgets.shares({"a": 0, "b": 0, "c": 0}, SIZES, 150) == {"a": 10, "b": 100, "c": 40}
    assert budgets.shares({"a": 0, "b": 0, "c": 1}, SIZES, 150) == {"a": 0, "b": 0, "c": 150}
    assert budgets.shares({"a": 0, "b": 0, "c": 1}, SIZES, 150, 0.1) == {"a": 1, "b": 10, "c": 139}
    assert budgets.shares({"a": 9, "b": 1, "c": 1}, SIZES, 150, 1.0) == {"a": 10, "b": 100, "c": 40}
