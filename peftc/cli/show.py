"""peftc show."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


@command(source=False)
def show(model: o.Model = None, *, commands: o.Commands = False, verify: o.Verify = False) -> Step:
    """Print what an artifact is made of and how it came to be.

    \b
    Example:
      peftc show small --commands
    """
    from peftc.steps.show import show as step

    return step
