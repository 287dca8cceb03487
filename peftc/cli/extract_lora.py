"""peftc extract-lora."""

from peftc.cli import options as o
from peftc.cli.command import command


@command(writes=True)
def extract_lora(
    model: o.Model = None,
    *,
    against: o.Beneath,
    output_dir: o.OutputDir = None,
    rank: o.UpdateRank = 8,
    include: o.AlsoAdapt = o.EMPTY,
    skip: o.LeaveAlone = o.EMPTY,
    overwrite: o.Overwrite = False,
) -> None:
    """Turn the difference of two models into a low-rank delta.

    \b
    Example:
      peftc extract-lora tuned dense --rank 16 -o delta
    """
