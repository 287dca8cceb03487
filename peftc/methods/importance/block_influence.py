"""Block influence: a layer that hardly turns what it reads matters little.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv:2403.03853:
1 - E[cos(x_in, x_out)], the expectation over tokens. Here every sample counts the same, whatever its length.
"""

from torch import Tensor


def block_influence(*, cosines: Tensor) -> float:
    """Return 1 minus the mean cosine between a layer's input and output tokens, in [0, 2].

    Args:
        cosines: (n,), the mean over the tokens of each sample.
    """
    return 1.0 - float(cosines.double().mean())
