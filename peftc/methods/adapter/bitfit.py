"""BitFit (Ben Zaken et al., arXiv 2106.10199): of the network only the biases train, those of norms included."""

from torch import nn

EVERYWHERE = True  # norms and heads too


def bitfit(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a module's own biases, None where it has none."""
    names = tuple(name for name, _ in module.named_parameters(recurse=False) if name.endswith("bias"))
    return names or None
