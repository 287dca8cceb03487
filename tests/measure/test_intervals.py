import numpy as np
import pytest

from peftc.measure.intervals import bootstrap, paired_shares, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 100, 0.7222, 0.8749)]
)
def test_wilson_gives_the_published_bounds(hits: int, total: int, low: float, high: float) -> None:
    interval = wilson(hits, total)
    assert interval.value == hits / total
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize("total", [1, 2, 10, 150])
def test_an_interval_holds_its_value_and_stays_a_share(total: int) -> None:
    for hits in range(total + 1):
        interval = wilson(hits, total)
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_more_samples_give_a_narrower_interval() -> None:
    widths = [wilson(total // 2, total).high - wilson(total // 2, total).low for total in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)


def test_a_paired_difference_of_equals_is_zero_but_not_certain() -> None:
    interval = paired_shares([True, False] * 75, [True, False] * 75)
    assert interval.value == 0
    assert -0.03 < interval.low < 0 < interval.high < 0.03


def test_a_paired_difference_changes_sign_with_its_order() -> None:
    one, other = [True] * 30 + [False] * 20, [True] * 20 + [False] * 25 + [True] * 5
    there, back = paired_shares(one, other), paired_shares(other, one)
    assert there.value == pytest.approx(0.1)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_a_paired_difference_agrees_with_the_bootstrap() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.random(400) < 0.8, draw.random(400) < 0.7
    ours = paired_shares(list(one), list(other))
    theirs = bootstrap(lambda rows: one[rows].mean() - other[rows].mean(), 400, seed=0)
    assert ours == pytest.approx(theirs, abs=0.01)


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=500)
    interval = bootstrap(lambda rows: values[rows].mean(), 500, seed=1)
    half = 1.96 * values.std() / 500**0.5
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def test_the_bootstrap_repeats_with_its_seed_and_leaves_out_resamples_without_a_value() -> None:
    values = np.array([1.0, 2.0, np.nan])
    one, other = (bootstrap(lambda rows: values[rows].mean(), 3, seed=7) for _ in range(2))
    assert one[1:] == other[1:]
    assert 1 <= one.low <= one.high <= 2
