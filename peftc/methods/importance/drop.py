"""Measured drop: how much worse the network is on samples when the layer hands on what it reads.

The plain definition of what a layer is worth; it costs a forward pass for each layer. Kim et al., "Shortened LLaMA",
2024, arXiv:2402.02834, rank blocks once by the perplexity without each; here the step measures again after every layer
that goes, since the layers that are left share out the work anew.
"""


def drop(*, loss: float, loss_without: float) -> float:
    """Return how much the loss rises without the layer; below 0 where the network is better off without.

    Args:
        loss: of the network, mean over samples; 0 where its own outputs are the reference.
        loss_without: of the network with the layer bypassed.
    """
    return loss_without - loss
