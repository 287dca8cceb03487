"""What a finetuning changed, as a low-rank update: the singular value decomposition of tuned minus base.

By Eckart and Young no update of that rank is nearer; `peftc.methods.decompose.svd` computes and certifies it.
"""

from torch import Tensor

from peftc.methods.decompose.svd import svd


def low_rank_difference(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the nearest update of ``rank`` to a difference of weights, and the share of its energy kept.

    Args:
        difference: (out, in), or (out, in / groups, ...) of a convolution, which is flattened after its first axis.
        rank: 1 <= rank; no more than the matrix has is given.

    Returns:
        up (out, rank) and down (rank, in), float32, with scale 1 what `lora` learns; and the sum of the squared
        singular values kept relative to that of all, 1 where nothing changed.
    """
    matrix = difference.detach().float().flatten(1)
    rank = min(rank, *matrix.shape)
    if not matrix.any():
        return matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1]), 1.0
    found = svd(matrix)
    cut = found.truncate(rank)
    energy = found.values.square()
    return cut.factors.up, cut.factors.down, float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 1.0
