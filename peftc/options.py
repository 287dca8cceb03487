"""What users choose, in the groups that several commands share: each option once, with its default, range and meaning.

A group is a frozen dataclass of `option` fields. The command line takes spelling, help and refusals from them, and a
step gathers its groups from its own parameters: ``Recipe.of(locals())``. A field that is no `option` is filled in by
the step alone. Adding an option to a group adds it to every command that shows the group; the functions of `steps/`
name it once more, for editors and type checkers, and a test compares the two.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from peftc import processes
from peftc.errors import PeftcError, UsageError, one_of

SPREAD = ("DEEPSPEED", "MEGATRON_LM")  # ways of Accelerate's to spread weights that are refused
COLUMNS = ("image", "text", "label")  # of a table: kinds that `Reading` has an option for
PROTOCOLS, FIRST_TOKENS = ("gptq",), ("window", "text")  # of `Windows`
OPTIMIZERS = (  # of `Recipe`: by torch, and the last three by bitsandbytes
    "adamw",
    "adam",
    "nadam",
    "radam",
    "adamax",
    "adafactor",
    "adagrad",
    "rmsprop",
    "sgd",
    "adamw-8bit",
    "paged-adamw",
    "paged-adamw-8bit",
)
UNCUT = ("adafactor", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")  # of them: they look at whole weights
SCHEDULES = ("cosine", "linear", "constant", "wsd")
NO_QUESTION = ("gradient_checkpointing", "shard", "offload")  # of `Recipe`: how it is computed, not what is asked
LATER = ("optimizer", "schedule", "early_stop", "compile", "packing")  # of `Recipe`: usual where none is named
EPOCHS = 10  # of a finetuning, where no length is given


class Rule(NamedTuple):
    """A range of numbers: in words, and as a test."""

    text: str
    fits: Callable[[Any], bool]


FINITE = Rule("a finite number", math.isfinite)
POSITIVE = Rule("above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("at least 0", lambda value: 0 <= value < math.inf)
AT_LEAST_1 = Rule("at least 1", lambda value: 1 <= value < math.inf)
ANY = Rule("any number", lambda value: True)  # what acts on it says more
SHARE = Rule("in [0, 1)", lambda value: 0 <= value < 1)


def option(
    default: Any,
    help: str,
    *,
    metavar: str = "N",
    rule: Rule = FINITE,
    spelled: str | None = None,
    reads: str | None = None,
) -> Any:
    """Return a field of a group.

    Args:
        default: where a command has no other one.
        help: one phrase.
        metavar: what stands for the value in the help; words with ``|`` between are the only ones allowed.
        rule: what numbers are allowed.
        spelled: the name of the option, where the field has another.
        reads: the reader of `peftc.cli.texts` that takes it as it is typed: ``amount`` as 64k, ``size_text`` as 8GB.
    """
    words = {"help": help, "metavar": metavar, "rule": rule, "spelled": spelled, "reads": reads}
    return field(default=default, metadata=words)


def spelling(each: Field[Any]) -> str:
    """Return the parameter that fills a field."""
    return each.metadata.get("spelled") or each.name


G = TypeVar("G", bound="Group")


class Group:
    """What all groups can do; ``HEADING`` is where the pages list their options."""

    HEADING: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        """Refuse numbers out of range, by a `UsageError` that names the option."""
        for each in fields(self):
            value, rule = getattr(self, each.name), each.metadata.get("rule", FINITE)
            if isinstance(value, int | float) and not rule.fits(value):
                raise UsageError(f"`--{spelling(each).replace('_', '-')}` is {value}", why=f"it has to be {rule.text}")

    @classmethod
    def of(cls: type[G], given: Mapping[str, Any], **instead: Any) -> G:
        """Return the group from the parameters of a step, some of them replaced."""
        named = {each.name: given[spelling(each)] for each in fields(cls) if spelling(each) in given}
        return cls(**named | instead)


@dataclass(frozen=True)
class Recipe(Group):
    """How to train; exactly one of the first three says how long, and minutes become steps as timed before the first.

    The rate ends at 0 unless it is ``constant``; ``wsd`` keeps it up and lets it fall over the last fifth of the steps.
    Norms and biases do not decay, and without ``dropout`` the network trains as it will run, batch norms apart. The
    held-out samples are looked at evenly spread over the steps, the last time after the last step. ``seed`` is of
    order, dropout and augmentation.
    """

    HEADING = "how to train"

    epochs: float | None = option(None, "train for N passes over the data", rule=POSITIVE)
    steps: int | None = option(None, "train for N steps", rule=AT_LEAST_1)
    minutes: float | None = option(None, "train for about N minutes", rule=POSITIVE)
    batch_size: int = option(32, "samples of one step, over all processes", rule=AT_LEAST_1)
    accumulate: int = option(1, "compute each step in N parts, to save memory", rule=AT_LEAST_1)
    learning_rate: float = option(3e-4, "highest learning rate", metavar="X", rule=POSITIVE)
    weight_decay: float = option(0.01, "weight decay of AdamW", metavar="X", rule=NOT_NEGATIVE)
    optimizer: str = option("adamw", f"what moves the weights: {', '.join(OPTIMIZERS)}", metavar="NAME")
    schedule: str = option("cosine", "how the learning rate falls", metavar="|".join(SCHEDULES))
    warmup: float = option(0.1, "share of the steps to warm up over", metavar="SHARE", rule=SHARE)
    clip: float = option(1.0, "largest norm of the gradient, 0 for none", metavar="X", rule=NOT_NEGATIVE)
    ema: float | None = option(None, "keep a moving average of the weights, with this decay", metavar="X", rule=SHARE)
    dropout: bool = option(False, "let dropout and drop-path act")
    mixed_precision: str = option("no", "number format to multiply in", metavar="no|bf16|fp16")
    evaluations: int = option(5, "measure held-out samples N times", rule=AT_LEAST_1)
    early_stop: int | None = option(None, "stop after N measurements in a row without a better one", rule=AT_LEAST_1)
    gradient_checkpointing: bool = option(False, "compute layers again in the backward pass, to save memory")
    compile: bool = option(False, "compile the layers by torch.compile")
    packing: bool = option(False, "join short texts to full windows, none of which sees another")
    seed: int = 0
    held_out: float = option(
        0.1, "share of the train split to hold out: it picks the best weights", metavar="SHARE", rule=SHARE
    )
    shard: bool = option(False, "cut weights, gradients and the optimizer's state over the processes")
    offload: bool = option(False, "keep what is cut in the memory of the CPU")

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and a launch that asks for what peftc does not do.

        Raises:
            UsageError: naming the option.
            PeftcError: a launcher was asked to spread the weights in a way that peftc does not know.
        """
        for kind in SPREAD:
            if _says(f"ACCELERATE_USE_{kind}"):
                raise cannot_train(kind)
        if _says("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
            hint = "add `--fsdp_version 2` to `accelerate launch`, or say `--shard` in place of its `--use_fsdp`"
            raise PeftcError("peftc trains under version 2 of FSDP alone", hint=hint)
        if self.spread and self.optimizer in UNCUT:
            what = f"`--shard` does not go with `--optimizer {self.optimizer}`"
            raise UsageError(what, why="it looks at whole weights", hint="use `--optimizer adamw`")
        if self.spread and self.mixed_precision == "fp16":
            hint = "multiply in `--mixed-precision bf16`"
            raise UsageError("`--shard` does not go with `--mixed-precision fp16`", hint=hint)
        if sum(each is not None for each in (self.epochs, self.steps, self.minutes)) != 1:
            raise UsageError("say how long to train", hint="with one of `--epochs`, `--steps` and `--minutes`")
        one_of("--optimizer", self.optimizer, OPTIMIZERS)
        one_of("--schedule", self.schedule, SCHEDULES)
        if self.early_stop is not None and self.early_stop >= self.evaluations:
            why = f"the held-out samples are looked at {self.evaluations} times after the start"
            hint = f"look more often: `--evaluations {4 * self.early_stop}`"
            raise UsageError(f"`--early-stop {self.early_stop}` cannot come true", why=why, hint=hint)
        if self.early_stop is not None and not self.held_out:
            raise UsageError("`--early-stop` needs held-out samples", hint="leave `--held-out 0` out")
        super().__post_init__()
        parts = processes.size() * self.accumulate
        if self.batch_size % parts:
            what = f"a step of {self.batch_size} samples cannot be cut into {parts} equal parts"
            why = f"{processes.size()} processes with `--accumulate {self.accumulate}` share it"
            raise UsageError(what, why=why, hint=f"choose a `--batch-size` that {parts} divides")

    @property
    def spread(self) -> bool:
        """Whether weights lie in pieces in several processes: as asked for here, or of `accelerate launch`."""
        return processes.size() > 1 and (self.shard or _says("ACCELERATE_USE_FSDP"))

    @property
    def idle(self) -> list[str]:
        """What to say where weights are to be cut and are not: a note, or none."""
        if self.spread or not (self.shard or self.offload):
            return []
        why = "there is one process" if processes.size() == 1 else "`--offload` acts with `--shard`"
        return [f"nothing is cut: {why}"]

    @property
    def offloads(self) -> bool:
        """Whether such pieces wait in the memory of the CPU."""
        return self.offload or (_says("ACCELERATE_USE_FSDP") and _says("FSDP_OFFLOAD_PARAMS"))

    def request(self) -> dict[str, Any]:
        """Return what a request says of it: what may change the result."""
        said = {name: value for name, value in asdict(self).items() if name not in NO_QUESTION}
        usual = {each.name: each.default for each in fields(self) if each.name in LATER}
        return {name: value for name, value in said.items() if value != usual.get(name, ...)}


def _says(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


NOT_STREAMED = {  # what a training from a stream cannot be asked for, and why
    "epochs": "where a stream ends is not known before it is read",
    "minutes": "steps are timed on samples that are then read again, and a stream goes one way",
    "num_samples": "`--steps` says how much is read",
    "cache_teacher": "a sample is read once, so that no answer of the teacher is asked for again",
    "cache_top": "a sample is read once, so that no answer of the teacher is asked for again",
}


def length(given: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """Return how long to train, as was asked for; ``usual`` epochs where nothing was.

    Raises:
        UsageError: the samples are read as they come, and something was asked for that needs to know all of them.
    """
    asked = {name: given[name] for name in ("epochs", "steps", "minutes")}
    if given.get("streaming"):
        for name, why in NOT_STREAMED.items():
            if given.get(name):
                spelled = name.replace("_", "-")
                raise UsageError(f"`--streaming` does not go with `--{spelled}`", why=why, hint="say `--steps N`")
        if given["steps"] is None:
            why = "a stream has no epoch of known length"
            raise UsageError("`--streaming` does not say how long to train", why=why, hint="say `--steps N`")
    return asked if any(each is not None for each in asked.values()) else {**asked, "epochs": usual}


def cannot_train(kind: str) -> PeftcError:
    """Return the refusal of a way to spread a training over processes."""
    return PeftcError(
        f"peftc does not train under {kind} yet",
        why="its checkpoints and its optimizer are torch's own",
        hint="cut the weights by torch's FSDP: `accelerate launch --num_processes N -m peftc ... --shard`",
    )


@dataclass(frozen=True)
class Augment(Group):
    """What happens to images that are learnt from.

    ``crop`` takes a random part and mirrors half of them; a policy of timm's acts after that. The alphas are of the
    share that the other image of a pair gets (Zhang et al., 2018, arXiv 1710.09412; Yun et al., 2019, arXiv
    1905.04899); 0 mixes none.
    """

    HEADING = "how to train"

    policy: str | None = option(
        None, "change images at random: crop, or a policy of timm", metavar="POLICY", spelled="augment"
    )
    mixup: float = option(0.0, "mix images in pairs", metavar="ALPHA", rule=NOT_NEGATIVE)
    cutmix: float = option(0.0, "paste parts of images into others", metavar="ALPHA", rule=NOT_NEGATIVE)

    def __bool__(self) -> bool:
        """Whether anything happens at all."""
        return bool(self.policy or self.mixup or self.cutmix)


@dataclass(frozen=True)
class Windows(Group):
    """How a text is cut for a causal language model, so that a perplexity can stand beside others of the field.

    ``gptq`` is the protocol of the scripts of GPTQ, SparseGPT and SVD-LLM: rows joined by two new lines, windows of
    2,048 tokens, every token of a window but the first foretold, and the mean over tokens. A window begins with what
    the tokenizer puts before a text, as the model was trained; with ``text`` the whole text alone does, as there.
    """

    HEADING = "what to measure on"

    protocol: str | None = option(None, "cut text as published perplexities do", metavar="gptq")
    first_token: str = option("window", "what begins as the tokenizer begins a text", metavar="window|text")
    stride: int | None = option(None, "move each window of text on by N tokens", rule=AT_LEAST_1)

    def __post_init__(self) -> None:
        """Refuse words that are not known, as Python may give them, and numbers out of range (UsageError)."""
        super().__post_init__()
        one_of("--first-token", self.first_token, FIRST_TOKENS)
        if self.protocol is not None:
            one_of("--protocol", self.protocol, PROTOCOLS)

    def asked(self) -> list[str]:
        """Return the options that were given, as they are typed."""
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        return [f"--{name.replace('_', '-')}" for name in given]


@dataclass(frozen=True)
class Reading(Group):
    """How to read samples; ``seed`` is of the choice of some, of masks and of drawn text."""

    HEADING = "what to measure on"

    task: str | None = option(None, "what the model is for (default: guessed)", metavar="TASK")
    num_samples: int | None = option(None, "use N samples", rule=AT_LEAST_1)
    image_size: int | None = option(None, "height and width of images", metavar="PIXELS", rule=AT_LEAST_1)
    max_length: int | None = option(None, "longest text", metavar="TOKENS", rule=AT_LEAST_1)
    image_column: str | None = option(None, "column of images (default: guessed)", metavar="NAME")
    text_column: str | None = option(None, "column of text (default: guessed)", metavar="NAME")
    label_column: str | None = option(None, "column of labels (default: guessed)", metavar="NAME")
    streaming: bool = option(False, "read a data set of the hub as it comes, keeping no copy")
    workers: int | None = option(None, "processes that read samples ahead (default: as many as pay)", rule=NOT_NEGATIVE)
    seed: int = 0
    windows: Windows = Windows()
    packed: bool = False  # texts are joined to windows in which none sees another

    def parameters(self) -> dict[str, Any]:
        """Return it as the parameters of a step that reads the same samples."""
        own = ("windows", "packed")
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in own}

    def request(self) -> dict[str, Any]:
        """Return what a request says of it; columns stand in its data, and the seed on its own."""
        said = {name: getattr(self, name) for name in ("task", "image_size", "max_length", "num_samples")}
        return {**said, **({"streaming": True} if self.streaming else {})}


@dataclass(frozen=True)
class Budgets(Group):
    """How much to keep, one of these; as a number, or as the text that was typed, so that 2/3 stays exact."""

    HEADING = "how much to keep: one of these"

    ratio: str | float | None = option(
        None, "share of the weights to keep, as 0.5 or 2/3", metavar="RATIO", reads="share_text", rule=ANY
    )
    rank: int | None = option(None, "the same rank everywhere", metavar="RANK", rule=ANY)
    energy: str | float | None = option(
        None, "share of the squared singular values to keep", metavar="SHARE", reads="share_text", rule=ANY
    )
    target_params: int | float | None = option(None, "parameters of the whole result, as 22M", reads="amount", rule=ANY)
    target_macs: int | float | None = option(
        None, "multiply-adds of the whole result, as 4.6G", reads="amount", rule=ANY
    )
    speedup: str | float | None = option(
        None, "how many times faster, as measured here, as 1.5", metavar="X", reads="above_one_text", rule=ANY
    )


@dataclass(frozen=True)
class Calibration(Group):
    """How many samples statistics are collected on, and within how much memory.

    Image patches count as tokens, padding does not. ``max_memory`` is of anonymous memory, those of Python and its
    libraries included and what is mapped from files apart, or of the device.
    """

    HEADING = "what to measure on"

    calibration_samples: int = option(512, "calibrate on at most N samples", rule=AT_LEAST_1)
    calibration_tokens: int | float | None = option(
        None, "calibrate on about N tokens or patches, as 64k", rule=AT_LEAST_1, reads="amount"
    )
    max_memory: str | float | None = option(
        None, "calibrate and factor within this much memory, as 8GB", metavar="SIZE", reads="size_text"
    )


@dataclass(frozen=True)
class Gates(Group):
    """What quality has to be: a step whose result is not as good ends with exit code 3."""

    HEADING = "gates: exit 3 where they are not met"

    max_drop: float | None = option(None, "gate: largest loss of quality, in the unit of the metric", metavar="X")
    min_quality: float | None = option(None, "gate: least quality, in the unit of the metric", metavar="X")

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.max_drop is not None or self.min_quality is not None
