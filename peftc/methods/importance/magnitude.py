"""Magnitude of a layer's weights.

Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, sum the absolute weights of a filter; here
they are those of all matrices of a layer. It looks at no data, and mostly at what the pre-training left: a baseline.
"""

from collections.abc import Sequence

from torch import Tensor


def magnitude(*, weights: Sequence[Tensor]) -> float:
    """Return the sum of the absolute values of a layer's weights.

    Args:
        weights: every weight of the layer with two axes or more.
    """
    return float(sum(float(weight.detach().double().abs().sum()) for weight in weights))
