"""SNELL (arXiv 2411.01800, NeurIPS 2024): a kernel of low-rank points is the change, and its entries compete.

The equations stand in `peftc.nn.kernels`. The dense change is not kept between forward and backward. Rank 8 is the
smallest of the paper (8, 16, 32) and the one it uses for all backbones; sparsity 0.9 is that of its table 5a, the only
one that it fixes for all tasks: elsewhere it is chosen per task, between 0 and 0.995, on held-out samples. The authors
train with dropout 0.1 here, which takes a product of its own and a second copy of the input. Where the points would be
as many numbers as the weight, it trains itself, as with LoRA, and is in no competition.
"""

from torch import nn

from peftc.nn import competition
from peftc.nn.kernelized import Settings, update_of

after_step = competition.after_step  # what a training does after each step


def snell(
    module: nn.Module,
    *,
    rank: int = 8,
    sparsity: float = 0.9,
    sparsify: str = "code",
    kernel: str = "piecewise",
    split: int = 3,
    threshold_every: int = 1,
    identity: bool = False,
    dropout: float = 0.0,
) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a linear module or a convolution, its weight's name if that is smaller, None for others.

    Args:
        module: whose weight, as a matrix (out, in) or (out, in kh kw), changes.
        rank: even; trainables are rank (out + in), as for LoRA.
        sparsity: in [0, 1), share of each matrix's entries that stay as they are; 0 changes all of them, without the
            factor that ``sparsify`` brings.
        sparsify: ``code`` multiplies a change by its own size, a constant to the gradient, as the authors' code does;
            ``paper`` by what its size has above the threshold, their equation 5; ``hard`` only zeroes, and learns
            fastest in few steps.
        kernel: ``piecewise``, the paper's; ``mix``, SNELLA's; ``linear``, which makes it a masked LoRA.
        split: a linear module with ``split`` times as many outputs as inputs is taken for q, k and v in one, and each
            gets points and a threshold of its own, as in the authors' code; with 1 they share them and compete.
        threshold_every: steps after which thresholds are found anew.
        identity: start at exactly the weight; needs ``sparsify=hard`` or no sparsity. The authors start near it.
        dropout: of the input of the change, in [0, 1), while the network trains with dropout.

    Raises:
        UsageError: a setting is out of range.
    """
    return update_of(module, Settings(rank, kernel, sparsify, sparsity, split, threshold_every, identity, dropout))
