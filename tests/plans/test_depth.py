"""The rule of SLS on score lists made by hand, and the other ways to say what stays."""

import pytest

from peftc.errors import DataError, PlanError
from peftc.plans import depth


@pytest.mark.parametrize(
    ("scores", "alpha", "kept"),
    [
        ([0.1, 0.2, 0.5, 0.6], 0.5, 3),
        ([0.5, 0.1, 0.5, 0.6], 0.5, 3),  # not 1: the run from the top is broken
        ([0.5, 0.5, 0.5, 0.6], 0.5, 1),
        ([0.3, 0.6], 0.5, 1),  # at the threshold is enough
        ([-0.2, -0.1, 0.0, 0.4], 0.1, 4),
        ([0.9, 0.1], 1.0, 1),
        ([0.2, 0.8, 0.9], 1.0, 3),
    ],
)
def test_the_last_layer_kept_begins_the_unbroken_run_from_the_top(scores: list[float], alpha: float, kept: int) -> None:
    found = depth.above_threshold(scores, alpha)
    assert found.kept == tuple(range(kept))
    assert found.threshold == pytest.approx(alpha * scores[-1])


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.5, 0.6], [0.5, 0.1, 0.5, 0.6], [0.4, 0.3, 0.2, 0.1], [-1, 0, 0.2, 1]])
def test_a_larger_alpha_never_keeps_fewer(scores: list[float]) -> None:
    kept = [len(depth.above_threshold(scores, step / 20).kept) for step in range(1, 21)]
    assert kept == sorted(kept)


@pytest.mark.parametrize("last", [0.0, -0.3, float("nan")])
def test_scores_that_say_nothing_are_refused(last: float) -> None:
    with pytest.raises(DataError, match="nothing is dropped and nothing is written"):
        depth.above_threshold([0.5, last], 0.3)


def test_layers_within_the_noise_of_the_threshold_are_named() -> None:
    found = depth.above_threshold([0.1, 0.28, 0.34, 0.6, 1.0], 0.3)
    assert found.close([0.1, 0.28, 0.34, 0.6, 1.0]) == [1]
    assert depth.Decision((0, 1)).close([0.1, 0.1]) == []


def test_the_best_stay_in_their_order_the_earlier_of_equals_and_fixed_ones_first() -> None:
    assert depth.best([0.1, 0.9, 0.5, 0.5], 2).kept == (1, 2)
    assert depth.best([0.1, 0.9, float("nan"), 0.5], 2, fixed=[2]).kept == (1, 2)
    assert depth.best([0.1, 0.2], 2).kept == (0, 1)


def test_all_but_some() -> None:
    assert depth.without([1, 3], 5).kept == (0, 2, 4)
    with pytest.raises(PlanError, match="`--drop` names layer 5") as refusal:
        depth.without([5], 5)
    assert "0 to 4" in str(refusal.value)
    with pytest.raises(PlanError, match="names all 2 layers"):
        depth.without([0, 1], 2)
