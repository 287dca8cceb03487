"""peftc init."""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Reading


@command()
def init(
    model: o.Model = None,
    *,
    data: o.OptionalData = None,
    reading: Annotated[Reading, o.shown("image_column", "text_column", "label_column")],
    overwrite: o.Overwrite = False,
) -> None:
    """Write a project file with a chain to start from.

    \b
    Example:
      peftc init timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data flowers/
    """
