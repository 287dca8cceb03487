"""Every option once: its spelling, its type, its help phrase.

A command's parameters are named, ordered and defaulted like the Python function of the same word; the
options that exist on the command line alone are ``SOURCE``, ``PUSH`` and ``OUTPUT``, which `peftc.cli.command` adds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from typer import Argument, BadParameter, Option

from peftc.cli.defaults import configure
from peftc.errors import UsageError
from peftc.options import Group, Reading, Rule, spelling
from peftc.report import AMOUNTS, SIZES, scaled


def _scaled(text: Any, units: dict[str, int], example: str) -> int:
    try:
        return scaled(str(text), units)
    except ValueError as error:
        raise BadParameter(f"`{text}` {error}: write it like {example}") from None


def amount(text: Any) -> int:
    """Read a count such as ``22M`` or ``1.5e9``."""
    return _scaled(text, AMOUNTS, "`22M`, `4.6G` or `1.5e9`")


def size(text: Any) -> int:
    """Read a number of bytes such as ``100MB`` (decimal) or ``1GiB`` (binary)."""
    return _scaled(text, SIZES, "`100MB`, `4.6G` or `1GiB`")


def size_text(text: Any) -> str:
    """Check a number of bytes and leave it as it was written."""
    size(text)
    return str(text)


def share(text: Any) -> float:
    """Read a number in (0, 1]."""
    value = number(text)
    if not 0 < value <= 1:
        raise BadParameter(f"`{text}` is not in (0, 1]")
    return value


def share_text(text: Any) -> str:
    """Check a decimal or a fraction in (0, 1] and leave it as it was written, so that 2/3 stays exact."""
    top, slash, bottom = str(text).partition("/")
    try:
        value = float(top) / (float(bottom) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise BadParameter(f"`{text}` is neither a decimal nor a fraction like `2/3`") from None
    if not 0 < value <= 1:
        raise BadParameter(f"`{text}` is not in (0, 1]: it is the share of parameters to keep")
    return str(text)


def number(text: Any) -> float:
    """Read a finite number."""
    try:
        value = float(str(text))
    except ValueError:
        raise BadParameter(f"`{text}` is not a number") from None
    if not math.isfinite(value):
        raise BadParameter(f"`{text}` is not a finite number")
    return value


def positive(text: Any) -> float:
    """Read a finite number above 0."""
    value = number(text)
    if value <= 0:
        raise BadParameter(f"`{text}` is not above 0")
    return value


def not_negative(text: Any) -> float:
    """Read a finite number of at least 0."""
    value = number(text)
    if value < 0:
        raise BadParameter(f"`{text}` is below 0")
    return value


def above_one_text(text: Any) -> str:
    """Check a finite number above 1 and leave it as it was written."""
    if number(text) <= 1:
        raise BadParameter(f"`{text}` is not above 1: it is how many times faster the model is to be")
    return str(text)


def numeric(kind: type[int | float], rule: Rule) -> Callable[[Any], int | float]:
    """Return a reader of numbers in a range."""

    def read(text: Any) -> int | float:
        try:
            value = kind(str(text))
        except ValueError:
            raise BadParameter(f"`{text}` is not a {'whole ' if kind is int else ''}number") from None
        if not rule.fits(value):
            raise BadParameter(f"`{text}` is not {rule.text}")
        return value

    return read


def choice(*known: str, pattern: str = "(?!)") -> Callable[[Any], str]:
    """Return a reader of one of ``known``, or of whatever matches ``pattern``."""

    def read(text: Any) -> str:
        if text not in known and re.fullmatch(pattern, str(text)) is None:
            raise BadParameter(f"`{text}` is not one of {', '.join(f'`{word}`' for word in known)}")
        return str(text)

    return read


def settings(option: str, texts: Iterable[str], *, lists: bool = False) -> dict[str, Any]:
    """Read repeated ``key=value``; values become int, float, bool or stay text, and comma lists where allowed.

    Raises:
        UsageError: a text without ``=``, or a key given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"`{option} {text}` is not understood", hint=f"write it as `{option} key=value`")
        if key in found:
            raise UsageError(f"`{option} {key}` is given twice", hint="give each key once")
        parts = [_value(part.strip()) for part in value.split(",")] if lists else [_value(value)]
        found[key] = parts if len(parts) > 1 else parts[0]
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# what it reads and writes
Model = Annotated[
    str | None, Argument(metavar="[MODEL]", help="a folder, timm/NAME, ORG/NAME or - (default: this project's last)")
]
Beneath = Annotated[str, Argument(metavar="BASE", help="the model that it was tuned from")]
Models = Annotated[
    list[str], Argument(metavar="[MODEL]...", help="artifact folders, or - (default: all of this project's chain)")
]
OutputDir = Annotated[Path | None, Option("-o", "--output-dir", metavar="DIR", help="folder to write")]
Page = Annotated[str, Option("-o", "--output", metavar="FILE", help="page to write")]
Analysis = Annotated[
    Path | None, Option(metavar="FILE", help="what `peftc analyze --json` printed of the base: its spectra, its plan")
]
Overwrite = Annotated[bool, Option("--overwrite", help="replace the result of another request")]
DryRun = Annotated[bool, Option("--dry-run", help="show the plan and write nothing")]
MaxShardSize = Annotated[str, Option(parser=size_text, metavar="SIZE", help="largest weight file")]

