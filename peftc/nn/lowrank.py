"""Factors, and the modules that compute with them.

A *form* says how a module's weight is seen as one matrix (out, in) and which modules stand in for it:

==========  =====================  ===========================  ===================================================
form        weight                 matrix                       becomes
==========  =====================  ===========================  ===================================================
linear      (out, in)              (out, in)                    Linear(in, rank), Linear(rank, out)
transposed  (in, out)              (out, in)                    the same (transformers' Conv1D)
embedding   (words, width)         (words, width)               Embedding(words, rank), then rank -> width
channel     (out, in, kh, kw)      (out, in kh kw)              kh x kw conv to rank channels, 1 x 1 conv
spatial     (out, in, kh, kw)      (out kw, in kh)              kh x 1 conv to rank channels, 1 x kw conv
tucker2     (out, in, kh, kw)      core and two mode factors    1 x 1 conv, kh x kw conv, 1 x 1 conv
==========  =====================  ===========================  ===================================================

Nothing makes ``tucker2`` any more; artifacts of earlier versions hold it.

The original bias goes to the last module; the others have none (PELA, section 1.2 of the papers notes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Factors:
    """weight (out, in) = up (out, rank) @ down (rank, in)."""

    up: Tensor
    down: Tensor


class LowRankLinear(nn.Module):
    """y = up(down(x)): two thin products in place of one."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def like(cls, module: Any, form: str, rank: Any) -> LowRankLinear:
        """Return a fresh one of the shape of ``module``."""
        in_, out = (module.in_features, module.out_features) if form == "linear" else module.weight.shape
        return cls(in_, out, rank, getattr(module, "bias", None) is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.up(self.down(x))

    @property
    def weight(self) -> Tensor:
        """The product (out, in), for code that reads ``weight`` or its dtype instead of calling the module."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias


class LowRankEmbedding(nn.Module):
    """Look up rows of ``up`` (words, rank) and expand them by ``down`` (rank, width)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.up = nn.Embedding(num_embeddings, rank, padding_idx)
        # stored (rank, width) like every other `down`, so that a tied output head can share both factors
        self.down = nn.Linear(embedding_dim, rank, bias=False)

    @classmethod
    def like(cls, module: Any, form: str, rank: Any) -> LowRankEmbedding:
        """Return a fresh one of the shape of ``module``."""
        return cls(module.num_embeddings, module.embedding_dim, rank, module.padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., width)."""
        return F.linear(self.up(ids), self.down.weight.T)

    @property
    def weight(self) -> Tensor:
        """The product (words, width)."""
        return self.up.weight @ self.down.weight


class LowRankConv2d(nn.Module):
    """Two or three thin convolutions in a row: ``down``, for Tucker-2 ``core``, and ``up``.

    Strides, padding and sizes are those of the convolution in whose place they stand: some networks read them.
    """

    TOLD = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(self, down: nn.Module, up: nn.Module, core: nn.Module | None = None) -> None:
        super().__init__()
        self.down = down
        if core is not None:
            self.core = core
        self.up = up

    @classmethod
    def like(cls, module: Any, form: str, rank: Any) -> LowRankConv2d:
        """Return a fresh one of the shape of ``module``."""
        # timm's Conv2dSame pads by its own rule, which the k x k part has to keep; it takes no padding mode
        make: Any = type(module) if type(module).__name__ == "Conv2dSame" else nn.Conv2d
        bias = module.bias is not None
        (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
        padding, mode = module.padding, {} if module.padding_mode == "zeros" else {"padding_mode": module.padding_mode}
        if form == "channel":
            down = make(module.in_channels, rank, (kh, kw), (sh, sw), padding, (dh, dw), bias=False, **mode)
            made = cls(down, nn.Conv2d(rank, module.out_channels, 1, bias=bias))
        elif form == "spatial":
            top, left = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
            down = make(module.in_channels, rank, (kh, 1), (sh, 1), top, (dh, 1), bias=False, **mode)
            up = make(rank, module.out_channels, (1, kw), (1, sw), left, (1, dw), bias=bias, **mode)
            made = cls(down, up)
        else:
            rank_out, rank_in = rank
            core = make(rank_in, rank_out, (kh, kw), (sh, sw), padding, (dh, dw), bias=False, **mode)
            down = nn.Conv2d(module.in_channels, rank_in, 1, bias=False)
            made = cls(down, nn.Conv2d(rank_out, module.out_channels, 1, bias=bias), core)
        for name in cls.TOLD:
            setattr(made, name, getattr(module, name))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h', w')."""
        x = self.down(x)
        if hasattr(self, "core"):
            x = self.core(x)
        return self.up(x)

    @property
    def weight(self) -> Tensor:
        """The product (out, in, kh, kw)."""
        up, down = self.up.weight[:, :, 0], self.down.weight  # (out, rank, w), (rank, in, h, v), where w or v is 1
        if hasattr(self, "core"):
            down = (self.core.weight.permute(0, 2, 3, 1) @ down.flatten(1)).permute(0, 3, 1, 2)
        product = up.transpose(1, 2) @ down.flatten(1)  # (out, w, in h v)
        return product.unflatten(-1, down.shape[1:]).permute(0, 2, 3, 1, 4).flatten(-2)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias


KINDS: dict[str, Any] = {
    "linear": LowRankLinear,
    "transposed": LowRankLinear,
    "embedding": LowRankEmbedding,
    "channel": LowRankConv2d,
    "spatial": LowRankConv2d,
    "tucker2": LowRankConv2d,
}
FORMS = tuple(KINDS)


def matrix(weight: Tensor, form: str) -> Tensor:
    """Return the matrix (out, in) that ``form`` factors; a view where strides allow."""
    if form == "transposed":
        return weight.T
    if form == "spatial":  # (out, in, kh, kw) -> (out, kw, in, kh)
        out, in_, kh, kw = weight.shape
        return weight.permute(0, 3, 1, 2).reshape(out * kw, in_ * kh)
    return weight.flatten(1)


def build(module: Any, form: str, rank: Any) -> nn.Module:
    """Return the low-rank module that stands in for ``module``, with parameters on the meta device."""
    if form not in KINDS:
        raise ValueError(f"`{form}` is no form of factors")
    with torch.device("meta"):
        return KINDS[form].like(module, form, rank).train(module.training)


def tensors(factors: Factors, shape: tuple[int, ...], form: str) -> dict[str, Tensor]:
    """Return the weights of what `build` makes in place of a dense weight of ``shape``; ``form`` is not ``tucker2``."""
    up, down = factors.up, factors.down
    if form == "channel":
        _, in_, kh, kw = shape
        up, down = up[:, :, None, None], down.reshape(-1, in_, kh, kw)
    elif form == "spatial":
        out, in_, kh, kw = shape
        down = down.reshape(-1, in_, kh)[:, :, :, None]  # (rank, in, kh, 1)
        up = up.reshape(out, kw, -1).permute(0, 2, 1)[:, :, None, :]  # (out, rank, 1, kw)
    return {"up.weight": up.contiguous(), "down.weight": down.contiguous()}


def dense_weight(named: dict[str, Tensor], shape: tuple[int, ...], form: str) -> Tensor:
    """Multiply the weights of a low-rank module back to a weight of ``shape``."""
    up, down = named["up.weight"], named["down.weight"]
    if form == "tucker2":
        return torch.einsum("oa,abhw,bi->oihw", up.flatten(1), named["core.weight"], down.flatten(1))
    if form == "spatial":
        return torch.einsum("orw,rih->oihw", up[:, :, 0, :], down[:, :, :, 0])
    product = up.flatten(1) @ down.flatten(1)
    return product.T if form == "transposed" else product.reshape(shape)
