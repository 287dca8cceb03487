"""Rank-stabilized LoRA (Kalajdzievski, arXiv 2312.03732): LoRA with alpha / sqrt(rank) in place of alpha / rank.

With it the size of the update's gradient does not fall as the rank rises. The default rank and alpha are those of
Hugging Face peft.
"""

from torch import nn

from peftc.methods.adapter.lora import check_rank, low_rank

BESIDE_HALF = True  # its updates widen what they read of a weight


def rslora(
    module: nn.Module, *, rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, layout: str = "peft"
) -> nn.Module | tuple[str, ...] | None:
    """Return the update of a module, its weights' names where they are fewer, None for one it does not adapt.

    Args:
        module: as for `lora`.
        rank: of the update, >= 1.
        alpha: over the square root of the rank, what the product is multiplied by.
        dropout: of the input of the update, while the network trains.
        layout: of convolutions, ``peft`` or ``loralib``.
    """
    check_rank(rank)
    return low_rank(module, rank, alpha / rank**0.5, dropout, layout)
