"""Every option once: its spelling, its type, its help phrase.

A command's parameters are named, ordered and defaulted like the Python function of the same word; the
options that exist on the command line alone are ``SOURCE``, ``PUSH`` and ``OUTPUT``, which `peftc.cli.command` adds.
"""

from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from typer import Argument, Option

from peftc.cli.defaults import configure
from peftc.cli.texts import READERS, amount, choice, numeric, size
from peftc.options import NOT_NEGATIVE, POSITIVE, Group, Reading, Rule, spelling
from peftc.plans.allocate import ALLOCATIONS

SHARE = numeric(float, Rule("in (0, 1]", lambda value: 0 < value <= 1))


def value(metavar: str, help: str, *names: str, **more: Any) -> Any:
    """Return an option that takes a value: what stands for it in the help, one phrase, and its names."""
    return Option(*names, metavar=metavar, help=help, **more)


# what it reads and writes
Model = Annotated[
    str | None,
    Argument(
        metavar="[MODEL]",
        help="a folder, timm/NAME, ORG/NAME, or - for standard input (default: the project's last artifact)",
    ),
]
Beneath = Annotated[str, Argument(metavar="BASE", help="the model that it was tuned from")]
Models = Annotated[
    list[str],
    Argument(
        metavar="[MODEL]...", help="artifacts and exports, or - for standard input (default: the project's chain)"
    ),
]
OutputDir = Annotated[Path | None, value("DIR", "folder to write", "-o", "--output-dir")]
Page = Annotated[str, value("FILE", "HTML file to write", "-o", "--output")]
Analysis = Annotated[Path | None, value("FILE", "file with the output of `peftc analyze --json`: spectra and a plan")]
PlanOut = Annotated[Path | None, value("FILE", "write the ranks to this JSON file", "--plan")]
Plot = Annotated[Path | None, value("FILE", "draw spectra and predicted losses to this .png or .svg")]
Overwrite = Annotated[bool, Option("--overwrite", help="replace what another request wrote there")]
DryRun = Annotated[bool, Option("--dry-run", help="show the plan and write nothing")]
MaxShardSize = Annotated[
    str, value("SIZE", "largest weight file; a larger model is cut into several", parser=READERS["size_text"])
]

# how much to keep: one of these
UpdateRank = Annotated[int, value("RANK", "rank of the updates", "--rank", min=1)]
Plan = Annotated[Path | None, value("FILE", "take the ranks from this file")]
KeepAllRanks = Annotated[
    bool, Option("--keep-all-ranks", help="store the factors of every rank, for `peftc truncate` to cut")
]

# how they share it
Allocation = Annotated[
    str,
    value(
        "NAME",
        f"how modules share the budget: {', '.join(ALLOCATIONS)}",
        parser=choice("auto", *ALLOCATIONS),
    ),
]
RankMultiple = Annotated[int, value("N", "every rank is a multiple of N", min=1)]

# methods and their settings
Joint = Annotated[
    bool, Option("--joint/--no-joint", help="let modules with the same input, as q, k, v, share one factor")
]
Method = Annotated[str, value("NAME", "how to factor matrices, see `peftc methods decompose`")]
ConvMethod = Annotated[str, value("NAME", "how to factor convolutions")]
Settings = Annotated[list[str] | None, value("KEY=VALUE", "a setting of the method; repeatable", "--set")]

# which modules
Include = Annotated[list[str], value("PATTERN", "also factor these modules; repeatable")]
Skip = Annotated[list[str], value("PATTERN", "leave these modules dense; repeatable")]

# which layers to keep
Score = Annotated[
    str | None, value("NAME", "how to score layers, as block-influence, see `peftc methods prune-layers`")
]
Alpha = Annotated[
    float | None, value("X", "layers at the end go where scores reach this share of the last one's", parser=SHARE)
]
Keep = Annotated[int | None, value("N", "keep N layers", min=1)]
Drop = Annotated[str | None, value("N,...", "drop these layers, by number from 0")]
TaskData = Annotated[str | None, value("DATA", "samples of the task, to score layers and measure", "--data")]
WithinDrop = Annotated[
    float | None,
    value(
        "X",
        "drop what costs at most X of quality on held-out samples (default: 0.02)",
        parser=numeric(float, NOT_NEGATIVE),
    ),
]
Repair = Annotated[
    bool | None,
    Option("--repair/--no-repair", help="close the gaps by linear maps (default: where a measured loss decides)"),
]
Retrain = Annotated[bool, Option("--retrain", help="finetune what is left on the same samples")]
AdapterAgain = Annotated[
    str | None, value("NAME", "method of --retrain (default: that of the last finetuning, or lora)", "--method")
]
Stability = Annotated[bool, Option("--stability", help="score again with other seeds and on halves of the samples")]
ScorePlot = Annotated[Path | None, value("FILE", "draw scores and t-SNE maps to this .png or .svg", "--plot")]


