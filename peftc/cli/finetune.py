"""peftc finetune."""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Augment, Gates, Reading, Recipe


@command(writes=True)
def finetune(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    data: o.Data,
    method: o.Adapter = "lora",
    settings: o.Settings = None,
    include: o.AlsoAdapt = o.EMPTY,
    skip: o.LeaveAlone = o.EMPTY,
    on_product: o.OnProduct = False,
    same_rank: o.SameRank = False,
    head: o.Head = "auto",
    delta: o.Delta = None,
    teacher: o.Guide = None,
    loss: o.Loss = None,
    recipe: Annotated[Recipe, o.shown(learning_rate=None, weight_decay=None)],
    augment: Augment,
    log_with: o.LogWith = None,
    reading: Reading,
    gates: Gates,
    max_shard_size: o.MaxShardSize = "5GB",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Tune a model for a task by few parameters.

    How long is one of --epochs, --steps and --minutes; 10 epochs without.

    \b
    Example:
      peftc finetune small --data flowers/ --method snella -o tuned
    """
