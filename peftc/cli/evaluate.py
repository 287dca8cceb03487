"""peftc evaluate."""

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Gates, Reading


@command()
def evaluate(
    model: o.Model = None,
    *,
    data: o.Data,
    reading: Reading,
    against: o.Against = None,
    batch_size: o.BatchSize = None,
    gates: Gates,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    seed: o.Seed = 0,
) -> None:
    """Measure the quality of a model, with its 95 % interval.

    \b
    Example:
      peftc evaluate small --data photos@test --against base --max-drop 0.01
    """
