"""What the processes of a launch learn from in one step, for losses that look at the whole batch of it at once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from peftc import processes


@dataclass(frozen=True)
class Peers:
    """Those who share a step, each with as many of its samples, as `processes.share` deals them out."""

    number: int = 1  # how many they are; 1 talks to nobody
    place: int = 0  # of this one among them, from 0

    def all(self, rows: Tensor, fill: float = 0) -> Tensor:
        """Return the rows (n, ...) of all, (n number, ...), in the order of the step's samples.

        A gradient is the sum of those of all: each computes the same loss of all rows, and the mean over processes that
        the training takes is then the gradient of that loss.

        Args:
            rows: as many in each process; (n, tokens) may be shorter in one than in another.
            fill: what shorter ones are filled up with.
        """
        if self.number == 1:
            return rows
        if rows.ndim == 2 and not rows.is_floating_point():
            widest = torch.tensor(rows.shape[1], device=rows.device)
            distributed.all_reduce(widest, distributed.ReduceOp.MAX)
            rows = F.pad(rows, (0, int(widest) - rows.shape[1]), value=fill)
        return _Gathered.apply(rows, self)  # type: ignore[no-untyped-call, no-any-return]

    def own(self, rows: Tensor) -> Tensor:
        """Return this one's share of rows of all."""
        return rows[self.place :: self.number]


ALONE = Peers()


def here() -> Peers:
    """Return the processes of this launch."""
    return Peers(processes.size(), processes.rank())


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, peers: Peers) -> Tensor:
        context.peers = peers
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(peers.number)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return context.peers.own(whole), None
