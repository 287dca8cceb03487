"""First-order Taylor: how much the loss would change if what a layer adds were taken away, from one backward pass.

Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017, arXiv:1611.06440,
section 2.2: |dL/dh * h| for an activation h, since setting h to 0 changes the loss L by about that. Of a residual layer
h is what it adds to what it reads, h = x_out - x_in, and dL/dh is the gradient at its output.
"""

from torch import Tensor


def taylor(*, gradient_products: Tensor) -> float:
    """Return the mean over samples of the absolute first-order change of the loss without the layer, at least 0.

    Args:
        gradient_products: (n,), of each sample the sum of dL/dx_out * (x_out - x_in) over tokens and features.
    """
    return float(gradient_products.double().abs().mean())
