"""Tucker-2: a 1 x 1 convolution to rank_in channels, a k x k one to rank_out channels, a 1 x 1 one back.

Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", 2016,
arXiv 1511.06530, section 3.1: a higher-order SVD over the two channel modes, refined by alternating least squares
(De Lathauwer et al., 2000, "On the best rank-1 and rank-(R1, ..., RN) approximation", HOOI).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftc.methods.spectrum import Truncation
from peftc.nn.lowrank import Factors


def tucker2(weight: Tensor, *, sweeps: int = 4) -> Tucker:
    """Decompose ``weight`` over its two channel modes.

    Args:
        weight: (out, in, kh, kw), finite.
        sweeps: >= 0, rounds of alternating refinement after the higher-order SVD.
    """
    return Tucker(weight, sweeps)


class Tucker:
    """Mode bases of a weight (out, in, kh, kw), and on demand its core and factors."""

    def __init__(self, weight: Tensor, sweeps: int) -> None:
        self.weight, self.sweeps, self.dtype = weight.double(), sweeps, weight.dtype
        self.left = _basis(self.weight.flatten(1))  # (out, out)
        self.right = _basis(self.weight.transpose(0, 1).flatten(1))  # (in, in)

    def losses(self) -> Tensor:
        """Return (out + 1, in + 1) squared errors of the truncated higher-order SVD at every rank pair."""
        core = torch.einsum("oihw,oa,ib->abhw", self.weight, self.left, self.right)
        kept = core.square().sum(dim=(2, 3)).cumsum(0).cumsum(1)
        losses = kept.new_full((kept.shape[0] + 1, kept.shape[1] + 1), float(kept[-1, -1]))
        losses[1:, 1:] = (kept[-1, -1] - kept).clamp_min(0)
        return losses

    def truncate(self, rank: tuple[int, int]) -> Truncation:
        """Return core (rank_out, rank_in, kh, kw), up (out, rank_out) and down (rank_in, in), refined by HOOI."""
        rank_out, rank_in = rank
        left, right = self.left[:, :rank_out], self.right[:, :rank_in]
        for _ in range(self.sweeps):
            left = _basis(torch.einsum("oihw,ib->obhw", self.weight, right).flatten(1))[:, :rank_out]
            right = _basis(torch.einsum("oihw,oa->iahw", self.weight, left).flatten(1))[:, :rank_in]
        core = torch.einsum("oihw,oa,ib->abhw", self.weight, left, right)
        total = float(self.weight.square().sum())
        tail = max(total - float(core.square().sum()), 0.0)
        norm = (float(core.square().sum()) * rank_out * rank_in) ** (1 / 6)  # three parts of equal norm train alike
        up = left * norm / rank_out**0.5 if norm else left
        down = right.T * norm / rank_in**0.5 if norm else right.T
        core = core * ((rank_out * rank_in) ** 0.5 / norm**2) if norm else core
        factors = Factors(up.to(self.dtype), down.to(self.dtype), core.to(self.dtype))
        return Truncation(factors, (tail / total) ** 0.5 if total else 0.0, None, f"hooi{self.sweeps}")


def _basis(unfolded: Tensor) -> Tensor:
    """Return the left singular vectors (n, n) of (n, m): most energy first, largest entry positive."""
    basis = torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(1)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)
