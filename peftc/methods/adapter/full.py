"""Full finetuning: every parameter trains, the reference point of the methods that train few.

The default rate is peftc's choice, a tenth of the other methods'.
"""

from torch import nn

EVERYWHERE = True  # norms, embeddings and heads too
RECIPE = {"learning_rate": 1e-4}


def full(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a module's own parameters, without those of the modules inside it; None where it has none."""
    return tuple(name for name, _ in module.named_parameters(recurse=False)) or None
