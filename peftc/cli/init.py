"""peftc init."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


@command()
def init(model: o.Model = None, *, data: o.OptionalData = None, overwrite: o.Overwrite = False) -> Step:
    """Write a project file with a chain to start from.

    \b
    Example:
      peftc init timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data flowers/
    """
    from peftc.steps.init import init as step

    return step
