"""Fisher-weighted SVD: be accurate where the weight's entries matter for the loss.

Objective: ||(W - W') diag(s)||_F^2 with s_i^2 the Fisher information of the weights that read input feature i: their
squared gradients, a sample at a time, summed over the outputs and averaged. Hsu et al., "Language model compression
with weighted low-rank factorization", 2022, arXiv 2207.00112, section 3.2. For comparison: `kfac` has both sides.
"""

from torch import Tensor

from peftc.methods.decompose.svd import svd
from peftc.methods.spectrum import Spectrum
from peftc.methods.weighted import scaled


def fwsvd(weight: Tensor, *, weight_fisher: Tensor) -> Spectrum:
    """Decompose ``weight`` with its columns scaled by the root of their Fisher information.

    Args:
        weight: (out, in), float32 or float64, finite.
        weight_fisher: (in,), mean over samples of the squared gradients of column i, summed over the outputs.
    """
    return scaled(svd, weight, weight_fisher.double().sqrt())
