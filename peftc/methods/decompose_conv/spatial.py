"""Spatial decomposition: a kh x 1 convolution to ``rank`` channels, then a 1 x kw convolution.

Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014, arXiv 1405.3866, scheme 2,
solved in closed form (Tai et al., 2016, arXiv 1511.06067, section 3): the weight is seen as (out kw, in kh).
"""

from collections.abc import Callable

from torch import Tensor

from peftc.methods.decompose.svd import svd
from peftc.methods.spectrum import Spectrum
from peftc.nn.lowrank import matrix


def spatial(weight: Tensor, decompose: Callable[[Tensor], Spectrum] = svd) -> Spectrum:
    """Decompose ``weight`` (out, in, kh, kw) as the matrix (out kw, in kh) by a matrix method."""
    return decompose(matrix(weight, "spatial"))
