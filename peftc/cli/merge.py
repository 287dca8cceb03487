"""peftc merge."""

from peftc.cli import options as o
from peftc.cli.command import command


@command(writes=True)
def merge(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    same_rank: o.SameRank = False,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    overwrite: o.Overwrite = False,
) -> None:
    """Make a delta whole.

    \b
    Example:
      peftc merge tuned -o whole
    """
