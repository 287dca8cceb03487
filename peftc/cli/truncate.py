"""peftc truncate."""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Budgets


@command(writes=True)
def truncate(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    budgets: Annotated[Budgets, o.shown("ratio", "rank", "energy", "target_params", "target_macs")],
    plan: o.Plan = None,
    allocation: o.Allocation = "auto",
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Cut an artifact with all ranks to a budget, in seconds.

    How much to keep is one of --ratio, --rank, --energy, --target-params, --target-macs and --plan.

    \b
    Example:
      peftc truncate all --ratio 0.4 -o small
    """
