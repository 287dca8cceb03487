"""Take the update of a factored module into its factors, without multiplying them out.

up (out, r0) @ down (r0, in) plus a change B (out, r) @ A (r, in) is exactly [up B] @ [down; A], at rank r0 + r. At the
rank it had, the nearest product is found from the QR decompositions of both stacks: the singular values of the sum are
those of the small matrix R_up R_down^T (r0 + r, r0 + r), of which the largest are kept.
"""

from typing import Any

import torch
from torch import Tensor, nn

from peftc.nn.forms import wide
from peftc.nn.lowrank import LowRankLinear
from peftc.nn.shared import SharedDown


def why_not(base: nn.Module, update: Any) -> str | None:
    """Return why an update of a factored module cannot be taken into its factors, or None."""
    if not isinstance(base, LowRankLinear):
        return "its factors are not those of a linear layer"
    if isinstance(base.down, SharedDown):
        return "other modules share its down factor"
    if not hasattr(update, "factors"):
        return "the method gives no factors of its change"
    return None


@torch.no_grad()
def merged_factors(base: LowRankLinear, update: Any, rank: int | None = None) -> tuple[LowRankLinear, float]:
    """Return a module that computes what ``base`` and ``update`` do together, and its error.

    Args:
        base: for which `why_not` has nothing to say; it is left as it is.
        update: with ``factors()``.
        rank: of the result, at most that of both together; None for exactly that, which loses nothing.

    Returns:
        the module in the dtype of ``base``, frozen, and the Frobenius norm of what its weight lacks relative to the
        norm of the whole, before the factors are cast.
    """
    more_up, more_down = update.factors()
    up, down = torch.cat([wide(base.up.weight), more_up], 1), torch.cat([wide(base.down.weight), more_down])
    if hasattr(update, "ratio"):
        up = up * update.ratio(base.weight)[:, None]
    error = 0.0
    if rank is not None:
        up, down, error = truncated(up, down, rank)
    dtype = base.up.weight.dtype
    with torch.device("meta"):
        new = LowRankLinear(base.in_features, base.out_features, up.shape[1], base.bias is not None)
    new.down.weight = nn.Parameter(down.to(dtype), requires_grad=False)
    new.up.weight = nn.Parameter(up.to(dtype), requires_grad=False)
    if base.bias is not None:
        new.up.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return new.train(base.training), error


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the nearest factors of ``rank``, balanced, and the relative Frobenius error.

    Args:
        up: (out, k).
        down: (k, in).
        rank: 1 <= rank; no more than the least of k, out and in is given.
    """
    left, r_left = torch.linalg.qr(up.double())
    right, r_right = torch.linalg.qr(down.double().T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = values[:rank].sqrt()
    new_up, new_down = left @ u[:, :rank] * root, root[:, None] * v[:rank] @ right.T
    # a singular vector's sign is free: the largest entry of each column of up is positive, whoever computed it
    sign = new_up.gather(0, new_up.abs().argmax(0, keepdim=True)).sign()
    energy = values.square()
    error = float((energy[rank:].sum() / energy.sum()).sqrt()) if energy.sum() > 0 else 0.0
    return (new_up * sign).to(up.dtype), (new_down * sign.T).to(down.dtype), error
