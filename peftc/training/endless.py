"""Samples of a stream that is read as it comes, and from its start again where it ends.

Each sample has a place, counted from 0 and over all passes. A block of rows is read, encoded and shuffled as a whole,
by a seed of its own; what of it does not fill a step is left out, so that no step lies across two blocks. So which
samples a step learns from follows from the stream and the seed. Whoever reads them, each process of a launch and each
that reads ahead for it, goes through the stream by itself and encodes its own blocks. From the mark of a block it is
read on to the same samples, without what came before.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from peftc.data.augment import Seeds
from peftc.data.dataset import Dataset, Stream
from peftc.errors import DataError, ShortError
from peftc.tasks.task import Batch
from peftc.training.held import Held
from peftc.training.schedule import mixed

ROWS = 1024  # of a block, at least
STEPS = 32  # of a training that a block is to be enough for, so that little is left out
ORDER = 3  # what random numbers are drawn for


@dataclass(frozen=True)
class Mark:
    """Where a block begins: the place of its first sample, its number in its pass, and the state of the stream."""

    place: int = 0
    epoch: int = 0
    block: int = 0
    state: str | None = None


Block = tuple[Mark, Held, list[int]]  # where it begins, its samples, and the order of those that are learnt from


@dataclass
class Endless:
    """The samples of a stream by their places, which each process asks for in their order.

    Attributes:
        name: of the data set.
        stream: that they are of.
        encode: gives the samples of a block, by a seed.
        rows: of a block.
        skip: rows at the start that are not learnt from.
        step: samples of a step.
        seed: of the order in each block.
        begin: where to read from; places before that are not there.
    """

    name: str
    stream: Stream
    encode: Callable[[Dataset, int], Held]
    rows: int
    skip: int
    step: int
    seed: int
    begin: Mark = Mark()
    _process: int = field(default=0, init=False)  # whose the rest is: a file that is open is not shared
    _blocks: Iterator[Block] = field(default_factory=lambda: iter(()), init=False)
    _block: Block | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.skip and self.stream.is_whole:
            raise self._too_small()

    def batch(self, places: Sequence[int]) -> Batch:
        """Return the batch of some samples of one step as they are."""
        held, rows = self._reach(places)
        return held.batch(rows)

    def drawn(self, places: Sequence[int], seeds: Seeds) -> Batch:
        """Return the batch of some samples of one step, changed at random where that was asked for."""
        held, rows = self._reach(places)
        return held.drawn(rows, seeds)

    @property
    def mark(self) -> dict[str, Any]:
        """Where the block begins that was read last, as `go_on` takes it."""
        return asdict(self.begin if self._block is None else self._block[0])

    def go_on(self, mark: dict[str, Any]) -> None:
        """Read from a mark on."""
        self.begin, self._block = Mark(**mark), None

    def _reach(self, places: Sequence[int]) -> tuple[Held, list[int]]:
        """Return the samples of the block that places are in, and which of them these are."""
        if self._block is None or self._process != os.getpid() or places[0] < self._block[0].place:
            self._process, self._blocks = os.getpid(), self._from(self.begin)
            self._block = next(self._blocks)
        while places[0] >= self._block[0].place + len(self._block[2]):
            self._block = next(self._blocks)
        mark, held, order = self._block
        return held, [order[place - mark.place] for place in places]

    def _from(self, mark: Mark) -> Iterator[Block]:
        """Yield blocks from a mark on."""
        while True:
            begun = mark.place
            for state, rows in self.stream.blocks(self.rows, self.skip, mark.state):
                seed = mixed(self.seed, mark.epoch, mark.block, ORDER)
                held = self._encoded(rows, seed)
                number = len(held or ()) // self.step * self.step
                if held is not None and number:
                    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
                    yield replace(mark, state=state), held, order[:number].tolist()
                mark = Mark(mark.place + number, mark.epoch, mark.block + 1)
            if mark.place == begun:
                raise self._too_small()
            mark = Mark(mark.place, mark.epoch + 1)

    def _encoded(self, rows: Dataset, seed: int) -> Held | None:
        """Return the samples of a block; None where it is the short rest of a text."""
        try:
            return self.encode(rows, seed)
        except ShortError:
            return None

    def _too_small(self) -> DataError:
        behind = f"behind its first {self.skip:,} rows " if self.skip else ""
        why = f"{behind}no block of rows is enough for a step of {self.step} samples"
        hint = "leave `--streaming` out, or lower `--batch-size`"
        return DataError(f"`{self.name}` is too small to be learnt from as it comes", why=why, hint=hint)


def rows_of(head: Dataset, samples: int, step: int) -> int:
    """Return how many rows make a block: so many that they are enough for some steps, as the head says."""
    if samples >= len(head):
        return -(-ROWS // step) * step
    return max(ROWS, -(-STEPS * step * len(head) // max(1, samples)))