# how much to keep: one of these
UpdateRank = Annotated[int, Option("--rank", min=1, metavar="RANK", help="rank of the updates")]
Plan = Annotated[Path | None, Option(metavar="FILE", help="ranks from this file")]
KeepAllRanks = Annotated[bool, Option("--keep-all-ranks", help="no budget yet: store every rank for `peftc truncate`")]
PlanOut = Annotated[Path | None, Option("--plan", metavar="FILE", help="write the ranks to this JSON file")]
Plot = Annotated[Path | None, Option(metavar="FILE", help="draw spectra and predicted losses to this .png or .svg")]

# how they share it
Allocation = Annotated[
    str,
    Option(
        parser=choice("auto", "uniform", "global", "energy", "convex"),
        metavar="NAME",
        help="how modules share the budget: uniform, global, energy or convex",
    ),
]
RankMultiple = Annotated[int, Option(min=1, metavar="N", help="every rank is a multiple of N")]

# methods and their settings
Method = Annotated[str, Option(metavar="NAME", help="how to factor matrices, see `peftc methods`")]
ConvMethod = Annotated[str, Option(metavar="NAME", help="how to factor convolutions")]
Settings = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="a setting of the method, repeatable")]

# which modules
Include = Annotated[list[str], Option(metavar="PATTERN", help="also factor these modules, repeatable")]
Skip = Annotated[list[str], Option(metavar="PATTERN", help="leave these modules dense, repeatable")]

# which layers to keep
Score = Annotated[
    str | None, Option(metavar="NAME", help="how to score layers, as block-influence, see `peftc methods importance`")
]
Alpha = Annotated[float, Option(parser=share, metavar="X", help="keep layers up to this share of the last one's score")]
Keep = Annotated[int | None, Option(min=1, metavar="N", help="keep so many layers")]
Drop = Annotated[str | None, Option(metavar="N,...", help="drop these layers, by number from 0")]
TaskData = Annotated[
    str | None, Option("--data", metavar="DATA", help="samples of the task, to score layers and measure")
]
WithinDrop = Annotated[
    float | None, Option(parser=not_negative, metavar="X", help="drop what costs at most X of held-out quality")
]
Repair = Annotated[bool, Option("--repair", help="close the gaps by linear maps, folded into the layers before them")]
Retrain = Annotated[bool, Option("--retrain", help="finetune what is left on the same samples")]
AdapterAgain = Annotated[
    str | None, Option("--method", metavar="NAME", help="what learns with --retrain (default: as before, or lora)")
]
Stability = Annotated[bool, Option("--stability", help="score again with other seeds and on halves of the samples")]
ScorePlot = Annotated[
    Path | None, Option("--plot", metavar="FILE", help="draw scores and t-SNE maps to this .png or .svg")
]


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
        return Annotated[bare | None, Option(parser=globals()[each.metadata["reads"]], **words)]
    if bare is str:
        return Annotated[kind, Option(**words)]
    return Annotated[kind, Option(parser=numeric(bare, each.metadata["rule"]), **words)]


Unlimited = Annotated[Reading, shown("task", "image_size", "max_length", "image_column", "text_column", "label_column")]

EMPTY: Any = ()  # the default of a repeated option, whose type no checker takes for a list

# what to measure on
Data = Annotated[
    str, Option(metavar="DATA", help="folder, table file, hf:NAME or sklearn:digits; @split picks a split")
]
OptionalData = Annotated[str | None, Option("--data", metavar="DATA", help="samples for statistics and gates")]
Statistics = Annotated[Path | None, Option(metavar="DIR", help="what `peftc calibrate` collected")]
BiasCorrection = Annotated[
    bool, Option("--bias-correction/--no-bias-correction", help="let biases make up for the mean of the inputs")
]
Sensitivity = Annotated[
    int, Option(min=0, metavar="N", help="measure what each module loses on this many samples; 0 only predicts it")
]
Sequential = Annotated[
    bool, Option("--sequential", help="fit each module on what the factored modules before it produce")
]
Joint = Annotated[
    bool, Option("--joint/--no-joint", help="modules that read one input, as q, k, v, share a down factor")
]
Against = Annotated[str | None, Option(metavar="MODEL", help="a second model to compare with, or `base`")]
BatchSize = Annotated[int | None, Option(min=1, metavar="N", help="samples at once")]
Rounds = Annotated[int, Option(min=5, metavar="N", help="timed rounds, 5 or more")]

