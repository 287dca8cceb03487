"""What was perhaps meant by a word that is not known: other tools' words, beginnings, and words a few letters off."""

import re
from typing import Any

from typer import BadParameter
from typer._click.exceptions import (  # typer exports no base class
    BadOptionUsage,
    ClickException,
    MissingParameter,
    NoSuchOption,
)

from peftc.errors import UsageError, nearest
from peftc.project import config


class Misread(BadParameter):
    """A value that cannot be read, and what was perhaps meant."""

    def __init__(self, message: str, meant: str | None) -> None:
        super().__init__(message)
        self.meant = meant


def _table(text: str) -> dict[str, list[str]]:
    """Return each word of the left side of some lines -> the right sides, first come first tried."""
    found: dict[str, list[str]] = {}
    for line in text.strip().splitlines():
        words, _, meant = line.partition(" > ")
        for word in words.split():
            found.setdefault(word, []).append(meant.strip())
    return found


QUANTIZE = "`peftc export MODEL --format onnx --set quantize=int8`"
COMMANDS = _table("""\
    compress shrink factorize factorise factor svd low-rank lowrank > decompose
    prune pruning drop drop-layers prune-layer > prune-layers
    train training fine-tune tune sft lora adapt > finetune
    heal kd distillation > distill
    eval test score accuracy validate perplexity ppl > evaluate
    benchmark speed profile latency time flops > bench
    convert onnx save executorch > export
    info inspect describe cat > show
    diff > compare
    html dashboard > report
    doctor version versions debug > env
    quickstart tutorial example > demo
    new create project > init
    fuse merge-lora > merge
    list > methods
""")
OPTIONS = _table("""\
    lr learning-rates > learning-rate
    wd decay > weight-decay
    bs batch batchsize per-device-train-batch-size > batch-size
    out output output-path output-folder save-to > output-dir
    epoch num-epochs num-train-epochs > epochs
    max-steps num-steps iterations iters > steps
    dataset datasets train-data dataset-name > data
    samples nsamples n-samples limit max-samples > num-samples
    nsamples calib-samples > calibration-samples
    seqlen seq-len max-seq-len max-seq-length context-length > max-length
    img-size resolution input-size > image-size
    scheduler lr-scheduler lr-scheduler-type > schedule
    optim > optimizer
    warmup-ratio > warmup
    gradient-accumulation-steps grad-accum accumulation > accumulate
    max-grad-norm grad-clip clip-grad > clip
    sparsity density keep-ratio compression compression-ratio > ratio
    params parameters num-params > target-params
    macs flops > target-macs
    force f yes > overwrite
    quantize quantization > set
    baseline reference > against
    teacher-model > teacher
    layers num-layers > keep
    precision amp > mixed-precision
    precision > dtype
""")
QUANTIZES = ("quantize", "quantise", "quantization", "quantisation", "quant", "int8", "int4", "gptq", "awq")
FEW = 2  # commands that have an option, so that their names say more than a list of all options
VALUES = _table("""\
    gpu nvidia > cuda
    metal apple > mps
    half fp16 > float16
    fp32 float full > float32
    bf16 > bfloat16
    float16 half > fp16
    bfloat16 > bf16
    none float32 fp32 > no
""")


def meant_by(word: str, known: tuple[str, ...]) -> str | None:
    """Return the value among those known that a word stands for elsewhere, or that is near it."""
    others = (each for each in VALUES.get(word.lower(), ()) if each in known)
    return next(others, None) or nearest(word, known)


def refusal(problem: ClickException) -> UsageError:
    """Say what is wrong with a command line, where the value came from, and what was meant or where to look."""
    message = problem.format_message().rstrip(".")
    ctx, param = getattr(problem, "ctx", None), getattr(problem, "param", None)
    project: config.Project | None = ctx.obj if ctx else None
    why = None
    if ctx and param and getattr(ctx.get_parameter_source(param.name), "name", "") == "DEFAULT_MAP":
        why = f"the value comes from {(project or config.Project()).origin(param.name)}"
    hint = f"`{ctx.command_path if ctx else 'peftc'} --help` lists what there is"
    if isinstance(problem, NoSuchOption):
        message, hint = f"no such option: {problem.option_name}", _of_option(ctx, problem.option_name) or hint
    elif unknown := re.match(r"No such command (['\"])(.*?)\1", message):
        message, hint = f"no such command `{unknown[2]}`", _of_command(ctx, unknown[2]) or hint
    elif isinstance(problem, Misread) and problem.meant and param:
        hint = f"did you mean `{param.opts[-1]} {problem.meant}`?"
    elif isinstance(problem, MissingParameter) and project is not None and project.file is None:
        hint += f"; `{config.INIT}` starts a project that knows"
    elif isinstance(problem, BadOptionUsage) and ctx:
        hint = f"`{ctx.command_path} --help` says what it takes"
    return UsageError(message[:1].lower() + message[1:], why=why, hint=hint)


def _of_command(ctx: Any, typed: str) -> str | None:
    word = typed.lower().replace("_", "-")
    if word in QUANTIZES:
        return f"weights become int8 on export: {QUANTIZE}"
    known = dict(ctx.command.commands) if ctx else {}
    near = next(iter(COMMANDS.get(word, ())), None) or nearest(word, list(known))
    return f"did you mean `peftc {near}`?" if near in known else None


def _of_option(ctx: Any, typed: str) -> str | None:
    word = typed.lstrip("-").lower().replace("_", "-")
    params = ctx.command.params if ctx else []
    known = {name.lstrip("-"): name for param in params for name in (*param.opts, *param.secondary_opts)}
    if word in QUANTIZES:
        return f"weights become int8 on export: {QUANTIZE}"
    if word in ("cpu", "cuda", "mps", "gpu") and "device" in known:
        return f"did you mean `--device {'cuda' if word == 'gpu' else word}`?"
    if word == "model" and any(param.param_type_name == "argument" for param in params):
        return f"MODEL stands without an option: `{ctx.command_path} MODEL`"
    setting = re.fullmatch(r"(?:lora-)?(r|rank|alpha)", word)
    if setting and ctx and ctx.command.name == "finetune":
        return f"it is a setting of the method: `--set {'alpha' if setting[1] == 'alpha' else 'rank'}=16`"
    near = next((each for each in OPTIONS.get(word, ()) if each in known), None) or nearest(word, list(known))
    return f"did you mean `{known[near]}`?" if near else _of_other_commands(ctx, typed)


def _of_other_commands(ctx: Any, typed: str) -> str | None:
    """Return which command, or two, have an option that this one has not; None where many have it."""
    commands = getattr(ctx.find_root().command, "commands", {}) if ctx else {}
    having = [name for name, each in commands.items() if any(typed in param.opts for param in each.params)]
    return f"it is an option of {', '.join(f'`{name}`' for name in having)}" if 0 < len(having) <= FEW else None