class Shown(NamedTuple):
    """Which options of a group a command has, all where none is named, and their defaults where it has other ones."""

    only: tuple[str, ...]
    instead: dict[str, Any]


def shown(*only: str, **instead: Any) -> Shown:
    """Show some options of a group, or all of them with other defaults."""
    return Shown(only, instead)


def of_group(annotation: Any) -> dict[str, tuple[Any, Any]] | None:
    """Return annotation and default of each option that a group stands for; None for what is no group."""
    kind, *chosen = get_args(annotation) or (annotation,)
    if not (isinstance(kind, type) and issubclass(kind, Group)):
        return None
    only, instead = chosen[0] if chosen else shown()
    types, found = get_type_hints(kind), {}
    for each in fields(kind):
        name = spelling(each)
        if "help" in each.metadata and (not only or name in only):
            default = instead.get(name, each.default)
            found[name] = (_annotated(types[each.name], each, default), default)
    return found


def _annotated(kind: Any, each: Field[Any], default: Any) -> Any:
    """Return the annotation of an option of a group; one that a command leaves open is of the method."""
    words = {key: each.metadata[key] for key in ("help", "metavar")}
    bare = next(part for part in (*get_args(kind), kind) if part in (bool, int, float, str))
    if default is None and each.default is not None:
        kind, words["help"] = bare | None, f"{words['help']} (default: the method's)"
    if bare is bool:
        both = each.name.replace("_", "-")
        return Annotated[bool, Option(f"--{both}/--no-{both}", help=words["help"])]
    if "|" in words["metavar"]:
        return Annotated[kind, Option(parser=choice(*words["metavar"].split("|")), **words)]
    if each.metadata["reads"]:
        return Annotated[bare | None, Option(parser=READERS[each.metadata["reads"]], **words)]
    if bare is str:
        return Annotated[kind, Option(**words)]
    return Annotated[kind, Option(parser=numeric(bare, each.metadata["rule"]), **words)]


Unlimited = Annotated[
    Reading,
    shown("task", "image_size", "max_length", "image_column", "text_column", "label_column", "streaming", "workers"),
]

EMPTY: Any = ()  # the default of a repeated option, whose type no checker takes for a list

# what to measure on
Data = Annotated[str, value("DATA", "folder, table file, hf:NAME or sklearn:digits; @split picks a split")]
OptionalData = Annotated[
    str | None, value("DATA", "samples to calibrate on (train split) and to measure on (test split)", "--data")
]
Statistics = Annotated[Path | None, value("DIR", "folder that `peftc calibrate` wrote")]
BiasCorrection = Annotated[
    bool, Option("--bias-correction/--no-bias-correction", help="let biases make up for the mean of what factors lose")
]
Sensitivity = Annotated[
    int, value("N", "measure what each module loses on this many samples; 0 only predicts it", min=0)
]
Sequential = Annotated[
    bool, Option("--sequential", help="fit each module to the inputs that the factored modules before it give")
]
Against = Annotated[str | None, value("MODEL", "a second model to compare with, or `base`")]
BatchSize = Annotated[int | None, value("N", "samples at once", min=1)]
Rounds = Annotated[int, value("N", "timed rounds, 5 or more", min=5)]
Generate = Annotated[int | None, value("N", "also time writing N tokens after a prompt, 8 or more", min=8)]

# how to export
Format = Annotated[str | None, value("NAME", "what to write, as onnx or hf, see `peftc methods export`", "--format")]
Dense = Annotated[bool, Option("--dense", help="write dense weights: multiply the factors out")]
SomeData = Annotated[str | None, value("DATA", "compare on these samples", "--data")]
TimedBatch = Annotated[int, value("N", "time batches of so many samples, and of one", "--batch-size", min=1)]

