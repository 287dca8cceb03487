"""A bottleneck: y + up(GELU(down(.))), ``up`` at zero to begin with. It cannot be merged.

``after`` reads the module's output, as the adapters of Houlsby et al. (arXiv 1902.00751) do, which sit after the
projections that end attention and MLP; ``parallel`` reads the module's input, as AdaptFormer (Chen et al., arXiv
2205.13535) does beside an MLP. Modules that expand (a fused qkv, the first of an MLP) are left alone: what is adapted
are projections to a width no larger than their input's. The default rank and scale are peftc's choice.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from peftc.errors import one_of
from peftc.methods.adapter.lora import check_rank
from peftc.nn import forms

PLACES = ["after", "parallel"]


def adapter(
    module: nn.Module, *, rank: int = 64, scale: float = 1.0, place: str = "after", dropout: float = 0.0
) -> nn.Module | None:
    """Return the bottleneck of a linear module with no more outputs than inputs, None for any other.

    Args:
        module: Linear, transformers' Conv1D, or a `LowRankLinear` as a whole.
        rank: width of the bottleneck, >= 1.
        scale: what is added is multiplied by.
        place: ``after`` the module, or ``parallel`` to it.
        dropout: inside the bottleneck, while the network trains.
    """
    check_rank(rank)
    one_of("--set place=", place, PLACES)
    if forms.form_of(module) not in ("linear", "transposed", "factored"):
        return None
    out, in_ = forms.matrix_size(module)
    if out > in_:
        return None
    return Bottleneck(out if place == "after" else in_, out, rank, scale, place, dropout)


class Bottleneck(nn.Module):
    """Two linear layers with a GELU between them, whose result is added to what a module gives."""

    def __init__(self, in_: int, out: int, rank: int, scale: float, place: str, dropout: float) -> None:
        super().__init__()
        self.scale, self.place = scale, place
        self.down, self.up = nn.Linear(in_, rank), nn.Linear(rank, out)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        given = base(x)
        seen = (given if self.place == "after" else x).to(self.down.weight.dtype)
        inner = self.dropout(F.gelu(self.down(seen)))
        return given + self.up(self.scale * inner).to(given.dtype)
