"""peftc export."""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Gates, Reading


@command(pushes=True)
def export(
    model: o.Model = None,
    *,
    format: o.Format = None,
    output_dir: o.OutputDir = None,
    dense: o.Dense = False,
    settings: o.Settings = None,
    data: o.SomeData = None,
    reading: Annotated[Reading, o.shown(num_samples=64)],
    batch_size: o.TimedBatch = 16,
    gates: Gates,
    max_bytes: o.MaxBytes = None,
    rounds: o.Rounds = 10,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a model as other programs read it, and check it there.

    The export is loaded by transformers, timm, ONNX Runtime or torch alone, compared with the model, and timed.

    \b
    Example:
      peftc export small --format onnx -o release
    """
