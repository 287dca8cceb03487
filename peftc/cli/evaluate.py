"""peftc evaluate."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


@command()
def evaluate(
    model: o.Model = None,
    *,
    data: o.Data,
    task: o.Task = None,
    against: o.Against = None,
    num_samples: o.NumSamples = None,
    batch_size: o.BatchSize = None,
    image_size: o.ImageSize = None,
    max_length: o.MaxLength = None,
    image_column: o.ImageColumn = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    max_drop: o.MaxDrop = None,
    min_quality: o.MinQuality = None,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    seed: o.Seed = 0,
) -> Step:
    """Measure the quality of a model, with its 95 % interval.

    \b
    Example:
      peftc evaluate small --data photos@test --against base --max-drop 0.01
    """
    from peftc.steps.evaluate import evaluate as step

    return step
