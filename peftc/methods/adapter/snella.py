"""SNELLA (arXiv 2510.24037): SNELL with a kernel of its own, whose layers compete for the entries that may change.

The equations stand in `peftc.nn.kernels`, the competition of layers in `peftc.nn.competition`. The paper's body was not
at hand: it is the authors' code that this follows. Rank 32 is that of all their scripts; 0.55 is the middle of their
sparsities per task (0.16 to 0.93, and none for three); 0.01 is where their VTAB scripts start. The floor is an
addition: without one (``min_keep=0``, theirs) layers end up whole or empty. So is the last sharing out after the last
step, which makes the sparsity exactly the one asked for.
"""

from torch import nn

from peftc.nn import competition
from peftc.nn.kernelized import Settings, update_of

after_step = competition.after_step  # what a training does after each step
KEEPS_LAST = True  # weights before the last step are not as sparse as asked


def snella(
    module: nn.Module,
    *,
    rank: int = 32,
    sparsity: float = 0.55,
    sparsify: str = "code",
    kernel: str = "mix",
    split: int = 3,
    threshold_every: int = 1,
    identity: bool = False,
    dropout: float = 0.0,
    start: float = 0.01,
    allocate: str = "bilevel",
    min_keep: float = 0.1,
    refresh_every: int = 0,
) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a linear module or a convolution, its weight's name if that is smaller, None for others.

    Args:
        module, rank, sparsify, split, threshold_every, identity, dropout: as for `snell`; the kernel has three
            trainables more.
        sparsity: in [0, 1), share of all entries of all layers that stay as they are in the end.
        kernel: ``mix``, ``piecewise`` or ``linear``.
        start: sparsity at the start, from which it moves to ``sparsity`` along a cubic.
        allocate: ``bilevel`` shares out by score, ``uniform`` leaves the same share to each layer.
        min_keep: in [0, 1], the least a layer keeps, as a share of what ``uniform`` would leave it.
        refresh_every: steps between two sharings; 0 is an epoch, or a twentieth of the training where that is shorter.

    Raises:
        UsageError: a setting is out of range.
    """
    change = (rank, kernel, sparsify, sparsity, split, threshold_every, identity, dropout)
    return update_of(module, Settings(*change, start, allocate, min_keep, refresh_every))
