"""peftc analyze."""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Budgets, Calibration


@command()
def analyze(
    model: o.Model = None,
    *,
    plan: o.PlanOut = None,
    plot: o.Plot = None,
    budgets: Budgets,
    allocation: o.Allocation = "auto",
    rank_multiple: o.RankMultiple = 1,
    method: o.Method = "auto",
    conv_method: o.ConvMethod = "spatial",
    settings: o.Settings = None,
    joint: o.Joint = False,
    include: o.Include = o.EMPTY,
    skip: o.Skip = o.EMPTY,
    data: o.OptionalData = None,
    statistics: o.Statistics = None,
    calibration: Annotated[Calibration, o.shown("calibration_samples", "calibration_tokens")],
    bias_correction: o.BiasCorrection = True,
    reading: o.Unlimited,
    batch_size: o.BatchSize = None,
    device: o.Device = "auto",
    seed: o.Seed = 0,
) -> None:
    """Show rank spectra and the predicted loss of each ratio.

    \b
    Example:
      peftc analyze timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --ratio 0.5 --plan plan.json
    """
