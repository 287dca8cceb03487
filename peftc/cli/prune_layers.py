"""peftc prune-layers."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


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
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    minutes: o.Minutes = None,
    learning_rate: o.UsualRate = None,
    stability: o.Stability = False,
    delta: o.Delta = None,
    plot: o.ScorePlot = None,
    task: o.Task = None,
    num_samples: o.NumSamples = None,
    batch_size: o.BatchSize = None,
    image_size: o.ImageSize = None,
    max_length: o.MaxLength = None,
    max_drop: o.MaxDrop = None,
    min_quality: o.MinQuality = None,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    dry_run: o.DryRun = False,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> Step:
    """Drop the layers that a task does not need.

    With labels they are found by t-SNE maps of what each layer gives; without, say how many stay: --keep N.

    With --retrain the result is finetuned on the same samples; one of --epochs, --steps and --minutes says how long.

    \b
    Example:
      peftc prune-layers tuned --data flowers/ --retrain -o shorter
    """
    from peftc.steps.prune_layers import prune_layers as step

    return step
