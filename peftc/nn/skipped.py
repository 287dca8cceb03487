"""A layer that was dropped where its network cannot be built with fewer of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def first_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the first tensor that a module is called with, which is what a layer reads; None where there is none."""
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)


class Skipped(nn.Module):
    """Hand on what is read, in the form that the layer in its place gave.

    Args:
        lengths: of the tuples that the layer's main output stood first in, from the outer one: none for a tensor,
            ``[2]`` for ``(tensor, other)``.
    """

    def __init__(self, lengths: Sequence[int] = ()) -> None:
        super().__init__()
        self.lengths = list(lengths)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor that is given; in place of further outputs, as attention maps, stands None."""
        found = first_tensor(args, kwargs)
        for length in reversed(self.lengths):
            found = (found, *(length - 1) * [None])
        return found

    def extra_repr(self) -> str:
        """Return what a printed network says of it."""
        return f"lengths={self.lengths}"
