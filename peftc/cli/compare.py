"""peftc compare."""

from peftc.cli import options as o
from peftc.cli.command import command


@command(source=False)
def compare(models: o.Models = o.EMPTY, *, analysis: o.Analysis = None, commands: o.Commands = False) -> None:
    """Print stages, sizes, quality and speed side by side.

    \b
    Example:
      peftc compare small healed
    """
