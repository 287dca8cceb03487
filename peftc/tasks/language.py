"""Language: windows of text, and how well a model foretells what stands in them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftc.data.dataset import Dataset
from peftc.data.tokens import IGNORED, cut, ids_of, joined, masked, window, windows_of
from peftc.models.tokenizer import tokenizer_of
from peftc.options import Reading
from peftc.tasks.task import Batch, Columns, Encoded, Task, columns_of, differ

if TYPE_CHECKING:
    from peftc.models.model import Model


def encode_causal(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return windows of text, whose every token but the first is foretold from those before it."""
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


def encode_masked(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return windows of text with some tokens masked, which are foretold from those around them."""
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


def observe_tokens(logits: Tensor, batch: Batch) -> Columns:
    """Return the summed negative log-likelihood of each sample, and how many tokens it is of."""
    sums = []
    for row, targets in zip(logits, batch.targets.to(logits.device), strict=True):
        kept = targets != IGNORED
        nll = torch.nn.functional.cross_entropy(row[kept].float(), targets[kept], reduction="none")
        sums.append((nll.double().sum().item(), int(kept.sum())))
    return columns_of(("nll", "tokens"), sums)


def compare_tokens(reference: Tensor, logits: Tensor, batch: Batch) -> Columns:
    """Return the summed divergence of each sample, on how many tokens both agree, and how many there are."""
    sums = []
    for one, other, targets in zip(reference, logits, batch.targets.to(logits.device), strict=True):
        kept = targets != IGNORED
        divergence, same = differ(one[kept], other[kept])
        sums.append((divergence.sum().item(), same.sum().item(), int(kept.sum())))
    return columns_of(("kl", "same", "count"), sums)


def nll(columns: Columns) -> float:
    """Return the mean negative log-likelihood of a token, in nats."""
    return float(columns["nll"].sum() / columns["tokens"].sum())


def perplexity(columns: Columns) -> float:
    """Return e to the power of that."""
    return math.exp(min(nll(columns), 700))  # e**710 overflows; the nll beside it stays exact


def digest_of(task: Task | None, data: Dataset, encoded: Encoded) -> str:
    """Return what identifies samples: their content, and of windows of text the tokens in each, too."""
    if task is None or not task.is_language:
        return data.digest
    return hashlib.sha256(f"{data.digest} {encoded.key}".encode()).hexdigest()
