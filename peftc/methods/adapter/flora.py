"""FLoRA (Si et al., arXiv 2405.14739): weight + scale * core x_1 U_1 ... x_N U_N, a Tucker product that learns whole.

The axes of the weight stay axes: a convolution (out, in / groups, kh, kw) has a factor for each of them, so grouped and
depthwise ones need nothing special, and share the input factor across groups. The core is zero to begin with. On a
linear layer the rank of the change is at most ``rank``, as LoRA's is, with rank^2 parameters more. Default ranks,
initial values and scale are those of the authors' one example (ranks 16, 16, 2, 2, scale 4), whose three code bases
disagree: ``init`` names them. The scale matters more than the factorization; set it beside the learning rate.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.errors import one_of
from peftc.methods.adapter.lora import Change, check_rank
from peftc.nn import forms

INITS = ["flora", "normal002", "kaiming_uniform", "orthonormal"]


def flora(
    module: nn.Module,
    *,
    rank: int = 16,
    rank_in: int = 0,
    rank_spatial: int = 2,
    scale: float = 4.0,
    init: str = "flora",
    dropout: float = 0.0,
) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a module, its weights' names where they are fewer, None for one it does not adapt.

    Args:
        module: with a weight of two to five axes: linear, an embedding, a convolution, or a `LowRankLinear` as a whole.
        rank: of the output axis, >= 1, at most its size, as for all axes.
        rank_in: of the input axis; 0 for that of the output.
        rank_spatial: of each axis of a convolution's kernel.
        scale: what the product is multiplied by.
        init: of the factors: ``flora`` (normal, deviation sqrt(0.5 / rank)), ``normal002`` (deviation 0.02),
            ``kaiming_uniform`` (as two Linear layers), ``orthonormal`` (comparable across ranks; ours).
        dropout: of the input of the update, while the network trains; an embedding has none.
    """
    check_rank(min(rank, rank_in or rank, rank_spatial))
    one_of("--set init=", init, INITS)
    form = forms.form_of(module)
    if form is None:
        return None
    sizes = tuple(module.weight.shape) if form == "channel" else forms.matrix_size(module)  # type: ignore[operator]
    asked = (rank, rank_in or rank, *(rank_spatial for _ in sizes[2:]))
    ranks = tuple(min(pair) for pair in zip(asked, sizes, strict=True))
    parameters = math.prod(ranks) + sum(size * each for size, each in zip(sizes, ranks, strict=True))
    update = Flora(form, sizes, ranks, scale, init, dropout)
    if form == "embedding" and module.padding_idx is not None:
        update.modes[0].data[module.padding_idx] = 0  # type: ignore[index]
    return forms.dense(module, parameters) or update


class Flora(Change):
    """A core of one axis per axis of the weight, and for each the factor (size, rank)."""

    def __init__(
        self, form: str, sizes: tuple[int, ...], ranks: tuple[int, ...], scale: float, init: str, dropout: float
    ) -> None:
        super().__init__()
        self.form, self.scale = form, scale
        self.core = nn.Parameter(torch.zeros(ranks))
        self.modes = nn.ParameterList(torch.empty(pair) for pair in zip(sizes, ranks, strict=True))
        self.dropout = nn.Dropout(dropout)
        for axis, mode in enumerate(self.modes):
            _initialize(mode, init, axis)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map what ``base`` takes to what it gives."""
        if self.form == "channel":
            return self.through_weight(base, x)
        given = base(x)
        out, in_ = self.modes
        if self.form == "embedding":
            inner = F.embedding(x, out, base.padding_idx) @ self.core  # type: ignore[arg-type]
            return given + F.linear(self.scale * inner, in_).to(given.dtype)
        inner = F.linear(F.linear(self.dropout(x).to(in_.dtype), in_.T), self.core)
        return given + F.linear(self.scale * inner, out).to(given.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (out, rank) and (rank, in), whose product is the change of the weight as a matrix."""
        out, *others = (mode.float() for mode in self.modes)
        return self.scale * out, _expanded(self.core.float(), others)

    def change(self, weight: Tensor, core: Tensor, *modes: Tensor) -> Tensor:
        """Return the product in the shape of the weight."""
        out, *others = (forms.wide(mode) for mode in modes)
        return forms.as_weight(self.scale * out @ _expanded(forms.wide(core), others), weight, self.form)


def _expanded(core: Tensor, modes: list[Tensor]) -> Tensor:
    """Multiply every axis of a core but the first, the small ones of the kernel first: (rank, in ...), flattened."""
    for axis, mode in reversed(list(enumerate(modes, start=1))):
        core = torch.tensordot(core, mode, ([axis], [1])).movedim(-1, axis)
    return core.flatten(1)


def _initialize(mode: Tensor, init: str, axis: int) -> None:
    size, rank = mode.shape
    if init == "flora":
        nn.init.normal_(mode, std=(0.5 / rank) ** 0.5)
    elif init == "normal002":
        nn.init.normal_(mode, std=0.02)
    elif init == "orthonormal":
        nn.init.orthogonal_(mode)
    else:  # the first factor maps from the ranks, the others map to them
        bound = (size if axis else rank) ** -0.5
        nn.init.uniform_(mode, -bound, bound)