# how to train
Teacher = Annotated[str | None, value("MODEL", "the model to imitate (default: the base of MODEL)")]
Loss = Annotated[str | None, value("NAME=WEIGHT,...", "terms and weights, as features=1,task=0.5")]
TermSettings = Annotated[list[str] | None, value("TERM.KEY=VALUE", "a setting of a term; repeatable", "--set")]
CacheTeacher = Annotated[
    bool, Option("--cache-teacher", help="keep the teacher's answers on disk, one for each sample")
]
CacheTop = Annotated[int | None, value("K", "keep of these answers the K largest logits of each token", min=1)]
LogWith = Annotated[str | None, value("NAME", "also log to this tracker, as tensorboard")]

# what to adapt
Adapter = Annotated[str, value("NAME", "what learns, as lora, see `peftc methods finetune`", "--method")]
AlsoAdapt = Annotated[list[str], value("PATTERN", "also adapt these modules; repeatable", "--include")]
LeaveAlone = Annotated[list[str], value("PATTERN", "do not adapt these modules; repeatable", "--skip")]
OnProduct = Annotated[bool, Option("--on-product", help="adapt factored modules as one matrix, not each factor")]
SameRank = Annotated[bool, Option("--same-rank", help="merge --on-product updates without a larger rank")]
Head = Annotated[
    str,
    value(
        "auto|new|keep",
        "whether the model gets a new head; auto: where its classes are others",
        parser=choice("auto", "new", "keep"),
    ),
]

# what it reads and writes
Delta = Annotated[
    bool | None, Option("--delta/--full", help="write what the task changed, or a whole model (default: as MODEL is)")
]

# how to train
Guide = Annotated[str | None, value("MODEL", "also imitate this model", "--teacher")]

# gates: exit 3 where they are not met
MaxParams = Annotated[int | None, value("N", "gate: most parameters", parser=amount)]
MaxBytes = Annotated[int | None, value("SIZE", "gate: largest size on disk", parser=size)]
MinSpeedup = Annotated[float | None, value("X", "gate: least speed-up", parser=numeric(float, POSITIVE))]

# where and how
Device = Annotated[
    str,
    value("auto|cpu|cuda|mps", "where to compute", parser=choice("auto", "cpu", "cuda", "mps", pattern=r"cuda:\d+")),
]
DType = Annotated[
    str,
    value(
        "auto|float32|float16|bfloat16",
        "number format to compute in",
        "--dtype",
        parser=choice("auto", "float32", "float16", "bfloat16"),
    ),
]
Compile = Annotated[bool, Option("--compile", help="compile the layers by torch.compile")]
Seed = Annotated[int, value("N", "seed of everything random", min=0)]
Verify = Annotated[bool, Option("--verify", help="compare every file with the digest in the manifest")]
Commands = Annotated[bool, Option("--commands", help="print the command lines that rebuild it")]
Json = Annotated[bool, Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, Option("-q", "--quiet", help="show warnings and errors only")]
Verbose = Annotated[
    int, Option("-v", "--verbose", count=True, help="show all tables and notes; -vv also logs of other libraries")
]
Config = Annotated[Path | None, value("FILE", "project file (default: peftc.toml)", is_eager=True, callback=configure)]

SOURCE: dict[str, tuple[Any, Any]] = {
    "arch": (Annotated[str | None, value("timm:NAME", "architecture of bare weights")], None),
    "arch_set": (
        Annotated[
            list[str] | None, value("KEY=VALUE", "argument of the model's constructor, as img_size=96; repeatable")
        ],
        None,
    ),
    "weights": (Annotated[Path | None, value("FILE", "file of weights for an architecture")], None),
    "revision": (Annotated[str | None, value("NAME", "branch, tag or commit on the hub")], None),
    "preprocess": (Annotated[list[str] | None, value("KEY=VALUE", "mean, std, input_size, ... of images")], None),
    "allow_code": (Annotated[bool, Option("--allow-code", help="run the python: code that MODEL names")], False),
    "trust_remote_code": (Annotated[bool, Option("--trust-remote-code", help="run code that comes with MODEL")], False),
    "offline": (Annotated[bool, Option("--offline", help="never ask the network")], False),
    "base": (
        Annotated[str | None, value("MODEL", "the model that a delta changes, where peftc does not find it")],
        None,
    ),
}
PUSH: dict[str, tuple[Any, Any]] = {
    "push_to_hub": (
        Annotated[str | None, value("OWNER/NAME", "push it to this repository of the hub, with a card")],
        None,
    ),
    "private": (Annotated[bool, Option("--private", help="make a new repository private")], False),
}
OUTPUT: dict[str, tuple[Any, Any]] = {
    "config": (Config, None),
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, 0),
}
