"""peftc show."""

from peftc.cli import options as o
from peftc.cli.command import command


@command(source=False)
def show(model: o.Model = None, *, commands: o.Commands = False, verify: o.Verify = False) -> None:
    """Print what an artifact is made of and how it came to be.

    \b
    Example:
      peftc show small --commands
    """
