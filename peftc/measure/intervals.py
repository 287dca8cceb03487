"""95 % intervals, so that no figure stands alone."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from peftc.report import interval_text

Z = 1.959963984540054  # the normal quantile that leaves 2.5 % on each side
ROUNDS = 1000


class Interval(NamedTuple):
    """A figure and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return interval_text(*self)

    def __neg__(self) -> "Interval":
        """Return what is lost where this is won: 0 stays without a sign."""
        return Interval(0.0 - self.value, 0.0 - self.high, 0.0 - self.low)


def wilson(hits: int, total: int) -> Interval:
    """Return the share ``hits / total`` with Wilson's score interval (Wilson, 1927), which stays inside [0, 1]."""
    share, weight = hits / total, Z * Z / total
    centre = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def paired_shares(one: Sequence[bool], other: Sequence[bool]) -> Interval:
    """Return share(one) - share(other) over the hits of the same samples, with the interval of Agresti and Min (2005).

    It adds half a sample to each cell of the 2 x 2 table: where no sample differs, a bootstrap would claim certainty.
    """
    total = len(one)
    gained = sum(bool(a) and not b for a, b in zip(one, other, strict=True))
    lost = sum(bool(b) and not a for a, b in zip(one, other, strict=True))
    value, padded = (gained - lost) / total, total + 2
    centre = (gained - lost) / padded
    half = Z / padded * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / padded)
    return Interval(value, max(-1.0, min(centre - half, value)), min(1.0, max(centre + half, value)))


def bootstrap(statistic: Callable[[np.ndarray], float], samples: int, *, seed: int) -> Interval:
    """Return a statistic with its percentile bootstrap interval (Efron and Tibshirani, 1993, section 13.3).

    Args:
        statistic: takes indices of samples, (samples,), and gives the figure over them; NaN where it has none.
        samples: >= 1.
        seed: of the resampling.
    """
    value = float(statistic(np.arange(samples)))
    generator = np.random.default_rng(seed)
    draws = np.array([statistic(generator.integers(0, samples, samples)) for _ in range(ROUNDS)])
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Interval(value, value, value)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high))
