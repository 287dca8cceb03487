"""peftc prune-layers."""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Gates, Reading, Recipe


@command(writes=True)
def prune_layers(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    data: o.TaskData = None,
    score: o.Score = None,
    settings: o.Settings = None,
    alpha: o.Alpha = 0.3,
    keep: o.Keep = None,
    drop: o.Drop = None,
    within_drop: o.WithinDrop = None,
    repair: o.Repair = False,
    retrain: o.Retrain = False,
    method: o.AdapterAgain = None,
    recipe: Annotated[Recipe, o.shown("epochs", "steps", "minutes", "learning_rate", learning_rate=None)],
    stability: o.Stability = False,
    delta: o.Delta = None,
    plot: o.ScorePlot = None,
    reading: Reading,
    batch_size: o.BatchSize = None,
    gates: Gates,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    dry_run: o.DryRun = False,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Drop the layers that a task does not need.

    With labels they are found by t-SNE maps of what each layer gives; without, say how many stay: --keep N.

    With --retrain the result is finetuned on the same samples; one of --epochs, --steps and --minutes says how long.

    \b
    Example:
      peftc prune-layers tuned --data flowers/ --retrain -o shorter
    """
