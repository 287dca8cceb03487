"""LoRA (arXiv 2106.09685): weight + alpha / rank * up @ down, with ``up`` at zero to begin with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lora(module: nn.Module, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> nn.Module | None:
    """Return the update of a module, None for one that the method does not adapt.

    Args:
        module: with a weight (out, in).
        rank: of the update.
        alpha: over the rank, what the product is multiplied by.
        dropout: of the input of the update, while the network trains.
    """
    if not isinstance(module, nn.Linear):
        return None
    return Lora(module.in_features, module.out_features, rank, alpha / rank, dropout)


class Lora(nn.Module):
    """The factors (out, rank) and (rank, in) of an update."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        given = base(x)
        seen = self.dropout(x).to(self.down.dtype)
        return given + self.scale * F.linear(F.linear(seen, self.down), self.up).to(given.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        """Return the updated weight (out, in) in float32."""
        up, down = self.factors()
        return weight.float() + up @ down

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (out, rank) and (rank, in), whose product is the change of the weight."""
        return self.scale * self.up.float(), self.down.float()
