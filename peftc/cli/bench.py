"""peftc bench."""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Reading


@command()
def bench(
    model: o.Model = None,
    *,
    against: o.Against = None,
    batch_size: o.BatchSize = None,
    reading: Annotated[Reading, o.shown("image_size", "max_length")],
    rounds: o.Rounds = 30,
    min_speedup: o.MinSpeedup = None,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    seed: o.Seed = 0,
) -> None:
    """Measure size, multiply-adds, latency, throughput and memory.

    \b
    Example:
      peftc bench small --against base --min-speedup 1.2
    """
