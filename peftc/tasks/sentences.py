"""Texts one by one and in pairs: how they are read, and how near two sentences are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.data.dataset import Dataset
from peftc.data.tokens import tokenise
from peftc.errors import DataError
from peftc.models.model import Model
from peftc.options import Reading
from peftc.tasks.task import LABELS, Batch, Columns, Encoded


def encode_texts(model: Model, settings: Reading, texts: list[list[Any]], labels: Tensor) -> Encoded:
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


def encode_pairs(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return pairs of sentences with the score of each (DataError: there are none, or too few to rank)."""
    if data.labels is None or data.classes is not None:
        hint = LABELS.format(data.name)
        raise DataError(f"`sentence-similarity` needs a score for each pair of `{data.name}`", hint=hint)
    samples = [data[index] for index in range(len(data))]
    scores = torch.tensor([score for _, score in samples], dtype=torch.float64)
    if len(samples) < 3 or len(scores.unique()) < 2:
        why = f"{len(samples)} pairs with {len(scores.unique())} different scores"
        raise DataError(f"`{data.name}` has too few scores to rank", why=why)
    return encode_texts(model, settings, [list(pair) for pair, _ in samples], scores)


def observe_pairs(hidden: Tensor, batch: Batch) -> Columns:
    """Mean-pool over the attention mask, normalise, and take the cosine of each pair (Reimers and Gurevych, 2019)."""
    if hidden.ndim != 3 or not isinstance(batch.inputs, dict):
        hint = "choose another `--task`"
        raise DataError(f"the model gives outputs of shape {list(hidden.shape)}, not one vector per token", hint=hint)
    mask = batch.inputs["attention_mask"].to(hidden.device)
    vectors = sentence_vectors(hidden.float(), mask).view(len(batch.targets), 2, -1)
    cosine = (vectors[:, 0].double() * vectors[:, 1].double()).sum(1)
    return {"cosine": cosine.cpu().numpy(), "score": batch.targets.numpy()}


def sentence_vectors(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (batch, width): the normalised mean of (batch, tokens, width) over the tokens that a mask keeps."""
    weights = mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp_min(1), dim=1)


def spearman(columns: Columns) -> float:
    """Return the correlation of the ranks of cosines and scores; NaN where either is constant."""
    centred = []
    for name in ("cosine", "score"):
        _, inverse, counts = np.unique(columns[name], return_inverse=True, return_counts=True)
        ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]  # equal values share their mean rank
        centred.append(ranks - ranks.mean())
    one, other = centred
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale else math.nan
