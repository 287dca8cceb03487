"""The commands that run a step: what can be typed, and what the help says.

Each is named, ordered and defaulted like the function of that name in `peftc.steps`; a group stands for its options.
"""

from typing import Annotated

from peftc.cli import options as o
from peftc.cli.command import command
from peftc.options import Augment, Budgets, Calibration, Gates, Reading, Recipe, Windows


@command("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --ratio 0.5 --plan plan.json")
def analyze(
    model: o.Model = None,
    *,
    plan: o.PlanOut = None,
    plot: o.Plot = None,
    budgets: Budgets,
    allocation: o.Allocation = "auto",
    rank_multiple: o.RankMultiple = 1,
    method: o.Method = "auto",
    conv_method: o.ConvMethod = "spatial",
    settings: o.Settings = None,
    joint: o.Joint = False,
    include: o.Include = o.EMPTY,
    skip: o.Skip = o.EMPTY,
    data: o.OptionalData = None,
    statistics: o.Statistics = None,
    calibration: Annotated[Calibration, o.shown("calibration_samples", "calibration_tokens")],
    bias_correction: o.BiasCorrection = True,
    reading: o.Unlimited,
    batch_size: o.BatchSize = None,
    device: o.Device = "auto",
    seed: o.Seed = 0,
) -> None:
    """Show rank spectra and the predicted loss of each ratio."""


@command("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data photos -o stats")
def calibrate(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    data: o.Data,
    method: o.Method = "auto",
    conv_method: o.ConvMethod = "spatial",
    include: o.Include = o.EMPTY,
    skip: o.Skip = o.EMPTY,
    calibration: Calibration,
    reading: o.Unlimited,
    batch_size: o.BatchSize = 8,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Collect statistics for decompositions to reuse."""


@command("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --ratio 0.5 -o small", writes=True)
def decompose(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    budgets: Budgets,
    plan: o.Plan = None,
    keep_all_ranks: o.KeepAllRanks = False,
    allocation: o.Allocation = "auto",
    rank_multiple: o.RankMultiple = 1,
    method: o.Method = "auto",
    conv_method: o.ConvMethod = "spatial",
    settings: o.Settings = None,
    include: o.Include = o.EMPTY,
    skip: o.Skip = o.EMPTY,
    data: o.OptionalData = None,
    statistics: o.Statistics = None,
    calibration: Calibration,
    bias_correction: o.BiasCorrection = True,
    sensitivity: o.Sensitivity = 16,
    sequential: o.Sequential = False,
    joint: o.Joint = False,
    reading: Reading,
    batch_size: o.BatchSize = None,
    gates: Gates,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Replace dense modules by low-rank factors.

    How much to keep is one of --ratio, --rank, --energy, --target-params, --target-macs, --speedup and
    --plan; or --keep-all-ranks, for peftc truncate to cut.
    """


@command("all --ratio 0.4 -o small", writes=True)
def truncate(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    budgets: Annotated[Budgets, o.shown("ratio", "rank", "energy", "target_params", "target_macs")],
    plan: o.Plan = None,
    allocation: o.Allocation = "auto",
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Cut an artifact with all ranks to a budget, in seconds.

    How much to keep is one of --ratio, --rank, --energy, --target-params, --target-macs and --plan.
    """


@command("tuned --data flowers/ --retrain -o shorter", writes=True)
def prune_layers(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    data: o.TaskData = None,
    score: o.Score = None,
    settings: o.Settings = None,
    alpha: o.Alpha = None,
    keep: o.Keep = None,
    drop: o.Drop = None,
    within_drop: o.WithinDrop = None,
    repair: o.Repair = None,
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
    """


@command("small --data flowers/ --epochs 10 -o healed", writes=True)
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
    cache_top: o.CacheTop = None,
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
    """


@command("small --data flowers/ --method snella -o tuned", writes=True)
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
    """


@command("tuned -o whole", writes=True)
def merge(
    model: o.Model = None,
    *,
    output_dir: o.OutputDir = None,
    same_rank: o.SameRank = False,
    max_params: o.MaxParams = None,
    max_bytes: o.MaxBytes = None,
    max_shard_size: o.MaxShardSize = "5GB",
    overwrite: o.Overwrite = False,
) -> None:
    """Make a delta whole."""


@command("tuned dense --rank 16 -o delta", writes=True)
def extract_lora(
    model: o.Model = None,
    *,
    against: o.Beneath,
    output_dir: o.OutputDir = None,
    rank: o.UpdateRank = 8,
    include: o.AlsoAdapt = o.EMPTY,
    skip: o.LeaveAlone = o.EMPTY,
    overwrite: o.Overwrite = False,
) -> None:
    """Turn the difference of two models into a low-rank delta."""


@command("small --format onnx -o release", pushes=True)
def export(
    model: o.Model = None,
    *,
    format: o.Format = None,
    output_dir: o.OutputDir = None,
    dense: o.Dense = False,
    settings: o.Settings = None,
    data: o.SomeData = None,
    reading: Annotated[Reading, o.shown(num_samples=64)],
    batch_size: o.TimedBatch = 16,
    gates: Gates,
    max_bytes: o.MaxBytes = None,
    rounds: o.Rounds = 10,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a model as other programs read it, and check it there.

    The export is loaded by transformers, timm, ONNX Runtime or torch alone, compared with the model, and timed.
    """


@command("small --data photos@test --against base --max-drop 0.01")
def evaluate(
    model: o.Model = None,
    *,
    data: o.Data,
    reading: Reading,
    windows: Windows,
    against: o.Against = None,
    batch_size: o.BatchSize = None,
    gates: Gates,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    compile: o.Compile = False,
    seed: o.Seed = 0,
) -> None:
    """Measure the quality of a model, with its 95 % interval."""


@command("small --against base --min-speedup 1.2")
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
    compile: o.Compile = False,
    generate: o.Generate = None,
    seed: o.Seed = 0,
) -> None:
    """Measure size, multiply-adds, latency, throughput and memory."""


@command("small --commands", source=False)
def show(model: o.Model = None, *, commands: o.Commands = False, verify: o.Verify = False) -> None:
    """Print what an artifact is made of and how it came to be."""


@command("small healed", source=False)
def compare(models: o.Models = o.EMPTY, *, analysis: o.Analysis = None, commands: o.Commands = False) -> None:
    """Print stages, sizes, quality and speed side by side."""


@command("small healed -o report.html", source=False)
def report(models: o.Models = o.EMPTY, *, output: o.Page = "report.html", analysis: o.Analysis = None) -> None:
    """Write one HTML page on what artifacts gained and lost."""


@command("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data flowers/")
def init(
    model: o.Model = None,
    *,
    data: o.OptionalData = None,
    reading: Annotated[Reading, o.shown("image_column", "text_column", "label_column")],
    overwrite: o.Overwrite = False,
) -> None:
    """Write a project file with a chain to start from."""


@command("", source=False)
def env() -> None:
    """Print versions, devices, threads and caches, to paste into a report."""


@command("", source=False)
def demo(*, output_dir: o.OutputDir = None, seed: o.Seed = 0, device: o.Device = "auto") -> None:
    """Run the main job on a small model in a minute, offline."""
