"""SaRA (Hu et al., arXiv 2409.06633): of the pre-trained weights only the smallest train.

What is added to them is one packed vector with their int32 places, scattered into the weight in the forward pass and
again in the backward one, so that optimizer state and kept gradient exist for them alone; the dense gradient of one
weight lives while its layer is passed. The default threshold is the authors'. Left out: the penalty on the nuclear norm
of a random weight's change, which takes a singular value decomposition a step, and the second choice of places halfway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import UsageError
from peftc.nn import forms
from peftc.nn.folded import folded
from peftc.nn.forms import wide


def sara(module: nn.Module, *, threshold: float = 2e-3, share: float = 0.0) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a module, its weight's name where all of it trains, None for one it does not adapt.

    The places are chosen by the weights the module has now.

    Args:
        module: Linear, transformers' Conv1D or a convolution; of a `LowRankLinear` the two factors apart.
        threshold: weights of a smaller magnitude train, > 0.
        share: of the weights of each module that train, the smallest, in (0, 1]; 0 for the threshold.
    """
    if not 0 <= share <= 1 or threshold <= 0:
        raise UsageError(
            f"no weights are smaller than threshold {threshold:g} and in the share {share:g}",
            why="a threshold is above 0, a share within 0 and 1",
            hint="as in `--set share=0.05`",
        )
    if forms.form_of(module) not in ("linear", "transposed", "channel"):
        return None
    magnitudes = module.weight.detach().float().abs().flatten()  # type: ignore[operator]
    if magnitudes.is_meta:  # to be filled with the places that were chosen
        return Sara(torch.empty(_count(share, len(magnitudes)), dtype=torch.int32, device="meta"), len(magnitudes))
    if share:
        places = magnitudes.topk(_count(share, len(magnitudes)), largest=False).indices.sort().values
    else:
        places = (magnitudes < threshold).nonzero().flatten()
    if not len(places):
        return None
    if len(places) == len(magnitudes):
        return ("weight",)
    return Sara(places.int(), len(magnitudes))


def _count(share: float, number: int) -> int:
    return max(1, round(share * number))


class Sara(nn.Module):
    """What is added to the weights at ``places`` of the flattened weight, of which there are ``number``."""

    places: Tensor

    def __init__(self, places: Tensor, number: int) -> None:
        super().__init__()
        self.resolved = {"share": len(places) / number}
        self.register_buffer("places", places)
        self.values = nn.Parameter(torch.zeros(len(places), device=places.device))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map what ``base`` takes to what it gives."""
        return folded(base, x, lambda values: self._change(base.weight, values), [self.values], pull=self._gathered)

    def weight(self, weight: Tensor) -> Tensor:
        """Return the updated weight in float32."""
        return weight.float() + self._change(weight, self.values).float()

    def _change(self, weight: Any, values: Tensor) -> Tensor:
        values = wide(values)
        return values.new_zeros(weight.numel()).index_add(0, self.places, values).reshape(weight.shape)

    def _gathered(self, gradient: Tensor, values: Tensor) -> tuple[Tensor]:
        return (gradient.flatten().index_select(0, self.places).to(values.dtype),)
