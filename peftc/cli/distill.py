"""peftc distill."""

from peftc.cli import options as o
from peftc.cli.command import Step, command


@command(writes=True)
def distill(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    teacher: o.Teacher = None,
    data: o.Data,
    loss: o.Loss = None,
    settings: o.TermSettings = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    minutes: o.Minutes = None,
    batch_size: o.StepSize = 32,
    accumulate: o.Accumulate = 1,
    learning_rate: o.LearningRate = 3e-4,
    weight_decay: o.WeightDecay = 0.01,
    warmup: o.Warmup = 0.1,
    clip: o.Clip = 1.0,
    ema: o.Ema = None,
    dropout: o.Dropout = False,
    mixed_precision: o.MixedPrecision = "no",
    augment: o.Augment = None,
    mixup: o.Mixup = 0.0,
    cutmix: o.Cutmix = 0.0,
    cache_teacher: o.CacheTeacher = False,
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
    """Train a compressed model to give what its teacher gives.

    How long is one of --epochs, --steps and --minutes; 5 epochs without.

    \b
    Example:
      peftc distill small --data flowers/ --epochs 10 -o healed
    """
    from peftc.steps.distill import distill as step

    return step
