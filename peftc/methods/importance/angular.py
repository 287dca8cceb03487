"""Angular distance between what a layer reads and what it gives.

Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, arXiv:2403.17887:
arccos(cos(x_in, x_out)) / pi.
The paper takes the last token of a text; here it is the mean over all tokens, so that it is defined for images too.
"""

from torch import Tensor


def angular(*, angles: Tensor) -> float:
    """Return the mean angle between a layer's input and output tokens, in [0, 1] of a half turn.

    Args:
        angles: (n,), in half turns, the mean over the tokens of each sample.
    """
    return float(angles.double().mean())
