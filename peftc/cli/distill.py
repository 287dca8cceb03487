"""peftc distill."""

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Augment, Gates, Reading, Recipe


@command(writes=True)
def distill(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    teacher: o.Teacher = None,
    data: o.Data,
    loss: o.Loss = None,
    settings: o.TermSettings = None,
    recipe: Recipe,
    augment: Augment,
    cache_teacher: o.CacheTeacher = False,
    log_with: o.LogWith = None,
    reading: Reading,
    gates: Gates,
    max_shard_size: o.MaxShardSize = "5GB",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Train a compressed model to give what its teacher gives.

    How long is one of --epochs, --steps and --minutes; 5 epochs without.

    \b
    Example:
      peftc distill small --data flowers/ --epochs 10 -o healed
    """
