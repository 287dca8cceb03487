"""Linear probe: nothing trains but the head, which trains under every method."""

from torch import nn


def head(module: nn.Module) -> None:
    """Return None: no module is adapted."""
