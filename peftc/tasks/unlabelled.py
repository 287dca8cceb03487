"""Samples without labels as a model reads them, and a loss towards what the model itself would predict of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from peftc.data.dataset import Dataset
from peftc.errors import DataError
from peftc.models.inputs import mask_of_outputs
from peftc.models.model import Model
from peftc.nn.vocabulary import Logits, Unread, differ, pulls, tiles_of
from peftc.options import Reading
from peftc.tasks.sentences import encode_texts, sentence_vectors
from peftc.tasks.table import TASKS
from peftc.tasks.task import Encoded, Task

BLOCK = 1 << 22  # scores that are worked on at once


def encode(model: Model, data: Dataset, task: Task | None, settings: Reading) -> Encoded:
    """Return samples as inputs of the model; labels, where there are any, are not looked at.

    Args:
        model: that will read them (DataError: it cannot).
        data: images, tensors, texts, pairs of texts, or images with captions; for a language model the texts are
            joined and cut into windows. Of a pair of texts, a classifier reads both at once and any other model one
            after the other.
        task: of the model; None where nothing tells it.
        settings: size, length, number and seed.
    """
    if task is not None and (task.is_language or (data.kind == "image-text" and data.kind in task.reads)):
        return task.encode(model, data, settings)
    if data.kind in ("image", "tensor") and model.kind in ("image", "other"):
        blank = replace(data, labels=dict.fromkeys(data.rows, 0), classes=[""])  # type: ignore[arg-type]
        return TASKS["image-classification"].encode(model, blank, settings)
    if data.kind in ("text", "pairs") and model.kind == "text":
        joined = data.kind == "text" or (task is not None and task.name == "text-classification")
        texts = data.inputs() if joined else data.halves()
        if settings.num_samples is not None:
            texts = replace(texts, size=min(len(texts), max(0, settings.num_samples)))
        encoded = encode_texts(model, settings, data, texts, torch.zeros(len(texts)))
        return replace(encoded, notes=[])
    why = f"it reads {model.kind} inputs, and the data holds {data.kind}"
    raise DataError(f"`{model.name}` cannot read `{data.name}`", why=why)


def loss_of_own_prediction(
    task: Task | None, outputs: Tensor, inputs: Mapping[str, Tensor] | Tensor, generators: Sequence[torch.Generator]
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
    mask = mask_of_outputs(inputs)
    outputs = outputs.float()
    if _has_classes(task):
        total = outputs.new_zeros(())
        for index, (scores, generator) in enumerate(zip(outputs, generators, strict=True)):
            rows = scores.reshape(-1, scores.shape[-1])
            if mask is not None and outputs.ndim == 3:
                rows = rows[mask[index].bool()]
            drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(rows.device)
            total = total + F.cross_entropy(rows, drawn, reduction="sum")
        return total
    outputs = _vectors(outputs, mask)
    drawn = torch.stack([torch.randn(outputs.shape[1:], generator=generator) for generator in generators])
    return (outputs * drawn.to(outputs.device)).sum()


def pulls_of_own_prediction(
    outputs: Unread, inputs: Mapping[str, Tensor] | Tensor, generators: Sequence[torch.Generator], draws: int
) -> list[Tensor]:
    """Return for each draw the gradient of `loss_of_own_prediction` with respect to what the head reads.

    Args:
        outputs: (batch, tokens, vocabulary), of a language model.
        inputs, generators: as there.
        draws: how many.
    """
    batch, tokens, words = outputs.shape
    chances = [torch.rand(tokens, tiles_of(words), draws, generator=each) for each in generators]
    mask = mask_of_outputs(inputs)
    found = [each.view(batch, tokens, -1) for each in pulls(outputs.flat(), torch.cat(chances))]
    return found if mask is None else [each * mask.to(each.device)[..., None] for each in found]


def divergence(task: Task | None, reference: Logits, outputs: Logits, inputs: Mapping[str, Tensor] | Tensor) -> Tensor:
    """Return (batch,) divergences from the reference's outputs, in nats per sample; what `kfac` predicts.

    Of classes and tokens the Kullback-Leibler divergence, summed over a sample's tokens; of vectors half the squared
    distance, the divergence of two Gaussians of unit variance.

    Args:
        task, inputs: as for `loss_of_own_prediction`.
        reference, outputs: (batch, classes), (batch, tokens, vocabulary), or vectors; of a language model they may be
            unread, and of some of the tokens only, which then stand for all.
    """
    mask = mask_of_outputs(inputs)
    mask = None if mask is None else mask.to(outputs.device)
    if isinstance(reference, Unread) and isinstance(outputs, Unread):
        each = differ(reference.flat(), outputs.flat())[0].view(outputs.shape[:-1])
        if mask is None or mask.shape != each.shape:
            return each.mean(1) * (each.shape[1] if mask is None else mask.shape[1])
        return (each * mask).sum(1)
    assert isinstance(reference, Tensor) and isinstance(outputs, Tensor)
    if _has_classes(task):
        rows = max(1, BLOCK // outputs.shape[-1])  # in float64 at once: of a large vocabulary all would take much
        parts = []
        for some in zip(reference.flatten(0, -2).split(rows), outputs.flatten(0, -2).split(rows), strict=True):
            p, q = (scores.double().log_softmax(-1) for scores in some)
            parts.append((p.exp() * (p - q)).sum(-1))
        each = torch.cat(parts).view(outputs.shape[:-1])
        return (each if mask is None or each.ndim == 1 else each * mask).reshape(len(each), -1).sum(1)
    one, other = (_vectors(each.double(), mask) for each in (reference, outputs))
    return (one - other).square().flatten(1).sum(1) / 2


def _has_classes(task: Task | None) -> bool:
    return task is not None and (task.has_classes or task.is_language)


def _vectors(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return what of the outputs matters: of tokens their normalised mean (batch, width)."""
    return outputs if outputs.ndim != 3 or mask is None else sentence_vectors(outputs, mask)