# how to export
Format = Annotated[
    str | None, Option("--format", metavar="NAME", help="what to write, as onnx or hf, see `peftc methods format`")
]
Dense = Annotated[bool, Option("--dense", help="multiply factors out first")]
SomeData = Annotated[str | None, Option("--data", metavar="DATA", help="compare on these samples")]
TimedBatch = Annotated[
    int, Option("--batch-size", min=1, metavar="N", help="time batches of so many samples, and of one")
]

# how to train
Teacher = Annotated[str | None, Option(metavar="MODEL", help="who is imitated (default: the base of MODEL)")]
Loss = Annotated[str | None, Option(metavar="NAME=WEIGHT,...", help="terms and weights, as features=1,task=0.5")]
TermSettings = Annotated[
    list[str] | None, Option("--set", metavar="TERM.KEY=VALUE", help="a setting of a term, repeatable")
]
CacheTeacher = Annotated[bool, Option("--cache-teacher", help="ask the teacher once for each sample, and keep that")]
LogWith = Annotated[str | None, Option(metavar="NAME", help="also log to this tracker, as tensorboard")]

# what to adapt
Adapter = Annotated[str, Option("--method", metavar="NAME", help="what learns, as lora, see `peftc methods adapter`")]
AlsoAdapt = Annotated[list[str], Option("--include", metavar="PATTERN", help="also adapt these modules, repeatable")]
LeaveAlone = Annotated[list[str], Option("--skip", metavar="PATTERN", help="do not adapt these modules, repeatable")]
OnProduct = Annotated[bool, Option("--on-product", help="adapt factored modules as one matrix, not each factor")]
SameRank = Annotated[bool, Option("--same-rank", help="merge --on-product updates at the rank that there was")]
Head = Annotated[
    str, Option(parser=choice("auto", "new", "keep"), metavar="auto|new|keep", help="whether the outputs are new ones")
]

# what it reads and writes
Delta = Annotated[
    bool | None, Option("--delta/--full", help="write what the task changed, or a whole model (default: as MODEL is)")
]

# how to train
Guide = Annotated[str | None, Option("--teacher", metavar="MODEL", help="also imitate this model")]

# gates: exit 3 where they are not met
MaxParams = Annotated[int | None, Option(parser=amount, metavar="N", help="gate: most parameters")]
MaxBytes = Annotated[int | None, Option(parser=size, metavar="SIZE", help="gate: largest size on disk")]
MinSpeedup = Annotated[float | None, Option(parser=positive, metavar="X", help="gate: least speed-up")]

# where and how
Device = Annotated[
    str,
    Option(
        parser=choice("auto", "cpu", "cuda", "mps", pattern=r"cuda:\d+"),
        metavar="auto|cpu|cuda|mps",
        help="where to compute",
    ),
]
DType = Annotated[
    str,
    Option(
        "--dtype",
        parser=choice("auto", "float32", "float16", "bfloat16"),
        metavar="auto|float32|float16|bfloat16",
        help="number format to compute in",
    ),
]
Seed = Annotated[int, Option(min=0, metavar="N", help="seed of everything random")]
Verify = Annotated[bool, Option("--verify", help="compare every file with the digest in the manifest")]
Commands = Annotated[bool, Option("--commands", help="print the command lines that rebuild it")]
Json = Annotated[bool, Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, Option("-q", "--quiet", help="show warnings and errors only")]
Verbose = Annotated[int, Option("-v", "--verbose", count=True, help="show more; -vv shows all")]
Config = Annotated[
    Path | None, Option(metavar="FILE", is_eager=True, callback=configure, help="project file (default: peftc.toml)")
]

SOURCE: dict[str, tuple[Any, Any]] = {
    "arch": (Annotated[str | None, Option(metavar="timm:NAME", help="architecture of bare weights")], None),
    "arch_set": (
        Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="constructor argument, repeatable")],
        None,
    ),
    "weights": (Annotated[Path | None, Option(metavar="FILE", help="weights of an architecture")], None),
    "revision": (Annotated[str | None, Option(metavar="NAME", help="branch, tag or commit on the hub")], None),
    "preprocess": (
        Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="mean, std, input_size, ... of images")],
        None,
    ),
    "allow_code": (Annotated[bool, Option("--allow-code", help="run the python: code that MODEL names")], False),
    "trust_remote_code": (Annotated[bool, Option("--trust-remote-code", help="run code that comes with MODEL")], False),
    "offline": (Annotated[bool, Option("--offline", help="never ask the network")], False),
    "base": (Annotated[str | None, Option(metavar="MODEL", help="what a delta changes, where it is not found")], None),
}
PUSH: dict[str, tuple[Any, Any]] = {
    "push_to_hub": (
        Annotated[str | None, Option(metavar="OWNER/NAME", help="push it to this repository of the hub, with a card")],
        None,
    ),
    "private": (Annotated[bool, Option("--private", help="make that repository private, where there is none")], False),
}
OUTPUT: dict[str, tuple[Any, Any]] = {
    "config": (Config, None),
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, 0),
}
