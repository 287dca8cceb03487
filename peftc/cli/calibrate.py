"""peftc calibrate."""

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Calibration


@command()
def calibrate(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    data: o.Data,
    method: o.Method = "auto",
    conv_method: o.ConvMethod = "spatial",
    include: o.Include = o.EMPTY,
    skip: o.Skip = o.EMPTY,
    calibration: Calibration,
    reading: o.Unlimited,
    batch_size: o.BatchSize = 8,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Collect statistics for decompositions to reuse.

    \b
    Example:
      peftc calibrate timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data photos -o stats
    """
