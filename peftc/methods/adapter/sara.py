"""SaRA (Hu et al., arXiv 2409.06633): of the pre-trained weights only the smallest train.

What is added to them is one packed vector with their int32 places, scattered into the weight in the forward pass and
again in the backward one, so that optimizer state and kept gradient exist for them alone; the dense gradient of one
weight lives while its layer is passed. Halfway through the training those that have outgrown the threshold stop
learning. To the loss of each step is added a multiple of the nuclear norm of one linear module's weights that learn,
the others taken for zero; which module is drawn at random.

Threshold and multiple are those of the authors' example, which chooses again after a fixed number of steps; their
program, unlike this one, then drops the moments of the optimizer. It learns at 1e-3 exp(-350 threshold), 5e-4 here;
the rate is peftc's choice, as for other methods.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import UsageError
from peftc.methods.adapter.lora import Change
from peftc.nn import forms
from peftc.nn.adapted import Adapted
from peftc.nn.folded import folded

NARROW = 64  # no axis of a matrix that the penalty is about is as short, as in the authors' program


def sara(
    module: nn.Module, *, threshold: float = 2e-3, share: float = 0.0, reselect: bool = True, penalty: float = 5e-4
) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a module, its weight's name where all of it trains, None for one it does not adapt.

    The places are chosen by the weights the module has now.

    Args:
        module: Linear, transformers' Conv1D or a convolution; of a `LowRankLinear` the two factors apart.
        threshold: weights of a smaller magnitude train, > 0.
        share: of the weights of each module that train, the smallest, in (0, 1]; 0 for the threshold.
        reselect: halfway stop those that are no smaller than the threshold, or than the largest of the share was.
        penalty: of the nuclear norm, in the loss; >= 0. It takes a singular value decomposition a step.
    """
    if not 0 <= share <= 1 or threshold <= 0:
        what = f"no weights are smaller than threshold {threshold:g} and in the share {share:g}"
        raise UsageError(what, why="a threshold is above 0, a share within 0 and 1", hint="as in `--set share=0.05`")
    if penalty < 0:
        raise UsageError(f"setting `penalty` is {penalty:g}", why="a penalty is at least 0")
    if forms.form_of(module) not in ("linear", "transposed", "channel"):
        return None
    magnitudes = module.weight.detach().float().abs().flatten()  # type: ignore[operator]
    number = max(1, round(share * len(magnitudes)))
    if magnitudes.is_meta:  # to be filled with the places that were chosen
        places = torch.empty(number, dtype=torch.int32, device="meta")
        return Sara(module, places, threshold, reselect, penalty)
    if share:
        places = magnitudes.topk(number, largest=False).indices.sort().values
        threshold = float(magnitudes[places].max())
    else:
        places = (magnitudes < threshold).nonzero().flatten()
    if not len(places):
        return None
    if len(places) == len(magnitudes):
        return ("weight",)
    return Sara(module, places.int(), threshold, reselect, penalty)


@torch.no_grad()
def after_step(updates: Mapping[str, nn.Module], step: int, steps: int, steps_per_epoch: float) -> None:
    """Halfway choose again which weights learn, and from then on hold the others where they are."""
    for update in updates.values():
        if isinstance(update, Sara) and update.reselect:
            if step == steps // 2:
                outgrown = (update._before + update.values).abs() > update.threshold
                update._held.copy_(torch.where(outgrown, update.values, torch.nan))
            elif step > steps // 2:
                update.values.copy_(torch.where(update.learns, update.values, update._held))


def penalty(adapted: Mapping[str, Adapted]) -> Tensor | None:
    """Return what the loss of a step has more: of a linear module drawn from torch's random state; None without any."""
    matrices = [each for each in adapted.values() if isinstance(each.update, Sara) and each.update.is_penalized]
    if not matrices:
        return None
    drawn = matrices[int(torch.randint(len(matrices), ()))]
    return drawn.update.penalty * torch.linalg.matrix_norm(drawn.update.learning(drawn.base.weight), "nuc")  # type: ignore[operator]


class Sara(Change):
    """What is added to the weights at ``places`` of a module's flattened weight."""

    places: Tensor
    _before: Tensor
    _held: Tensor

    def __init__(self, module: Any, places: Tensor, threshold: float, reselect: bool, penalty: float) -> None:
        super().__init__()
        weight = module.weight.detach()
        self.resolved = {"share": len(places) / weight.numel()}
        self.threshold, self.reselect, self.penalty = threshold, reselect, penalty
        self.is_penalized = penalty > 0 and weight.ndim == 2 and min(weight.shape) > NARROW
        self.register_buffer("places", places)
        self.values = nn.Parameter(torch.zeros(len(places), device=places.device))
        self.register_buffer("_before", weight.flatten().index_select(0, places).float())
        self.register_buffer("_held", torch.full_like(self._before, torch.nan))  # of those that learn no more

    @property
    def learns(self) -> Tensor:
        """Which of the values learn still."""
        return self._held.isnan()

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map what ``base`` takes to what it gives."""

        def pull(gradient: Tensor, values: Tensor) -> tuple[Tensor]:
            gathered = gradient.flatten().index_select(0, self.places)
            return (torch.where(self.learns, gathered, 0).to(values.dtype),)

        return folded(base, x, partial(self.change, base.weight), [self.values], pull=pull)

    def learning(self, weight: Tensor) -> Tensor:
        """Return the updated weight in float32 with zeros where it does not learn; gradients reach the values."""
        there = forms.wide(weight).flatten().index_select(0, self.places) + forms.wide(self.values)
        return self.change(weight, torch.where(self.learns, there, 0))

    def change(self, weight: Tensor, values: Tensor) -> Tensor:
        """Return the values at their places in the shape of the weight."""
        values = forms.wide(values)
        return values.new_zeros(weight.numel()).index_add(0, self.places, values).reshape(weight.shape)
