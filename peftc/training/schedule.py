"""The schedule of a training, its random numbers, and what came of it; torch-free."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from peftc.options import Recipe


@dataclass
class Outcome:
    """What came of a training.

    Attributes:
        losses: the sum of the terms at each step.
        start: each term at the first step.
        scores: (step, score) on the held-out samples, larger is better.
        best: step whose weights are the result.
        steps: how many there were.
        planned: how many there were to be, where it did not stop early.
        seconds_per_step: mean wall-clock time of this process.
        resumed: step from which an interrupted run went on; 0 for a run from the start.
        optimizer_bytes: of the optimizer's state.
        speed: of the steps of this process: ``samples_per_second``, of texts ``tokens_per_second``, both over all
            processes, and the share of the time spent ``waiting`` for samples.
    """

    losses: list[float] = field(default_factory=list)
    start: dict[str, float] = field(default_factory=dict)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    steps: int = 0
    planned: int = 0
    seconds_per_step: float = 0.0
    resumed: int = 0
    optimizer_bytes: int = 0
    speed: dict[str, float] = field(default_factory=dict)


def rate(step: int, total: int, recipe: Recipe) -> float:
    """Return the learning rate at ``step`` in [0, total): up in a line to the highest, then as its schedule says."""
    rising = math.ceil(recipe.warmup * total)
    if step < rising:
        return recipe.learning_rate * ((step + 1) / rising)
    return recipe.learning_rate * SHAPES[recipe.schedule]((step - rising) / max(1, total - rising))


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _stable(done: float) -> float:
    """Return 1, and over the last fifth down by a root (Hägele et al., 2024, arXiv 2405.18392, equation 1)."""
    return 1 - math.sqrt(max(0.0, (done - 1 + DECAY) / DECAY))


DECAY = 0.2  # of the steps after the warm-up, by `wsd`
SHAPES: dict[str, Callable[[float], float]] = {  # share of the steps after the warm-up -> share of the highest rate
    "cosine": _cosine,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "wsd": _stable,
}


def mixed(seed: int, *parts: int) -> int:
    """Return a seed that differs for every combination of numbers."""
    value = seed
    for part in parts:
        value = (value * 0x9E3779B97F4A7C15 + part + 0x632BE59BD9B4E019) & (2**63 - 1)
    return value
