"""Text cut as was asked: by a protocol of the field, in windows that overlap, or begun once instead of in each."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from peftc.data import remembered, tokenised
from peftc.data.dataset import Dataset
from peftc.data.stored import Flat
from peftc.data.tokens import IGNORED, LONGEST, start_of, window
from peftc.errors import DataError, UsageError
from peftc.models import unread
from peftc.models.model import Model
from peftc.models.tokenizer import tokenizer_of
from peftc.options import Reading
from peftc.store.documents import canonical
from peftc.tasks.task import Batch, Encoded

LONG = 2048  # tokens of a window, by the protocol of the scripts of GPTQ, SparseGPT and SVD-LLM
AT_ONCE = 4096  # tokens of a batch, as in eight windows of the usual length; half of them,
WITH_LOGITS = 2048  # where each comes with a logit for every word
UNKNOWN = "<unk>"  # what stands in word-level text for rare words

T = TypeVar("T")


def encode_cut(model: Model, data: Dataset, reading: Reading) -> Encoded:
    """Return windows of a text, each with the tokens to foretell that no window before it had.

    Raises:
        DataError: the text is shorter than one window.
        UsageError: the windows would not overlap as asked, or there is no text to cut.
    """
    cut, tokenizer = reading.windows, tokenizer_of(model)
    if data.kind == "tensor":
        raise UsageError(f"`{cut.asked()[0]}` says how text is cut", why=f"`{data.name}` is no text, but tokens")
    is_long = cut.protocol is not None and reading.max_length is None
    start = start_of(model, tokenizer) if cut.first_token == "window" else []
    usual = LONG if is_long else LONGEST
    length = window(model, reading.max_length, tokenizer, least=len(start) + 2, usual=usual)
    inner, first = length - len(start), max(1, len(start))  # of the text; where what is foretold begins
    if cut.stride is not None and cut.stride > length - first:
        why = f"a window has {length:,} tokens, and moves on by 1 to {length - first:,} of them"
        raise UsageError(f"`--stride` is {cut.stride}", why=why)
    stride = cut.stride or inner

    ids = tokenised.of_text(model, tokenizer, data, cut.protocol, special=cut.first_token == "text")
    if len(ids) < inner:
        what = f"`{data.name}` is too short for a window of {length:,} tokens"
        raise DataError(what, why=f"it has {len(ids):,}", hint="ask for shorter windows: `--max-length N`")
    rows = some_of((len(ids) - inner) // stride + 1, reading)
    begin = torch.tensor(start, dtype=torch.long)

    def batch(indices: Sequence[int]) -> Batch:
        at = rows[list(indices)]
        inside = ids.windows((at * stride).tolist(), inner).long()
        given = torch.cat([begin.expand(len(at), -1), inside], 1)
        targets = given.roll(-1, 1)  # what comes next
        targets[:, : first - 1] = targets[:, -1:] = IGNORED
        targets[at > 0, : max(0, length - 1 - stride)] = IGNORED  # an earlier window scored them
        return Batch({"input_ids": given, "attention_mask": torch.ones_like(given)}, targets)

    later = int((rows > 0).sum())
    scored = later * min(stride, length - first) + (len(rows) - later) * (length - first)
    told = {"protocol": cut.protocol, "length": length, "stride": stride, "first_token": cut.first_token}
    key = known(ids, [told, start, len(rows), reading.seed], lambda: _key(ids, canonical([told, start, rows.tolist()])))
    unknown = known(ids, ["unknown"], lambda: any(UNKNOWN in row for row in tokenised.rows_of(data)))
    about = told | {"scored": scored, "unknown": unknown}
    notes = _said(about, f"`{tokenizer.decode(start)}`" if start else "nothing", overlap=stride < inner)
    if is_long and length < LONG:
        notes.append(f"data: `{model.name}` takes at most {length:,} tokens; windows of the protocol have {LONG:,}")
    most = WITH_LOGITS if unread.head_of(model) is None else AT_ONCE
    return Encoded(len(rows), batch, key, batch_size=max(1, most // length), notes=notes, windows=about)


def _key(ids: Flat, told: str) -> str:
    found = hashlib.sha256()
    for part in ids.parts:
        found.update(part.astype(np.int64).tobytes())
    found.update(told.encode())
    return found.hexdigest()


def known(ids: Flat, parts: Sequence[object], compute: Callable[[], T]) -> T:
    """Return what ``compute`` gives, which follows from tokens and ``parts``; it is remembered where the tokens are."""
    return remembered.value(remembered.key_of(ids.name, *parts), compute) if ids.name else compute()


def some_of(windows: int, reading: Reading) -> Tensor:
    """Return which of so many windows are used, in order: as many as asked for, by the seed; all without a number."""
    number = reading.num_samples
    if number is None or number >= windows:
        return torch.arange(windows)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(reading.seed))
    return order[:number].sort().values


def _said(about: Mapping[str, Any], start: str, *, overlap: bool) -> list[str]:
    """Return in words how a text was cut, its windows begun by ``start``, and what that means for who compares."""
    length, stride = about["length"], about["stride"]
    by = (
        f"protocol `{about['protocol']}`, rows joined by two new lines" if about["protocol"] else "a new line ends rows"
    )
    over = f"each {stride:,} after the one before" if overlap else "without overlap"
    begun = (
        f"each begun by {start}" if about["first_token"] == "window" else "the whole text begun as the tokenizer does"
    )
    unknown = f"the text holds `{UNKNOWN}`" if about["unknown"] else f"no `{UNKNOWN}` in the text"
    said = f"data: {by}; windows of {length:,} tokens {over}, {begun}; {about['scored']:,} tokens scored; {unknown}"
    word_level = (
        f"with `{UNKNOWN}` for rare words, as in the word-level WikiText-2, a text is another one: figures on it do "
        "not stand beside published ones of the raw text"
    )
    return [said, word_level] if about["unknown"] else [said]
