"""peftc report."""

from peftc.cli import options as o
from peftc.cli.command import command


@command(source=False)
def report(models: o.Models = o.EMPTY, *, output: o.Page = "report.html", analysis: o.Analysis = None) -> None:
    """Write one HTML page on what artifacts gained and lost.

    \b
    Example:
      peftc report small healed -o report.html
    """
