"""peftc bench."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


@command()
def bench(
    model: o.Model = None,
    *,
    against: o.Against = None,
    batch_size: o.BatchSize = None,
    image_size: o.ImageSize = None,
    max_length: o.MaxLength = None,
    rounds: o.Rounds = 30,
    min_speedup: o.MinSpeedup = None,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    seed: o.Seed = 0,
) -> Step:
    """Measure size, multiply-adds, latency, throughput and memory.

    \b
    Example:
      peftc bench small --against base --min-speedup 1.2
    """
    from peftc.steps.bench import bench as step

    return step
