"""Running sums over rows: means, and symmetric matrices of which one half is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Triangle:
    """A symmetric matrix (size, size) that products of rows are added to; the lower half of it is kept, in float64."""

    size: int
    entries: Tensor  # (n,), one block of rows after another

    @classmethod
    def empty(cls, size: int, device: torch.device) -> Triangle:
        """Return zeros."""
        number = sum((some.stop - some.start) * some.stop for some in _row_blocks(size))
        return cls(size, torch.zeros(number, dtype=torch.float64, device=device))

    def blocks(self) -> Iterator[tuple[Tensor, slice, slice]]:
        """Yield blocks (rows, columns up to the diagonal), and which rows and columns they are."""
        start = 0
        for some in _row_blocks(self.size):
            number = (some.stop - some.start) * some.stop
            yield self.entries[start : start + number].view(-1, some.stop), some, slice(some.stop)
            start += number

    def add(self, rows: Tensor, scale: float = 1.0) -> Triangle:
        """Add scale * rows^T rows, of rows (n, size); return itself."""
        for block, some, upto in self.blocks():
            block.add_(rows[:, some].T @ rows[:, upto], alpha=scale)
        return self

    def whole(self) -> Tensor:
        """Return (size, size)."""
        found = self.entries.new_empty(self.size, self.size)
        for block, some, upto in self.blocks():
            found[upto, some] = block.T
            found[some, upto] = block
        return found


@dataclass
class Running:
    """Mean (d,) and, where asked for, scatter (d, d) around it, of rows seen so far; float64."""

    size: int  # d
    scatter: Triangle | None
    mean: Tensor  # of all rows
    count: int = 0  # of rows

    @classmethod
    def empty(cls, size: int, device: torch.device, *, scatter: bool) -> Running:
        """Return one that has seen nothing."""
        triangle = Triangle.empty(size, device) if scatter else None
        return cls(size, triangle, torch.zeros(size, dtype=torch.float64, device=device))

    def add(self, rows: Tensor) -> None:
        """Add rows (n, d), float32 or float64."""
        if not len(rows):
            return
        centre = rows.mean(0)
        if self.scatter is None:
            self._moved(centre.double(), len(rows))
            return
        centred = rows - centre
        missed = centred.mean(0).double()  # rounding left the centre that far from the mean
        gap, share = self._moved(centre.double() + missed, len(rows))
        for block, some, upto in self.scatter.add(centred).blocks():
            block.addr_(missed[some], missed[upto], alpha=-len(rows)).addr_(gap[some], gap[upto], alpha=share)

    def merge(self, other: Running) -> None:
        """Add what another one has seen."""
        if not other.count:
            return
        gap, share = self._moved(other.mean, other.count)
        if self.scatter is None or other.scatter is None:
            return
        self.scatter.entries += other.scatter.entries
        for block, some, upto in self.scatter.blocks():
            block.addr_(gap[some], gap[upto], alpha=share)

    def covariance(self) -> Tensor:
        """Return (d, d), float64."""
        assert self.scatter is not None
        return self.scatter.whole().div_(max(self.count, 1))

    def _moved(self, mean: Tensor, count: int) -> tuple[Tensor, float]:
        """Count further rows; return how far their mean is off, and how often its outer product joins the scatter."""
        total = self.count + count
        gap, share = mean - self.mean, self.count * count / total
        self.mean += gap * (count / total)
        self.count = total
        return gap, share


def _row_blocks(size: int) -> list[slice]:
    """Return blocks of rows: small enough to leave most of the upper triangle out, large enough to multiply fast."""
    step = max(128, size // 8)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
