"""What a model is for: one row per task, from samples to inputs, to figures per sample, to metrics."""

from collections.abc import Mapping
from functools import partial
from operator import itemgetter

from peftc.data.dataset import Dataset
from peftc.errors import DataError, one_of
from peftc.models import unread
from peftc.models.model import Model
from peftc.tasks import objectives, retrieval
from peftc.tasks.classes import compare_classes, encode_classified, is_hit, macro_f1, observe_classes
from peftc.tasks.images import encode_images
from peftc.tasks.language import compare_tokens, encode_causal, encode_masked, nll, observe_tokens, perplexity
from peftc.tasks.sentences import encode_pairs, observe_pairs, spearman
from peftc.tasks.task import Metric, Task

_FEWER = (Metric("perplexity", perplexity, higher_is_better=False), Metric("nll", nll, higher_is_better=False))
_TOP = (Metric("top1", is_hit, True), Metric("top5", itemgetter("in_five"), True, column="in_five"))
_ACCURACY = (Metric("accuracy", is_hit, True), Metric("f1", macro_f1, to_one=True))
_SPEARMAN = (Metric("spearman", spearman, to_one=True),)
_classes = partial(Task, observe=observe_classes, compare=compare_classes, batch_size=32, objective=objectives.classes)
_of_tokens = partial(Task, observe=observe_tokens, compare=compare_tokens, objective=objectives.tokens)
_windows = partial(_of_tokens, batch_size=8, metrics=_FEWER, run=unread.of_batch, is_language=True)
_ROWS = (
    _classes("image-classification", ("image", "tensor"), ("ForImageClassification",), encode_images, metrics=_TOP),
    _classes(
        "text-classification", ("text", "pairs"), ("ForSequenceClassification",), encode_classified, metrics=_ACCURACY
    ),
    _windows("masked-lm", ("text",), ("ForMaskedLM",), encode_masked),
    _windows("causal-lm", ("text", "tensor"), ("ForCausalLM", "LMHeadModel"), encode_causal),
    retrieval.TASK,  # before the next, whose ending is that of every bare model
    Task(
        "sentence-similarity",
        ("pairs",),
        ("Model",),
        encode_pairs,
        observe_pairs,
        _SPEARMAN,
        32,
        objective=objectives.pairs,
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ROWS}
HOLDS = {
    "image": "images",
    "text": "single texts",
    "pairs": "pairs of texts",
    "tensor": "tensors",
    "image-text": "pairs of an image and a text",
}


def guess(model: Model) -> Task | None:
    """Return the task that a model was made for, as its library and class tell; None where they say nothing."""
    if model.library == "timm" or (model.library == "python" and model.kind == "image"):
        return TASKS["image-classification"]
    if model.library != "transformers":
        return None
    known = [*(model.config.get("architectures") or []), type(model.module).__name__]
    for task in TASKS.values():
        if any(known[0].endswith(ending) for ending in task.architectures):
            return task if task.name != "sentence-similarity" or model.kind == "text" else None
    return None


def told_by(model: Model) -> str:
    """Return in words what of a model `guess` looks at."""
    if model.library == "timm":
        return f"the architecture `{model.architecture}` of timm"
    known = model.config.get("architectures") or [type(model.module).__name__]
    return f"the class `{known[0]}`"


def task_of(model: Model, name: str | None) -> Task | None:
    """Return the task that `--task` names, else the one that the model tells; None where nothing does."""
    if not name:
        return guess(model)
    one_of("--task", name, list(TASKS))
    return TASKS[name]


def fitting(task: Task, data: Dataset) -> Task:
    """Return the task where it can read the data (DataError: it reads another kind)."""
    if data.kind in task.reads:
        return task
    why = f"it reads {' or '.join(HOLDS[kind] for kind in task.reads)}, and the data holds {HOLDS[data.kind]}"
    hint = f"choose other data or columns (`--data 'FILE?text=NAME'`), or another `--task`: {', '.join(TASKS)}"
    raise DataError(f"`{task.name}` cannot be evaluated on `{data.name}`", why=why, hint=hint)
