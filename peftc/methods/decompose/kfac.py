"""K-FAC SVD: be accurate where the loss is sensitive, on the input side and on the output side.

Objective: E|G^(1/2) (W - W') x|^2 = tr(G (W - W') C (W - W')^T), the second-order change of the loss under the
Kronecker-factored Fisher information, C the second moment of the inputs and G that of the gradients with respect to the
outputs, summed over the positions of a sample (Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", 2015, arXiv 1503.05671, section 3). Half of it is the predicted divergence in
nats per sample, so the losses of different modules can be compared, and one budget can be shared out among them.

G is estimated from few samples and assumes that gradients and inputs are independent; damping it much more than an
optimizer would is worth more than any other setting (figures in tests/benchmarks/RESULTS.md).
"""

from torch import Tensor

from peftc.methods.spectrum import Spectrum
from peftc.methods.weighted import Gram, Moment, weighted


def kfac(weight: Tensor, *, second_moment: Moment, output_gradient_gram: Gram, damping: float = 0.3) -> Spectrum:
    """Decompose ``weight`` so that each truncation changes the loss least, to second order.

    Args:
        weight: (out, in), float32 or float64, finite.
        second_moment: of the inputs, (in, in), or of the outputs before the bias, (out, out).
        output_gradient_gram: (out, out), or () where only its mean eigenvalue is known, or the blocks of a stack.
        damping: >= 0, share of the gram matrix's mean eigenvalue that is added to all of them.
    """
    return weighted(weight, second_moment, output_gradient_gram, damping=damping)
