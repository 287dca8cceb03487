"""Some samples of a data set as a model reads them: those that it learns from, or those that only measure."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from peftc.data.augment import Seeds
from peftc.tasks.task import Batch, Encoded


@dataclass(frozen=True)
class Held:
    """Samples of one encoded data set; ``changed`` reads rows as they are learnt from, where not as they are."""

    encoded: Encoded
    rows: Sequence[int]
    changed: Callable[[Sequence[int], Seeds], Batch] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the batch of some of these samples, counted among them."""
        return self.encoded.batch([self.rows[index] for index in indices])

    def drawn(self, indices: Sequence[int], seeds: Seeds) -> Batch:
        """Return the batch of some of these samples to learn from, changed at random where that was asked for."""
        return self.batch(indices) if self.changed is None else self.changed([self.rows[at] for at in indices], seeds)

    def batches(self, size: int) -> Generator[Batch, None, None]:
        """Yield all of these samples in order, at most ``size`` at once, read ahead."""
        return self.encoded.batches([self.rows[start : start + size] for start in range(0, len(self), size)])
