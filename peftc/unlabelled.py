"""Samples without labels as a model reads them, and a loss towards what the model itself would predict of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftc import tasks
from peftc.data.dataset import Dataset
from peftc.data.tokens import tokenise
from peftc.errors import DataError
from peftc.tasks import Batch, Encoded, Settings, Task

if TYPE_CHECKING:
    from peftc.models.load import Model


def encode(model: Model, data: Dataset, task: Task | None, settings: Settings) -> Encoded:
    """Return samples as inputs of the model; labels, where there are any, are not looked at.

    Args:
        model: that will read them.
        data: images, tensors, texts or pairs; for a language model the texts are joined and cut into windows.
        task: of the model; None where nothing tells it.
        settings: size, length, number and seed.

    Raises:
        DataError: the model cannot read such data.
    """
    if task is not None and task.name.endswith("-lm"):
        return task.encode(model, data, settings)
    if data.kind in ("image", "tensor") and model.kind in ("image", "other"):
        blank = replace(data, labels=dict.fromkeys(data.rows, 0), classes=[""])  # type: ignore[arg-type]
        return tasks.TASKS["image-classification"].encode(model, blank, settings)
    if data.kind in ("text", "pairs") and model.kind == "text":
        return _texts(model, data, task, settings)
    raise DataError(
        f"`{model.name}` cannot read `{data.name}`", why=f"it reads {model.kind} inputs, and the data holds {data.kind}"
    )


def _texts(model: Model, data: Dataset, task: Task | None, settings: Settings) -> Encoded:
    """Tokenise texts one by one; of a pair, a classifier reads both at once and any other model one after the other."""
    samples: list[Any] = [data[index][0] for index in range(len(data))]
    joined = task is not None and task.name == "text-classification"
    texts = samples if joined or data.kind == "text" else [text for pair in samples for text in pair]
    if settings.num_samples is not None:
        texts = texts[: settings.num_samples]
    tokens = tokenise(model, texts, settings.max_length)

    def batch(indices: Any) -> Batch:
        return Batch(tokens.pad(list(indices)), torch.zeros(len(indices)))

    return Encoded(len(texts), batch, key=tokens.digest, lengths=tokens.lengths)


def loss_of_own_prediction(
    task: Task | None,
    outputs: Tensor,
    inputs: Mapping[str, Tensor] | Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Return a scalar whose gradient, squared and averaged over draws, is the Fisher information; a sum over samples.

    A class or token is drawn from the model's own distribution and its negative log-likelihood taken (Martens and
    Grosse, 2015, section 2.2: not the "empirical" Fisher of given labels, and no label is needed). A model that gives
    vectors is read as a Gaussian of unit variance around them, for sentences around the normalised mean over tokens.

    Args:
        task: tells what the outputs are; None means vectors.
        outputs: (batch, classes), (batch, tokens, vocabulary), or vectors.
        inputs: of the batch; ``attention_mask`` says which tokens count.
        generators: one per sample, so that what is drawn depends on no other; on the CPU, the same for every device.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    outputs = outputs.float()
    if task is not None and (task.has_classes or task.name.endswith("-lm")):
        total = outputs.new_zeros(())
        for index, (scores, generator) in enumerate(zip(outputs, generators, strict=True)):
            rows = scores.reshape(-1, scores.shape[-1])
            if mask is not None and outputs.ndim == 3:
                rows = rows[mask[index].bool()]
            drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(rows.device)
            total = total + F.cross_entropy(rows, drawn, reduction="sum")
        return total
    if outputs.ndim == 3 and mask is not None:
        weights = mask[..., None].float()
        outputs = F.normalize((outputs * weights).sum(1) / weights.sum(1).clamp_min(1), dim=1)
    drawn = torch.stack([torch.randn(outputs.shape[1:], generator=generator) for generator in generators])
    return (outputs * drawn.to(outputs.device)).sum()
