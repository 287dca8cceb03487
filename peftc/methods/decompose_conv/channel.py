"""Channel decomposition: a k x k convolution to ``rank`` channels, then a 1 x 1 convolution.

Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015, arXiv 1505.06798,
section 2.1, with plain SVD: the weight is seen as (out, in kh kw).
"""

from collections.abc import Callable

from torch import Tensor

from peftc.methods.decompose.svd import svd
from peftc.methods.spectrum import Spectrum
from peftc.nn.lowrank import matrix


def channel(weight: Tensor, decompose: Callable[[Tensor], Spectrum] = svd) -> Spectrum:
    """Decompose ``weight`` (out, in, kh, kw) as the matrix (out, in kh kw) by a matrix method."""
    return decompose(matrix(weight, "channel"))
