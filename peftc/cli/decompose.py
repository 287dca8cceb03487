"""peftc decompose."""

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Budgets, Calibration, Gates, Reading


@command(writes=True)
def decompose(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    budgets: Budgets,
    plan: o.Plan = None,
    keep_all_ranks: o.KeepAllRanks = False,
    allocation: o.Allocation = "auto",
    rank_multiple: o.RankMultiple = 1,
    method: o.Method = "auto",
    conv_method: o.ConvMethod = "spatial",
    settings: o.Settings = None,
    include: o.Include = o.EMPTY,
    skip: o.Skip = o.EMPTY,
    data: o.OptionalData = None,
    statistics: o.Statistics = None,
    calibration: Calibration,
    bias_correction: o.BiasCorrection = True,
    sensitivity: o.Sensitivity = 16,
    sequential: o.Sequential = False,
    joint: o.Joint = False,
    reading: Reading,
    batch_size: o.BatchSize = None,
    gates: Gates,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Replace dense modules by low-rank factors.

    How much to keep is one of --ratio, --rank, --energy, --target-params, --target-macs, --speedup and
    --plan; or --keep-all-ranks, for peftc truncate to cut.

    \b
    Example:
      peftc decompose timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --ratio 0.5 -o small
    """
