"""Convpass (Jie and Deng, arXiv 2207.07039): beside attention and MLP, a 3 x 3 convolution over the patches, narrow.

y = module(x) + scale * up(GELU(conv(GELU(down(x))))) with x what the norm before attention or MLP gives: SLS's own
adapter (papers notes, 2.4; a layer of ViT-B gains the 27,296 parameters counted there). Patches are laid out as the
square they came from, in Swin's attention those of a window; a class token, and each other one before the patches, is
an image of one pixel. ``up`` begins at zero and ``conv`` as the identity. The default rank is the authors'; they choose
the scale per data set among 0.01, 0.1, 1, 10 and 100. It cannot be merged.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.errors import PlanError
from peftc.methods.adapter.lora import check_rank
from peftc.nn import forms

KINDS = (("qkv", "proj"), ("fc1", "fc2"))  # first and last linear module of timm's attention and MLP
LINEAR = {"linear", "factored"}
TOKENS = 9  # before the patches, at most: class, distillation and registers
ELSE = "choose another method: `--method adapter`"


def convpass(module: nn.Module, *, rank: int = 8, scale: float = 1.0, dropout: float = 0.0) -> nn.Module | None:
    """Return the bypass of an attention or an MLP of timm's vision transformers, None for any other module.

    Args:
        module: with the linear modules ``qkv`` and ``proj``, or ``fc1`` and ``fc2``, dense or factored.
        rank: channels of the convolution, >= 1.
        scale: what is added is multiplied by.
        dropout: inside the bypass, while the network trains.
    """
    check_rank(rank)
    ends = whole(module)
    if ends is None:
        return None
    (_, in_), (out, _) = (forms.matrix_size(end) for end in ends)
    return Bypass(in_, out, rank, scale, dropout)


def whole(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the first and the last linear module of an attention or an MLP, None for any other module."""
    for kind in KINDS:
        first, last = (getattr(module, name, None) for name in kind)
        if first is not None and last is not None and {forms.form_of(first), forms.form_of(last)} <= LINEAR:
            return first, last
    return None


def refuse(network: nn.Module) -> None:
    """Refuse a network whose tokens are not known to be a square of patches (PlanError: with what it has instead)."""
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if grid is None or len(set(grid)) != 1:
        found = f"{grid[0]} x {grid[1]} patches" if grid else "no grid of patches that its modules tell of"
        raise PlanError("`convpass` needs a square of patches", why=f"this network has {found}", hint=ELSE)


class Bypass(nn.Module):
    """A convolution over patches between two linear layers."""

    def __init__(self, in_: int, out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.down, self.up = nn.Linear(in_, rank), nn.Linear(rank, out)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Map (batch, tokens, in) to (batch, tokens, out) (PlanError: the tokens are no square of patches)."""
        given = base(x)
        side = isqrt(x.shape[1]) if x.ndim == 3 else 0
        before = x.shape[1] - side**2
        if side < 2 or before > TOKENS:
            why = f"here are {list(x.shape[1:-1])} tokens"
            raise PlanError("`convpass` needs a square of patches", why=why, hint=ELSE)
        narrow = F.gelu(self.down(x.to(self.down.weight.dtype)))  # (b, n, r)
        patches = narrow[:, before:].transpose(1, 2).unflatten(2, (side, side))  # (b, r, side, side)
        seen = self.conv(patches).flatten(2).transpose(1, 2)  # (b, side * side, r)
        if before:
            alone = F.linear(narrow[:, :before], self.conv.weight[:, :, 1, 1], self.conv.bias)
            seen = torch.cat([alone, seen], dim=1)
        return given + self.up(self.scale * self.dropout(F.gelu(seen))).to(given.dtype)
