"""Activation-aware SVD: be accurate where the inputs are large.

Objective: ||(W - W') diag(s)||_F^2 with s_i = (E|x_i|)^alpha. Yuan et al., "ASVD: Activation-aware Singular Value
Decomposition for Compressing Large Language Models", 2023, arXiv 2312.05821, section 3.2. For comparison: `whitened`
knows how inputs vary together, not only how large each is.
"""

from torch import Tensor

from peftc.methods.decompose.svd import svd
from peftc.methods.spectrum import Spectrum
from peftc.methods.weighted import scaled


def asvd(weight: Tensor, *, input_magnitude: Tensor, alpha: float = 0.5) -> Spectrum:
    """Decompose ``weight`` with its columns scaled by the magnitude of their inputs.

    Args:
        weight: (out, in), float32 or float64, finite.
        input_magnitude: (in,), mean |x| of each input feature.
        alpha: exponent of the magnitude; 0 is plain SVD.
    """
    return scaled(svd, weight, input_magnitude.double() ** alpha)
