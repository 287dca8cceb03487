"""What a model is for: one row per task, from samples to inputs, to figures per sample, to metrics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftc import retrieval
from peftc.data.dataset import Dataset
from peftc.data.images import reader
from peftc.data.tokens import IGNORED, cut, ids_of, joined, masked, tokenise, window, windows_of
from peftc.errors import DataError, UsageError, one_of, reason_of
from peftc.models.place import moved, place_of
from peftc.models.tokenizer import tokenizer_of
from peftc.task import Batch, Columns, Encoded, Metric, Settings, Task

if TYPE_CHECKING:
    from peftc.models.model import Model

__all__ = [
    "TASKS", "Batch", "Columns", "Encoded", "Metric", "Settings", "Task", "fitting", "guess", "macro_f1", "named_task",
    "sentence_vectors", "spearman",
]  # fmt: skip


LABELS = "name the column of labels: `--data '{}?label=NAME'`"


# images


def _encode_images(model: Model, data: Dataset, settings: Settings) -> Encoded:
    _need_classes(data, "image-classification")
    labels = data.labels or []
    _fixed_size(model, settings.image_size)
    pixels = reader(data, model.preprocess, settings.image_size)

    def batch(indices: Sequence[int]) -> Batch:
        return Batch(pixels(indices), torch.tensor([labels[data.rows[index]] for index in indices]))

    if data.kind == "tensor" or settings.image_size is not None:
        _refuse_shape(model, pixels([0]), data.name)
    return Encoded(len(data), batch, key=f"{sorted(model.preprocess.items(), key=str)} {settings.image_size}")


def _refuse_shape(model: Model, sample: Tensor, name: str) -> None:
    """Refuse inputs that are not as the model itself asks for, where it does not run on the first of them."""
    from peftc.models import inputs

    if model.module.training or place_of(model.module).type == "meta":
        return
    try:
        with torch.no_grad():
            inputs.forward(model, moved(model, sample))
    except inputs.DOES_NOT_RUN as error:
        if "memory" in str(error):
            raise
        why = f"it does not run on one of shape {list(sample.shape[1:])}: {reason_of(error)}"
        raise DataError(f"`{model.name}` does not take the samples of `{name}`", why=why) from error


def _fixed_size(model: Model, image_size: int | None) -> None:
    size = model.preprocess.get("input_size")
    fixed = model.config.get("pretrained_cfg", {}).get("fixed_input_size", False)
    fixed = fixed and not (model.config.get("model_args") or {}).get("dynamic_img_size")
    if image_size is not None and image_size < 1:
        raise UsageError(f"`--image-size` is {image_size}", why="images have at least one pixel")
    if image_size is not None and size and fixed and list(size[1:]) != [image_size] * 2:
        raise DataError(
            f"`{model.name}` reads images of {size[1]} x {size[2]} only", why=f"`--image-size` asks for {image_size}"
        )


def _need_classes(data: Dataset, task: str) -> None:
    if data.labels is None or data.classes is None:
        column = "no label column of a usual name"
        none = f"it has no class folders and {column}" if data.kind == "image" else f"it has {column}"
        why = none if data.labels is None else "its labels are scores"
        raise DataError(
            f"`{task}` needs a class for each sample of `{data.name}`",
            why=why,
            hint=LABELS.format(data.name),
        )


# text


def _encode_texts(model: Model, data: Dataset, settings: Settings, texts: list[list[Any]], labels: Tensor) -> Encoded:
    """Tokenise texts: ``texts[i]`` holds the rows of the batch that sample i makes."""
    width = len(texts[0])
    tokens = tokenise(model, [text for rows in texts for text in rows], settings.max_length)

    def batch(indices: Sequence[int]) -> Batch:
        padded = tokens.pad([index * width + at for index in indices for at in range(width)])
        return Batch(padded, labels[torch.tensor(list(indices))])

    lengths = [max(tokens.lengths[at : at + width]) for at in range(0, len(tokens.lengths), width)]
    full = sum(length == tokens.limit for length in lengths)
    notes = [f"data: {full} samples reach {tokens.limit} tokens and may be cut there"] if full else []
    return Encoded(len(texts), batch, key=tokens.digest, lengths=lengths, notes=notes)


def _encode_classified(model: Model, data: Dataset, settings: Settings) -> Encoded:
    _need_classes(data, "text-classification")
    samples = [data[index] for index in range(len(data))]
    return _encode_texts(
        model, data, settings, [[text] for text, _ in samples], torch.tensor([label for _, label in samples])
    )


def _encode_pairs(model: Model, data: Dataset, settings: Settings) -> Encoded:
    if data.labels is None or data.classes is not None:
        raise DataError(
            f"`sentence-similarity` needs a score for each pair of `{data.name}`",
            hint=LABELS.format(data.name),
        )
    samples = [data[index] for index in range(len(data))]
    scores = torch.tensor([score for _, score in samples], dtype=torch.float64)
    if len(samples) < 3 or len(scores.unique()) < 2:
        raise DataError(
            f"`{data.name}` has too few scores to rank",
            why=f"{len(samples)} pairs with {len(scores.unique())} different scores",
        )
    return _encode_texts(model, data, settings, [list(pair) for pair, _ in samples], scores)


def _encode_causal(model: Model, data: Dataset, settings: Settings) -> Encoded:
    if data.kind == "tensor":
        windows = torch.stack([data[index][0] for index in range(len(data))])
        note = f"data: windows of {windows.shape[1]} tokens, the first of each given"
    else:
        windows, note = windows_of(
            model, data, max_length=settings.max_length, num_samples=settings.num_samples, seed=settings.seed
        )

    def batch(indices: Sequence[int]) -> Batch:
        tokens = windows[list(indices)]
        targets = tokens.roll(-1, 1)
        targets[:, -1] = IGNORED
        return Batch({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, targets)

    return Encoded(len(windows), batch, key=_key(windows), notes=[note])


def _encode_masked(model: Model, data: Dataset, settings: Settings) -> Encoded:
    tokenizer = tokenizer_of(model)
    length = window(model, settings.max_length, tokenizer, least=3)
    ids = ids_of(model, tokenizer, joined(data), add_special_tokens=False)
    inner = cut(data.name, ids, length - 2, number=settings.num_samples, seed=settings.seed)
    tokens, targets = masked(inner, tokenizer, seed=settings.seed)

    def batch(indices: Sequence[int]) -> Batch:
        rows = list(indices)
        return Batch({"input_ids": tokens[rows], "attention_mask": torch.ones_like(tokens[rows])}, targets[rows])

    number = int((targets[0] != IGNORED).sum())
    note = f"data: windows of {tokens.shape[1]} tokens, {number} of them masked in each"
    return Encoded(len(tokens), batch, key=_key(tokens), notes=[note])


def _key(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


# figures per sample


def _observe_classes(logits: Tensor, batch: Batch) -> Columns:
    targets = batch.targets.to(logits.device)
    columns = {"label": targets, "predicted": logits.argmax(1)}
    if logits.shape[1] > 5:
        columns["in_five"] = (logits.topk(5, 1).indices == targets[:, None]).any(1)
    return {name: value.cpu().numpy() for name, value in columns.items()}


def _observe_pairs(hidden: Tensor, batch: Batch) -> Columns:
    """Mean-pool over the attention mask, normalise, and take the cosine of each pair (Reimers and Gurevych, 2019)."""
    if hidden.ndim != 3 or not isinstance(batch.inputs, dict):
        raise DataError(
            f"the model gives outputs of shape {list(hidden.shape)}, not one vector per token",
            hint="choose another `--task`",
        )
    mask = batch.inputs["attention_mask"].to(hidden.device)
    vectors = sentence_vectors(hidden.float(), mask).view(len(batch.targets), 2, -1)
    cosine = (vectors[:, 0].double() * vectors[:, 1].double()).sum(1)
    return {"cosine": cosine.cpu().numpy(), "score": batch.targets.numpy()}


def sentence_vectors(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (batch, width): the normalised mean of (batch, tokens, width) over the tokens that a mask keeps."""
    weights = mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp_min(1), dim=1)


