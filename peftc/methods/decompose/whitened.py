"""Whitened SVD: the factors whose outputs on the calibration set are closest to the dense module's.

Objective: E|W x - W' x|^2, the mean squared error of the module's outputs. Wang et al., "SVD-LLM: Truncation-aware
Singular Value Decomposition for Large Language Model Compression", 2024, arXiv 2403.07378, section 3.1, which whitens
with a Cholesky factor; solved here by eigenproblems, which need no positive definite moment (`peftc.methods.weighted`).
"""

from torch import Tensor

from peftc.methods.spectrum import Spectrum
from peftc.methods.weighted import Moment, weighted


def whitened(weight: Tensor, *, second_moment: Moment) -> Spectrum:
    """Decompose ``weight`` so that each truncation has the least mean squared error of its outputs.

    Args:
        weight: (out, in), float32 or float64, finite.
        second_moment: of the inputs, (in, in), or of the outputs before the bias, (out, out).
    """
    return weighted(weight, second_moment)
