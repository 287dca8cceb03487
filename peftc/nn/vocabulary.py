"""Logits of a large vocabulary that are never whole: what the head reads, and the head, some words at a time.

A window of 512 tokens has half a gigabyte of logits over 262,144 words. All that is asked of them are sums over words,
which are carried along with the largest logit so far (Milakov and Gimelshein, 2018, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WORDS = 2048  # whose logits are there at once
BLOCK = 1 << 24  # logits that are there at once where a gradient is wanted


@dataclass(frozen=True)
class Unread:
    """Logits (..., words) that are not computed yet.

    Attributes:
        hidden: (..., width), what the head reads.
        weight: (words, width) of the head; it may be of another dtype or on another device.
        bias: (words,) of the head, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """As of the logits."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    @property
    def device(self) -> torch.device:
        """As of the logits."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """As of the logits."""
        return self.hidden.dtype

    @property
    def ndim(self) -> int:
        """As of the logits."""
        return self.hidden.ndim

    def __getitem__(self, rows: int | slice | Tensor) -> Unread:
        return replace(self, hidden=self.hidden[rows])

    def __iter__(self) -> Iterator[Unread]:
        return (self[at] for at in range(len(self.hidden)))

    def to(self, device: torch.device | str) -> Unread:
        """Return the same with what the head reads on another device."""
        return replace(self, hidden=self.hidden.to(device))

    def flat(self) -> Unread:
        """Return the same as rows (n, words)."""
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def whole(self) -> Tensor:
        """Return the logits."""
        return self._of(slice(None))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits of some words at a time in float32, and the first of these words."""
        for start in range(0, len(self.weight), WORDS):
            yield start, self._of(slice(start, start + WORDS)).float()

    def words(self, some: slice) -> Tensor:
        """Return the rows of the weight of some words as they are multiplied with."""
        return self.weight[some].to(self.hidden.device, self.hidden.dtype)

    def _of(self, some: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[some].to(self.hidden.device, self.hidden.dtype)
        return F.linear(self.hidden, self.words(some), bias)


Logits: TypeAlias = "Tensor | Unread"


@dataclass(frozen=True)
class Foremost:
    """The likeliest words of each row, and all others together as one more.

    Attributes:
        words: (..., K) of them.
        logs: (..., K + 1), their log-probabilities, and last that of all others.
    """

    words: Tensor
    logs: Tensor


Kept: TypeAlias = "Tensor | Unread | Foremost"


@torch.no_grad()
def foremost(logits: Logits, number: int, temperature: float = 1.0) -> Foremost:
    """Return the likeliest words of logits (..., words) at a temperature, at most all but one."""
    flat = logits.reshape(-1, logits.shape[-1]) if isinstance(logits, Tensor) else logits.flat()
    number, block = min(number, flat.shape[1] - 1), max(1, BLOCK // flat.shape[1])
    words, logs = [], []
    for start in range(0, flat.shape[0], block):
        some = flat[start : start + block]
        whole = some if isinstance(some, Tensor) else some.whole()
        words.append(whole.topk(number).indices)
        logs.append(logs_of(whole, words[-1], temperature))
    shape = logits.shape[:-1]
    return Foremost(torch.cat(words).view(*shape, -1), torch.cat(logs).view(*shape, -1))


def logs_of(logits: Tensor, words: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of some words (..., K) by logits (..., words), and last that of all others."""
    logs = (logits.float() / temperature).log_softmax(-1)
    others = logs.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, words), others], -1)


class _Softmax:
    """The sum of exponentials of rows over the words seen so far."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.highest = torch.full((rows,), -torch.inf, device=device)
        self.total = torch.zeros(rows, dtype=torch.float64, device=device)

    def see(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take logits (rows, some words); return their exponentials, each row's sum, and what earlier sums shrink by.

        All are relative to the largest logit so far.
        """
        highest = torch.maximum(self.highest, logits.amax(1))
        shrink = (self.highest - highest).exp().double()
        powers = (logits - highest[:, None]).exp_()
        mass = powers.sum(1).double()
        self.highest, self.total = highest, self.total * shrink + mass
        return powers, mass, shrink

    def log(self) -> Tensor:
        """Return the logarithm of the sum, (rows,) float64."""
        return self.highest.double() + self.total.log()


def is_finite(logits: Logits) -> bool:
    """Return whether there is no NaN and no infinity in logits, or in what their head reads."""
    return bool(torch.isfinite(logits if isinstance(logits, Tensor) else logits.hidden).all())


def nll(logits: Logits, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each row's target, (rows,), in nats; with a gradient where one is wanted.

    Args:
        logits: (rows, words).
        targets: (rows,) words.
    """
    if isinstance(logits, Tensor):
        return F.cross_entropy(logits.float(), targets, reduction="none")
    if _learns(logits):
        return by_rows(lambda some, words: F.cross_entropy(some.float(), words, reduction="none"), [logits], targets)
    with torch.no_grad():
        seen, said = _Softmax(len(logits.hidden), logits.device), torch.zeros_like(targets, dtype=torch.float32)
        for start, tile in logits.tiles():
            here = (targets >= start) & (targets < start + tile.shape[1])
            said[here] = tile[here, targets[here] - start]
            seen.see(tile)
        return (seen.log() - said.double()).float()


@torch.no_grad()
def differ(reference: Logits, logits: Logits) -> tuple[Tensor, Tensor]:
    """Return KL(reference || logits) of each row in nats, float64, and whether both rank the same word first."""
    if isinstance(reference, Tensor) or isinstance(logits, Tensor):
        one, other = (each if isinstance(each, Tensor) else each.whole() for each in (reference, logits))
        p, q = (each.float().log_softmax(1).double() for each in (one.to(other.device), other))
        return (p.exp() * (p - q)).sum(1).clamp_min(0), one.to(other.device).argmax(1) == other.argmax(1)
    reference = reference.to(logits.device)
    rows, device = len(logits.hidden), logits.hidden.device
    own, others = _Softmax(rows, device), _Softmax(rows, device)
    apart = torch.zeros(rows, dtype=torch.float64, device=device)
    first = torch.zeros(2, rows, dtype=torch.long, device=device)
    for (start, p), (_, q) in zip(reference.tiles(), logits.tiles(), strict=True):
        for at, (seen, tile) in enumerate(((own, p), (others, q))):
            value, word = tile.max(1)
            first[at] = torch.where(value > seen.highest, word + start, first[at])
        powers, _, shrink = own.see(p)
        others.see(q)
        apart = apart * shrink + (powers * (p - q)).sum(1).double()
    return (apart / own.total - own.log() + others.log()).clamp_min(0), first[0] == first[1]


@torch.no_grad()
def pulls(logits: Unread, chances: Tensor) -> list[Tensor]:
    """Return, for each draw of words, the gradient of their negative log-likelihood by what the head reads.

    A word is drawn from each row's own distribution while the words pass by: one of a tile takes the place of the one
    drawn so far with the tile's share of the sum.

    Args:
        logits: (rows, words).
        chances: (rows, tiles, draws), uniform in [0, 1); see `tiles_of`.

    Returns:
        (rows, width) each.
    """
    seen, rows, device = _Softmax(len(logits.hidden), logits.hidden.device), len(logits.hidden), logits.hidden.device
    mean = torch.zeros(rows, logits.hidden.shape[1], device=device)
    drawn = torch.zeros(chances.shape[2], rows, dtype=torch.long, device=device)
    for number, (start, tile) in enumerate(logits.tiles()):
        powers, mass, shrink = seen.see(tile)
        mean = mean * shrink.float()[:, None] + powers @ logits.words(slice(start, start + WORDS)).float()
        share = (mass / seen.total).float()
        for draw, chance in enumerate(chances[:, number].to(device).T):
            taken = (chance < share).nonzero()[:, 0]
            if len(taken):
                level = (chance / share)[taken] * mass[taken].float()
                place = torch.searchsorted(powers[taken].cumsum(1), level[:, None])[:, 0]
                drawn[draw, taken] = start + place.clamp_max(tile.shape[1] - 1)
    mean /= seen.total.float()[:, None]
    table = logits.weight
    return [mean - table[words.to(table.device)].to(device).float() for words in drawn]


def tiles_of(words: int) -> int:
    """Return in how many tiles a vocabulary passes by."""
    return -(-words // WORDS)


def by_rows(function: Callable[..., Tensor], logits: Sequence[Unread], *others: Tensor) -> Tensor:
    """Return a function of whole logits, some rows at a time, which are computed again for a backward pass.

    Args:
        function: (logits (n, words) for each, others (n, ...)) -> (n,).
        logits: (rows, words) each.
        others: (rows, ...), what else the function takes.
    """
    number = max(1, BLOCK // len(logits[0].weight))

    def of(*parts: Tensor) -> Tensor:
        some = [replace(each, hidden=part).whole() for each, part in zip(logits, parts, strict=False)]
        return function(*some, *parts[len(logits) :])

    pieces = [each.split(number) for each in (*(one.hidden for one in logits), *others)]
    return torch.cat([checkpoint(of, *parts, use_reentrant=False) for parts in zip(*pieces, strict=True)])  # type: ignore[misc]


def _learns(logits: Unread) -> bool:
    if not torch.is_grad_enabled() or logits.hidden.is_inference():
        return False
    parts = (logits.hidden, logits.weight, logits.bias)
    return any(each is not None and each.requires_grad for each in parts)