def _observe_tokens(logits: Tensor, batch: Batch) -> Columns:
    sums = []
    for row, targets in zip(logits, batch.targets.to(logits.device), strict=True):
        kept = targets != IGNORED
        nll = torch.nn.functional.cross_entropy(row[kept].float(), targets[kept], reduction="none")
        sums.append((nll.double().sum().item(), int(kept.sum())))
    return _columns(("nll", "tokens"), sums)


def _compare_classes(reference: Tensor, logits: Tensor, batch: Batch) -> Columns:
    return _columns(
        ("kl", "same", "count"),
        [(*pair, 1) for pair in zip(*(t.tolist() for t in _differ(reference, logits)), strict=True)],
    )


def _compare_tokens(reference: Tensor, logits: Tensor, batch: Batch) -> Columns:
    sums = []
    for one, other, targets in zip(reference, logits, batch.targets.to(logits.device), strict=True):
        kept = targets != IGNORED
        divergence, same = _differ(one[kept], other[kept])
        sums.append((divergence.sum().item(), same.sum().item(), int(kept.sum())))
    return _columns(("kl", "same", "count"), sums)


def _differ(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(reference || model) in nats and whether the first choice agrees; (rows, classes) to (rows,) each."""
    p, q = (tensor.float().log_softmax(1).double() for tensor in (reference.to(logits.device), logits))
    return (p.exp() * (p - q)).sum(1).clamp_min(0), reference.to(logits.device).argmax(1) == logits.argmax(1)


def _columns(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Columns:
    return {
        name: np.array(values, dtype=np.float64) for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }


# metrics


def _is_hit(columns: Columns) -> np.ndarray:
    return columns["label"] == columns["predicted"]


def _is_in_five(columns: Columns) -> np.ndarray:
    return columns["in_five"]


def macro_f1(columns: Columns) -> float:
    """Return the mean F1 over the classes that occur as a label or as a prediction."""
    label, predicted = columns["label"], columns["predicted"]
    size = int(max(label.max(), predicted.max())) + 1
    hits = np.bincount(label[label == predicted], minlength=size)
    seen = np.bincount(label, minlength=size) + np.bincount(predicted, minlength=size)
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def spearman(columns: Columns) -> float:
    """Return the correlation of the ranks of cosines and scores; NaN where either is constant."""
    one, other = (ranks - ranks.mean() for ranks in map(_ranks, (columns["cosine"], columns["score"])))
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank values from 1, equal ones sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def _nll(columns: Columns) -> float:
    return float(columns["nll"].sum() / columns["tokens"].sum())


def _perplexity(columns: Columns) -> float:
    return math.exp(min(_nll(columns), 700))  # e**710 overflows; the nll beside it stays exact


_PERPLEXITY = (
    Metric("perplexity", _perplexity, higher_is_better=False),
    Metric("nll", _nll, higher_is_better=False),
)

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "image-classification", ("image", "tensor"), ("ForImageClassification",), _encode_images, _observe_classes,
            (Metric("top1", _is_hit, True), Metric("top5", _is_in_five, True, column="in_five")), 32, _compare_classes,
        ),
        Task(
            "text-classification", ("text", "pairs"), ("ForSequenceClassification",), _encode_classified,
            _observe_classes, (Metric("accuracy", _is_hit, True), Metric("f1", macro_f1)), 32, _compare_classes,
        ),
        Task(
            "masked-lm", ("text",), ("ForMaskedLM",), _encode_masked, _observe_tokens, _PERPLEXITY, 8, _compare_tokens,
        ),
        Task(
            "causal-lm", ("text", "tensor"), ("ForCausalLM", "LMHeadModel"), _encode_causal, _observe_tokens,
            _PERPLEXITY, 8, _compare_tokens,
        ),
        retrieval.TASK,  # before the next, whose ending is that of every bare model
        Task(
            "sentence-similarity", ("pairs",), ("Model",), _encode_pairs, _observe_pairs,
            (Metric("spearman", spearman),), 32,
        ),
    )
}  # fmt: skip


def named_task(name: str) -> Task:
    """Return the row that `--task` names."""
    one_of("--task", name, list(TASKS))
    return TASKS[name]


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


def digest_of(task: Task | None, data: Dataset, encoded: Encoded) -> str:
    """Return what identifies samples: their content, and of windows of text the tokens in each, too."""
    if task is None or not task.name.endswith("-lm"):
        return data.digest
    return hashlib.sha256(f"{data.digest} {encoded.key}".encode()).hexdigest()


def fitting(task: Task, data: Dataset) -> Task:
    """Return the task where it can read the data.

    Raises:
        DataError: it reads another kind.
    """
    if data.kind in task.reads:
        return task
    holds = {
        "image": "images", "text": "single texts", "pairs": "pairs of texts", "tensor": "tensors",
        "image-text": "pairs of an image and a text",
    }  # fmt: skip
    raise DataError(
        f"`{task.name}` cannot be evaluated on `{data.name}`",
        why=f"it reads {' or '.join(holds[kind] for kind in task.reads)}, and the data holds {holds[data.kind]}",
        hint=f"choose other data or columns (`--data 'FILE?text=NAME'`), or another `--task`: {', '.join(TASKS)}",
    )
