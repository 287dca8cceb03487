"""Classes: samples with one label each, what a model says of them, and how often it is right."""

import numpy as np
import torch
from torch import Tensor

from peftc.data.dataset import Dataset
from peftc.data.spec import naming
from peftc.errors import DataError
from peftc.models.model import Model
from peftc.nn.vocabulary import differ
from peftc.options import Reading
from peftc.tasks.sentences import encode_texts
from peftc.tasks.task import Batch, Columns, Encoded


def need_classes(data: Dataset, task: str) -> None:
    """Refuse samples without a class each (DataError: with why there is none)."""
    if data.labels is None or data.classes is None:
        column = "no label column of a usual name"
        none = f"it has no class folders and {column}" if data.kind == "image" else f"it has {column}"
        why = none if data.labels is None else "its labels are scores"
        what = f"`{task}` needs a class for each sample of `{data.name}`"
        raise DataError(what, why=why, hint=f"name the column of labels: {naming(data.name, 'label')}")


def encode_classified(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return texts, or pairs that one input joins, with their classes."""
    need_classes(data, "text-classification")
    labels = data.labels or []
    return encode_texts(model, settings, data, data.inputs(), torch.tensor([labels[row] for row in data.rows]))


def observe_classes(logits: Tensor, batch: Batch) -> Columns:
    """Return label and prediction of each sample, and of more than five classes whether it is among the first five."""
    targets = batch.targets.to(logits.device)
    columns = {"label": targets, "predicted": logits.argmax(1)}
    if logits.shape[1] > 5:
        columns["in_five"] = (logits.topk(5, 1).indices == targets[:, None]).any(1)
    return {name: value.cpu().numpy() for name, value in columns.items()}


def compare_classes(reference: Tensor, logits: Tensor, batch: Batch) -> Columns:
    """Return divergence and agreement of each sample."""
    divergences, same = (each.double().cpu().numpy() for each in differ(reference, logits))
    return {"kl": divergences, "same": same, "count": np.ones_like(same)}


def is_hit(columns: Columns) -> np.ndarray:
    """Return whether each prediction is the label."""
    return columns["label"] == columns["predicted"]


def macro_f1(columns: Columns) -> float:
    """Return the mean F1 over the classes that occur as a label or as a prediction."""
    label, predicted = columns["label"], columns["predicted"]
    size = int(max(label.max(), predicted.max())) + 1
    hits = np.bincount(label[label == predicted], minlength=size)
    seen = np.bincount(label, minlength=size) + np.bincount(predicted, minlength=size)
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())
