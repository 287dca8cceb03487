"""Linear CKA between what a layer reads and what it gives: the more alike, the less the layer matters.

Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414, linear kernel: for
centred X and Y, ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) in Frobenius norms.
"""

import torch
from torch import Tensor


def cka(*, input_features: Tensor, features: Tensor) -> float:
    """Return 1 minus the linear CKA of features before and after a layer, in [0, 1].

    Args:
        input_features, features: (n, width), one row per sample; the widths may differ.
    """
    x, y = (each.double() - each.double().mean(0) for each in (input_features, features))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same norms from (n, n) instead of (width, width)
        one, other = x @ x.T, y @ y.T
        shared = (one * other).sum()
    else:
        one, other = x.T @ x, y.T @ y
        shared = (y.T @ x).square().sum()
    norms = torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(other)
    return 1.0 - float(shared / norms) if norms else 0.0
