"""Language: windows of text, and how well a model foretells what stands in them."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.data import tokenised
from peftc.data.dataset import Dataset
from peftc.data.remembered import key_of
from peftc.data.stored import Flat, flat
from peftc.data.tokens import IGNORED, start_of, window
from peftc.errors import DataError, ShortError
from peftc.models.model import Model
from peftc.models.tokenizer import tokenizer_of
from peftc.nn import vocabulary
from peftc.nn.vocabulary import Logits
from peftc.options import Reading
from peftc.tasks.packing import encode_packed
from peftc.tasks.task import Batch, Columns, Encoded, Task
from peftc.tasks.windows import encode_cut, known, some_of

BLOCK = 1 << 20  # tokens that are looked at at once, where all are
MASKED = 0.15  # the share of BERT (Devlin et al., 2019, section 3.1); every one becomes the mask token


@dataclass(frozen=True)
class _Windows:
    """Windows of text; ``give`` gives (rows, length) tokens of some, and ``ids`` are those of the whole text."""

    number: int
    length: int
    give: Callable[[Sequence[int]], Tensor]
    ids: Flat
    asked: tuple[object, ...]  # by what they were chosen


def encode_causal(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return windows of text, whose every token but the first is foretold from those before it."""
    if settings.windows.asked():
        return encode_cut(model, data, settings)
    if settings.packed:
        return encode_packed(model, data, settings)
    start, begun = torch.tensor([], dtype=torch.long), ""
    if data.kind == "tensor":
        drawn = torch.stack([data[index][0] for index in range(len(data))])
        inner = _Windows(len(drawn), drawn.shape[1], lambda rows: drawn[list(rows)], Flat([]), ())
    else:
        tokenizer = tokenizer_of(model)
        start = torch.tensor(start_of(model, tokenizer), dtype=torch.long)
        inner = _windows(model, tokenizer, data, settings, taken=len(start), least=len(start) + 2)
        begun = (
            f" each begun by `{tokenizer.decode(start.tolist())}`, as the tokenizer begins texts;" if len(start) else ""
        )

    def read(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([start.expand(len(rows), -1), inner.give(rows)], 1)
        targets = tokens.roll(-1, 1)
        targets[:, -1] = IGNORED
        return tokens, targets

    note = f"data: windows of {len(start) + inner.length} tokens,{begun} the first of each given"
    return _encoded(inner, read, note, start.tolist())


def encode_masked(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return windows of text, each between its start and end token and with 15 % of its tokens masked."""
    tokenizer = tokenizer_of(model)
    inner = _windows(model, tokenizer, data, settings, taken=2, least=3)
    start, end, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    if None in (start, end, mask):
        raise DataError("the tokenizer is not made for `masked-lm`", why="it lacks a mask, start or end token")
    number = max(1, round(MASKED * inner.length))
    width = -(-inner.length // 8)
    bits = _drawn(inner, number, settings.seed)

    def read(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        edge = torch.ones(len(rows), 1, dtype=torch.long)
        whole = torch.cat([start * edge, inner.give(rows), end * edge], 1)
        packed = bits.windows([row * width for row in rows], width).numpy()
        chosen = torch.zeros_like(whole, dtype=torch.bool)
        chosen[:, 1:-1] = torch.from_numpy(np.unpackbits(packed, axis=1, count=inner.length)).bool()
        return whole.masked_fill(chosen, mask), whole.masked_fill(~chosen, IGNORED)

    note = f"data: windows of {inner.length + 2} tokens, {number} of them masked in each"
    return _encoded(inner, read, note, [start, end, mask])


def _drawn(windows: _Windows, number: int, seed: int) -> Flat:
    """Return which tokens of each window are masked: a bit for each, in whole bytes a window."""

    def blocks() -> Iterator[np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        for rows in _blocks(windows):
            order = torch.rand(len(rows), windows.length, generator=generator).argsort(1)
            chosen = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :number], True)
            yield np.packbits(chosen.numpy(), axis=1).ravel()

    if windows.ids.name is None:
        return Flat([np.concatenate([*blocks()])])
    return flat(key_of("masked", windows.number, windows.length, number, seed), "uint8", blocks)


def _blocks(windows: _Windows) -> Iterator[range]:
    """Yield all windows, some at once."""
    some = max(1, BLOCK // windows.length)
    return (range(at, min(at + some, windows.number)) for at in range(0, windows.number, some))


def _encoded(
    windows: _Windows, read: Callable[[Sequence[int]], tuple[Tensor, Tensor]], note: str, around: list[int]
) -> Encoded:
    """Return windows (samples, tokens) and what is to be foretold of each token, which ``read`` gives."""

    def batch(indices: Sequence[int]) -> Batch:
        given, targets = read(indices)
        return Batch({"input_ids": given, "attention_mask": torch.ones_like(given)}, targets)

    def digest() -> str:
        found = hashlib.sha256()
        for rows in _blocks(windows):
            found.update(read(rows)[0].numpy().tobytes())
        return found.hexdigest()

    key = known(windows.ids, [note, around, *windows.asked], digest)
    return Encoded(windows.number, batch, key=key, notes=[note])


def _windows(model: Model, tokenizer: Any, data: Dataset, settings: Reading, *, taken: int, least: int) -> _Windows:
    """Join texts, each ended by a new line, and cut them into windows, dropping the short rest.

    A window is as long as the settings say less the tokens ``taken`` for what it begins and ends with, which ``least``
    includes as they do; so many are kept as they say, seeded.
    """
    length = window(model, settings.max_length, tokenizer, least=least) - taken
    ids = tokenised.of_text(model, tokenizer, data)
    length = min(length, len(ids))
    if length < 2:
        raise ShortError(f"`{data.name}` is too short", why=f"it has {len(ids)} tokens")
    chosen = some_of(len(ids) // length, settings)

    def give(rows: Sequence[int]) -> Tensor:
        return ids.windows((chosen[list(rows)] * length).tolist(), length).long()

    return _Windows(len(chosen), length, give, ids, (len(chosen), settings.seed))


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
