"""peftc compare."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


@command(source=False)
def compare(models: o.Models = o.EMPTY, *, analysis: o.Analysis = None, commands: o.Commands = False) -> Step:
    """Print stages, sizes, quality and speed side by side.

    \b
    Example:
      peftc compare small healed
    """
    from peftc.steps.compare import compare as step

    return step
