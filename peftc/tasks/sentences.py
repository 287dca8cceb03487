"""Texts one by one and in pairs: how they are read, and how near two sentences are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.data import tokenised
from peftc.data.dataset import Dataset
from peftc.data.spec import naming
from peftc.errors import DataError
from peftc.models.model import Model
from peftc.options import Reading
from peftc.tasks.task import Batch, Columns, Encoded


def encode_texts(
    model: Model, settings: Reading, data: Dataset, texts: Sequence[Any], labels: Tensor, *, width: int = 1
) -> Encoded:
    """Tokenise texts of a data set; each sample makes ``width`` rows of a batch, which stand one after the other."""
    tokens = tokenised.of_rows(model, data, texts, settings.max_length)

    def batch(indices: Sequence[int]) -> Batch:
        padded = tokens.pad([index * width + at for index in indices for at in range(width)])
        return Batch(padded, labels[torch.tensor(list(indices))])

    lengths = tokens.lengths
    if width > 1:
        lengths = [max(lengths[at : at + width]) for at in range(0, len(lengths), width)]
    full = sum(length == tokens.limit for length in lengths)
    notes = [f"data: {full} samples reach {tokens.limit} tokens and may be cut there"] if full else []
    return Encoded(len(lengths), batch, key=tokens.digest, lengths=lengths, notes=notes)


def encode_pairs(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return pairs of sentences with the score of each (DataError: there are none, or too few to rank)."""
    if data.labels is None or data.classes is not None:
        hint = f"name the column of labels: {naming(data.name, 'label')}"
        raise DataError(f"`sentence-similarity` needs a score for each pair of `{data.name}`", hint=hint)
    scores = torch.tensor([data.labels[row] for row in data.rows], dtype=torch.float64)
    if len(scores) < 3 or len(scores.unique()) < 2:
        why = f"{len(scores)} pairs with {len(scores.unique())} different scores"
        raise DataError(f"`{data.name}` has too few scores to rank", why=why)
    return encode_texts(model, settings, data, data.halves(), scores, width=2)


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
