"""How many entries each layer may keep while SNELLA trains: a falling total, shared out by score. Pure numbers.

After section A.1.4 of the papers notes, from the authors' code; floors, and what is done about scores that are no
numbers, are additions: without a floor some layers end up whole and others empty.
"""

import math
from collections.abc import Mapping

ALLOCATIONS = ("bilevel", "uniform")


def zeroed(entries: int, sparsity: float) -> int:
    """Return how many of ``entries`` a sparsity in [0, 1] zeroes: the next whole number, as SNELL's equation 5."""
    return min(entries, math.ceil(sparsity * entries - 1e-9 * entries))


def total(step: int, steps: int, first: int, last: int) -> int:
    """Return how many entries all layers keep after ``step`` of ``steps``: a cubic from ``first`` to ``last``.

    Both ends are exact.
    """
    left = 1 - min(max(step / steps, 0.0), 1.0)
    return last + round((first - last) * left**3)


def refreshed(step: int, steps: int, steps_per_epoch: float, every: int) -> bool:
    """Return whether the entries are shared out anew after ``step``, from 1, of ``steps``, the last one included.

    They are after every ``every`` steps; where that is 0 each epoch, or each twentieth of a training that is shorter.
    """
    period = every or max(1, round(min(steps_per_epoch, steps / 20)))
    return step >= steps or step % period == 0


def shares(scores: Mapping[str, float], sizes: Mapping[str, int], budget: int, floor: float = 0.0) -> dict[str, int]:
    """Return how many entries each layer keeps, in proportion to its score, at most its size; they sum to ``budget``.

    What a full layer cannot take goes to the others. A score that is not a number or negative counts as 0, an infinite
    one as the largest finite one; if all are 0, sizes decide.

    Args:
        scores: by layer.
        sizes: entries of each layer.
        budget: in [0, sum of the sizes].
        floor: in [0, 1], what a layer keeps whatever its score, as a share of what it would keep by its size alone;
            1 shares out by size.
    """
    finite = [score for score in scores.values() if math.isfinite(score) and score > 0]
    largest = max(finite, default=1.0)
    weights = {  # in [0, 1], so that their sum is finite
        name: 0.0 if math.isnan(score) or score <= 0 else min(score, largest) / largest
        for name, score in scores.items()
    }
    everything = sum(sizes.values())
    kept = {name: int(floor * budget * size / everything) for name, size in sizes.items()}
    while (left := budget - sum(kept.values())) > 0:
        open_ = [name for name, size in sizes.items() if kept[name] < size]
        room = {name: sizes[name] - kept[name] for name in open_}
        whole = sum(weights[name] for name in open_)
        parts = {name: weights[name] / whole if whole else room[name] / sum(room.values()) for name in open_}
        given = {name: min(int(parts[name] * left), room[name]) for name in open_}
        if not any(given.values()):  # fewer are left than there are layers: one each, by score
            for name in sorted(open_, key=lambda name: -parts[name])[:left]:
                given[name] = 1
        for name, count in given.items():
            kept[name] += count
    return kept
