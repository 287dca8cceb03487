"""peftc finetune."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


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
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    minutes: o.Minutes = None,
    batch_size: o.StepSize = 32,
    accumulate: o.Accumulate = 1,
    learning_rate: o.UsualRate = None,
    weight_decay: o.UsualDecay = None,
    warmup: o.Warmup = 0.1,
    clip: o.Clip = 1.0,
    ema: o.Ema = None,
    dropout: o.Dropout = False,
    mixed_precision: o.MixedPrecision = "no",
    augment: o.Augment = None,
    mixup: o.Mixup = 0.0,
    cutmix: o.Cutmix = 0.0,
    held_out: o.HeldOut = 0.1,
    evaluations: o.Evaluations = 5,
    log_with: o.LogWith = None,
    task: o.Task = None,
    num_samples: o.NumSamples = None,
    image_size: o.ImageSize = None,
    max_length: o.MaxLength = None,
    max_drop: o.MaxDrop = None,
    min_quality: o.MinQuality = None,
    max_shard_size: o.MaxShardSize = "5GB",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> Step:
    """Tune a model for a task by few parameters.

    How long is one of --epochs, --steps and --minutes; 10 epochs without.

    \b
    Example:
      peftc finetune small --data flowers/ --method snella -o tuned
    """
    from peftc.steps.finetune import finetune as step

    return step
