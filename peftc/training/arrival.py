"""Which samples a step learns from, what is random about them, and how long a training waits until they are there.

The samples of a step follow from the seed and its epoch, and what happens to one of them from the seed, the epoch and
its index. So they are the same however many processes and parts share a step, and in a run that was resumed.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from peftc import processes
from peftc.data.augment import Seeds
from peftc.data.loading import ahead
from peftc.options import Recipe
from peftc.training.schedule import mixed

MUCH = 0.05  # of the time of a training spent waiting for data


class Marked(Protocol):
    """Samples without end by their places, from one on."""

    @property
    def mark(self) -> dict[str, Any]:
        """Where the last ones that were read can be read again from."""

    def go_on(self, mark: dict[str, Any]) -> None:
        """Read from there on."""


@dataclass(frozen=True)
class Stream:
    """A stream of epochs, each in an order of its own, that is cut into steps, and those into parts."""

    size: int | Marked  # of the data; what they are without end
    recipe: Recipe
    batch: Callable[[Sequence[int], Seeds], Any]  # gives the batch of some samples, by seeds where it is random
    workers: int | None = None  # processes that read ahead; as many as pay when None
    tokens: Callable[[Any], int] | None = None  # counts those of a batch, where there are any

    def step(self, step: int) -> list[tuple[int, int]]:
        """Return the samples of a step: the epoch and the index of each; of those without end, 0 and its place."""
        if not isinstance(self.size, int):
            return [(0, step * self.recipe.batch_size + at) for at in range(self.recipe.batch_size)]
        found: list[tuple[int, int]] = []
        position, number = step * self.recipe.batch_size, self.recipe.batch_size
        while len(found) < number:
            epoch, at = divmod(position + len(found), self.size)
            some = _order(self.size, mixed(self.recipe.seed, epoch, 0))[at : at + number - len(found)]
            found += [(epoch, index) for index in some.tolist()]
        return found

    def part(self, at: int) -> tuple[list[int], Seeds]:
        """Return the samples of a part of this process's share of a step, as parts are counted over all steps."""
        step, part = divmod(at, self.recipe.accumulate)
        samples = processes.share(self.step(step))[part :: self.recipe.accumulate]
        seeds = [mixed(self.recipe.seed, epoch, index, 1) for epoch, index in samples]
        return [index for _, index in samples], Seeds(seeds, mixed(self.recipe.seed, step, 0, 2))

    def given(self, at: int) -> Any:
        """Return the batch of a part."""
        return self.marked(at)[0]

    def marked(self, at: int) -> tuple[Any, dict[str, Any]]:
        """Return the batch of a part and, of samples without end, from where it can be read again."""
        found = self.batch(*self.part(at))
        return found, {} if isinstance(self.size, int) else self.size.mark

    def go_on(self, mark: dict[str, Any]) -> None:
        """Read samples without end from a mark on."""
        if mark and not isinstance(self.size, int):
            self.size.go_on(mark)

    def __str__(self) -> str:
        return f"{self.size} samples" if isinstance(self.size, int) else "a stream of samples"

    @contextmanager
    def arriving(self, first: int, last: int) -> Iterator["Arrivals"]:
        """Give the batches of steps, from the first to before the last, read ahead within a context."""
        asked = range(first * self.recipe.accumulate, last * self.recipe.accumulate)
        with closing(ahead(self.marked, asked, self.workers)) as batches:
            yield Arrivals(batches, self.recipe.batch_size, self.tokens)


@functools.lru_cache(maxsize=2)
def _order(size: int, seed: int) -> Tensor:
    """Return the samples of an epoch in its order; steps of the same epoch ask for it again."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@dataclass
class Arrivals:
    """The batches that a training learns from, one after the other, and how fast that goes.

    Attributes:
        batches: one for each part of each step, and with it a mark.
        mark: of the last one.
        samples: of a step, over all processes.
        count: gives the tokens of a batch, where there are any.
        waited, worked: seconds until batches were there, and of the steps as a whole.
        steps, tokens: how many there were, in this process.
    """

    batches: Iterator[tuple[Any, dict[str, Any]]]
    samples: int
    count: Callable[[Any], int] | None = None
    mark: dict[str, Any] = field(default_factory=dict, init=False)
    waited: float = field(default=0.0, init=False)
    worked: float = field(default=0.0, init=False)
    steps: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)

    def take(self) -> Any:
        """Return the next batch."""
        begun = time.monotonic()
        given, self.mark = next(self.batches)
        self.waited += time.monotonic() - begun
        self.tokens += self.count(given) if self.count is not None else 0
        return given

    def add(self, seconds: float) -> None:
        """Count a step."""
        self.worked, self.steps = self.worked + seconds, self.steps + 1

    def speed(self) -> dict[str, float]:
        """Return samples and tokens per second over all processes, and the share of the time spent waiting for them."""
        if not self.worked:
            return {}
        tokens = processes.size() * self.tokens / self.worked
        return {
            "samples_per_second": self.samples * self.steps / self.worked,
            **({"tokens_per_second": tokens} if tokens else {}),
            "waiting": self.waited / self.worked,
        }


def said(speed: dict[str, float]) -> str:
    """Return it in words."""
    tokens = f", {speed['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in speed else ""
    return f"{speed['samples_per_second']:.4g} samples/s{tokens}, {speed['waiting']:.0%} of it waiting for data"


def shortly(speed: dict[str, float]) -> str:
    """Return it as it stands beside a bar: what is waited for only where that is much."""
    waits = f", {speed['waiting']:.0%} waiting for data" if speed["waiting"] >= MUCH else ""
    return f"{speed['samples_per_second']:.3g} samples/s{waits}"
