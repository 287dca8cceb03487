"""peftc export."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


@command(pushes=True)
def export(
    model: o.Model = None,
    *,
    format: o.Format = None,
    output_dir: o.OutputDir = None,
    dense: o.Dense = False,
    settings: o.Settings = None,
    data: o.SomeData = None,
    task: o.Task = None,
    num_samples: o.ComparedSamples = 64,
    batch_size: o.TimedBatch = 16,
    image_size: o.ImageSize = None,
    max_length: o.MaxLength = None,
    max_drop: o.MaxDrop = None,
    min_quality: o.MinQuality = None,
    max_bytes: o.MaxBytes = None,
    rounds: o.Rounds = 10,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> Step:
    """Write a model as other programs read it, and check it there.

    The export is loaded by transformers, timm, ONNX Runtime or torch alone, compared with the model, and timed.

    \b
    Example:
      peftc export small --format onnx -o release
    """
    from peftc.steps.export import export as step

    return step
