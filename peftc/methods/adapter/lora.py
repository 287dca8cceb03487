"""LoRA (Hu et al., arXiv 2106.09685): weight + alpha / rank * up @ down, ``up`` at zero to begin with.

Initial values are those of Hugging Face peft. A convolution goes through a k x k convolution to ``rank`` channels and a
1 x 1 one, which keeps the window whole (peft's layout); with groups the first is shared by all of them, so that the
update fits the weight (out, in / groups, ...) and merges, as peft's does not. ``layout=loralib`` is the authors' own:
the product of (out k / groups, rank k) and (rank k, in k), read as a weight. The default rank is that of the LoRA which
SNELL's paper compares with; alpha, twice the rank, is peftc's choice.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.errors import UsageError, one_of
from peftc.nn import forms
from peftc.nn.folded import folded

LAYOUTS = ["peft", "loralib"]


BESIDE_HALF = True  # its updates widen what they read of a weight


def lora(
    module: nn.Module, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, layout: str = "peft"
) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a module, its weights' names where they are fewer, None for one it does not adapt.

    Args:
        module: with a weight (out, in), a convolution, an embedding, or a `LowRankLinear` as a whole.
        rank: of the update, >= 1.
        alpha: over the rank, what the product is multiplied by.
        dropout: of the input of the update, while the network trains; an embedding has none.
        layout: of convolutions, ``peft`` or ``loralib``; the latter for square Conv2d alone.
    """
    check_rank(rank)
    return low_rank(module, rank, alpha / rank, dropout, layout)


def check_rank(rank: int) -> None:
    """Refuse a rank below one."""
    if rank < 1:
        raise UsageError(f"an update of rank {rank} is none", why="the least rank is 1", hint="as in `--set rank=8`")


def low_rank(
    module: nn.Module, rank: int, scale: float, dropout: float, layout: str
) -> nn.Module | tuple[str, ...] | None:
    """Return what `lora` does, with the factor ``scale`` in place of alpha."""
    one_of("--set layout=", layout, LAYOUTS)
    form = forms.form_of(module)
    if form is None:
        return None
    kind, (out, in_) = Lora, forms.matrix_size(module)
    if form == "channel" and layout == "loralib":
        if not isinstance(module, nn.Conv2d) or module.kernel_size[0] != module.kernel_size[1]:
            return None
        kind, window = Reshaped, module.kernel_size[0]
        out, in_, rank = out // module.groups * window, module.in_channels * window, rank * window
    return forms.dense(module, rank * (out + in_)) or kind(form, out, in_, rank, scale, dropout)


class Change(nn.Module):
    """An update that changes a weight by what ``change(weight, *parameters)`` makes of all its parameters."""

    change: Callable[..., Tensor]
    dropout: nn.Dropout

    def through_weight(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map what ``base`` takes to what it gives, its weight changed."""
        seen = self.dropout(x) if self.dropout.training and self.dropout.p > 0 else None
        return folded(base, x, partial(self.change, base.weight), list(self.parameters()), seen=seen)

    def weight(self, weight: Tensor) -> Tensor:
        """Return the updated weight in float32."""
        return weight.float() + self.change(weight, *self.parameters()).float()


class Lora(Change):
    """The factors (out, rank) and (rank, in) of an update, the second flattened for a convolution."""

    def __init__(self, form: str, out: int, in_: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.form, self.scale = form, scale
        self.up, self.down = nn.Parameter(torch.zeros(out, rank)), nn.Parameter(torch.empty(rank, in_))
        if form == "embedding":
            nn.init.normal_(self.down)
        else:
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map what ``base`` takes to what it gives."""
        if self.form == "channel" and base.groups > 1:  # type: ignore[operator]
            return self.through_weight(base, x)
        given = base(x)
        seen = x if self.form == "embedding" else self.dropout(x)
        return given + self.bypass(base, seen).to(given.dtype)

    def bypass(self, base: nn.Module, x: Tensor) -> Tensor:
        """Return what the change gives, rank by rank; a convolution has no groups."""
        if self.form == "embedding":
            return F.linear(self.scale * F.embedding(x, self.up, base.padding_idx), self.down.T)  # type: ignore[arg-type]
        seen = x.to(self.down.dtype)
        if self.form != "channel":
            return F.linear(self.scale * F.linear(seen, self.down), self.up)
        window: tuple[int, ...] = base.kernel_size  # type: ignore[assignment]
        inner = self.scale * forms.convolve(base, seen, self.down.reshape(len(self.down), -1, *window))
        return forms.CONVOLVE[len(window)](inner, self.up.reshape(*self.up.shape, *(1 for _ in window)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (out, rank) and (rank, in), whose product is the change of the weight as a matrix."""
        return self.scale * self.up.float(), self.down.float()

    def change(self, weight: Tensor, *learned: Tensor) -> Tensor:
        """Return the product of the factors in the shape of the weight."""
        up, down = learned
        return forms.as_weight(self.scale * forms.wide(up) @ forms.wide(down), weight, self.form)


class Reshaped(Lora):
    """The factors (out k / groups, rank k) and (rank k, in k) of a change that is read as a k x k convolution."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h', w')."""
        return self.through_weight(base, x)
