"""Regularised weight perturbation: the product of the factors stays near the weight that they stand for.

PELA (arXiv 2310.10700): of each factored module the largest entry of |B A - W|, beyond an epsilon, squared, averaged
over modules. The hinge is an addition: PELA's two-sided square would push the product away from the weight below
epsilon. Its gradient touches one entry of each product: with PELA's weight it is all but inert.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def perturbation(
    *,
    products: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    epsilon: float = 1e-3,
    two_sided: bool = False,
    norm: str = "max",
) -> Tensor:
    """Return how far the products of the factors are from the teacher's weights; 0 where nothing is factored.

    Args:
        products: module -> product of its factors, float32, with gradient.
        weights: module -> the teacher's weight, of the same shape.
        epsilon: a deviation that costs nothing.
        two_sided: PELA's form, in which less than ``epsilon`` costs as well.
        norm: ``max``, PELA's, or ``frobenius``, the relative deviation of the whole weight.

    Raises:
        ValueError: ``norm`` is neither.
    """
    if norm not in ("max", "frobenius"):
        raise ValueError(f"norm is {norm!r}, not `max` or `frobenius`")
    costs = []
    for name, product in products.items():
        weight = weights[name].detach().float()
        gap = product - weight
        if norm == "max":
            deviation = gap.abs().max()
        else:
            deviation = torch.linalg.vector_norm(gap) / torch.linalg.vector_norm(weight)
        beyond = deviation - epsilon
        costs.append((beyond if two_sided else beyond.clamp_min(0)).square())
    return torch.stack(costs).mean() if costs else torch.zeros(())
