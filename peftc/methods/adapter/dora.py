"""DoRA (Liu et al., arXiv 2402.09353): magnitude * (weight + change) / |weight + change|, per output.

The change is LoRA's. The norm is taken as a constant in the backward pass, as Hugging Face peft does; outputs and
gradients agree with it. The weight is made again in the backward pass, so that what the forward pass keeps is the input
alone. An embedding has a magnitude per column, which is the output there. The default rank and alpha are `lora`'s.
"""

import torch
from torch import Tensor, nn

from peftc.methods.adapter.lora import Lora, check_rank
from peftc.nn import forms

BESIDE_HALF = True  # its updates widen what they read of a weight


def dora(
    module: nn.Module, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a module, its weights' names where they are fewer, None for one it does not adapt.

    Args:
        module: as for `lora`.
        rank: of the change, >= 1.
        alpha: over the rank, what the product is multiplied by.
        dropout: of the input of the change, while the network trains; an embedding has none.
    """
    check_rank(rank)
    form = forms.form_of(module)
    if form is None:
        return None
    out, in_ = forms.matrix_size(module)
    outputs = in_ if form == "embedding" else out
    return forms.dense(module, rank * (out + in_) + outputs) or Dora(module, form, rank, alpha / rank, dropout)


class Dora(Lora):
    """The factors (out, rank) and (rank, in) of a change, and the length of the weight for each output."""

    def __init__(self, module: nn.Module, form: str, rank: int, scale: float, dropout: float) -> None:
        super().__init__(form, *forms.matrix_size(module), rank, scale, dropout)
        self.last = form in ("embedding", "transposed")  # where the axis of the outputs is
        self.magnitude = nn.Parameter(self._norm(forms.wide(module.weight.detach())))  # type: ignore[operator]

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map what ``base`` takes to what it gives."""
        if self.form not in ("embedding", "factored"):
            return self.through_weight(base, x)
        given, ratio, bias = base(x), self.ratio(base.weight), getattr(base, "bias", None)  # type: ignore[arg-type]
        seen = x
        plain = given if bias is None else given - bias
        if self.form == "factored" and self.dropout.training and self.dropout.p > 0:
            seen = self.dropout(x)
            plain = base(seen) if bias is None else base(seen) - bias
        return given + ((ratio - 1) * plain + ratio * self.bypass(base, seen)).to(given.dtype)

    def ratio(self, weight: Tensor) -> Tensor:
        """Return what each output of weight plus change is multiplied by."""
        # detached: under `no_grad`, autocast of torch 2.8 would keep casts that the gradient cannot go through
        norm = self._norm(forms.wide(weight) + super().change(weight, self.up.detach(), self.down.detach()))
        return forms.wide(self.magnitude) / norm

    def weight(self, weight: Tensor) -> Tensor:
        """Return the updated weight in float32."""
        return self._updated(weight, *self.parameters()).float()

    def change(self, weight: Tensor, *learned: Tensor) -> Tensor:
        """Return what is added to the weight."""
        return self._updated(weight, *learned) - forms.wide(weight)

    def _updated(self, weight: Tensor, up: Tensor, down: Tensor, magnitude: Tensor) -> Tensor:
        changed = forms.wide(weight) + super().change(weight, up, down)
        ratio = forms.wide(magnitude) / self._norm(changed)
        return changed * (ratio if self.last else ratio.reshape(-1, *(1 for _ in weight.shape[1:])))

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight if self.last else weight.flatten(1).T, dim=0)
