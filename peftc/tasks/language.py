"""Language: windows of text, and how well a model foretells what stands in them."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.data.dataset import Dataset
from peftc.data.tokens import IGNORED, ids_of, start_of, window
from peftc.errors import DataError
from peftc.models.model import Model
from peftc.models.tokenizer import tokenizer_of
from peftc.nn import vocabulary
from peftc.nn.vocabulary import Logits
from peftc.options import Reading
from peftc.tasks.task import Batch, Columns, Encoded, Task
from peftc.tasks.windows import encode_cut, joined, some_of

MASKED = 0.15  # the share of BERT (Devlin et al., 2019, section 3.1); every one becomes the mask token


def encode_causal(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return windows of text, whose every token but the first is foretold from those before it."""
    if settings.windows.asked():
        return encode_cut(model, data, settings)
    if data.kind == "tensor":
        windows, begun = torch.stack([data[index][0] for index in range(len(data))]), ""
    else:
        tokenizer = tokenizer_of(model)
        start = start_of(model, tokenizer)
        inner = _windows(model, tokenizer, data, settings, taken=len(start), least=len(start) + 2)
        windows = torch.cat([torch.tensor(start, dtype=torch.long).expand(len(inner), -1), inner], 1)
        begun = f" each begun by `{tokenizer.decode(start)}`, as the tokenizer begins texts;" if start else ""

    targets = windows.roll(-1, 1)
    targets[:, -1] = IGNORED
    return _encoded(windows, targets, f"data: windows of {windows.shape[1]} tokens,{begun} the first of each given")


def encode_masked(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return windows of text, each between its start and end token and with 15 % of its tokens masked."""
    tokenizer = tokenizer_of(model)
    inner = _windows(model, tokenizer, data, settings, taken=2, least=3)
    start, end, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    if None in (start, end, mask):
        raise DataError("the tokenizer is not made for `masked-lm`", why="it lacks a mask, start or end token")
    edge = torch.ones(len(inner), 1, dtype=torch.long)
    whole = torch.cat([start * edge, inner, end * edge], 1)
    order = torch.rand(inner.shape, generator=torch.Generator().manual_seed(settings.seed)).argsort(1)
    number = max(1, round(MASKED * inner.shape[1]))
    chosen = torch.zeros_like(whole, dtype=torch.bool).scatter(1, order[:, :number] + 1, True)
    tokens, targets = whole.masked_fill(chosen, mask), whole.masked_fill(~chosen, IGNORED)
    return _encoded(tokens, targets, f"data: windows of {tokens.shape[1]} tokens, {number} of them masked in each")


def _encoded(tokens: Tensor, targets: Tensor, note: str) -> Encoded:
    """Return windows (samples, tokens) and what is to be foretold of each token."""

    def batch(indices: Sequence[int]) -> Batch:
        given = tokens[list(indices)]
        return Batch({"input_ids": given, "attention_mask": torch.ones_like(given)}, targets[list(indices)])

    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Encoded(len(tokens), batch, key=digest, notes=[note])


def _windows(model: Model, tokenizer: Any, data: Dataset, settings: Reading, *, taken: int, least: int) -> Tensor:
    """Join texts, each ended by a new line, and cut them into windows, dropping the short rest; (windows, length).

    A window is as long as the settings say less the tokens ``taken`` for what it begins and ends with, which ``least``
    includes as they do; so many are kept as they say, seeded.
    """
    length = window(model, settings.max_length, tokenizer, least=least) - taken
    ids = ids_of(model, tokenizer, joined(data), add_special_tokens=False)
    length = min(length, len(ids))
    if length < 2:
        raise DataError(f"`{data.name}` is too short", why=f"it has {len(ids)} tokens")
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return windows[some_of(len(windows), settings)]


def observe_tokens(logits: Logits, batch: Batch) -> Columns:
    """Return the summed negative log-likelihood of each sample, and how many tokens it is of."""
    sums = []
    for row, targets in zip(logits, _targets(batch, logits), strict=True):
        kept = targets != IGNORED
        sums.append((vocabulary.nll(row[kept], targets[kept]).double().sum().item(), int(kept.sum())))
    return dict(zip(("nll", "tokens"), np.array(sums, np.float64).T, strict=True))


def compare_tokens(reference: Logits, logits: Logits, batch: Batch) -> Columns:
    """Return the summed divergence of each sample, on how many tokens both agree, and how many there are."""
    sums = []
    for one, other, targets in zip(reference, logits, _targets(batch, logits), strict=True):
        kept = targets != IGNORED
        divergence, same = vocabulary.differ(one[kept], other[kept])
        sums.append((divergence.sum().item(), same.sum().item(), int(kept.sum())))
    return dict(zip(("kl", "same", "count"), np.array(sums, np.float64).T, strict=True))


def _targets(batch: Batch, logits: Logits) -> Tensor:
    return batch.targets.to(logits.device)


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
