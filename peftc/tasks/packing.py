"""Short texts joined to full windows for a causal language model, none of which sees another.

Each text counts its own positions from 0. transformers takes a step back in them for the start of another text, and
lets no text attend to one before it, under whatever attention the network computes and within its sliding windows.
"""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peftc.data import tokenised
from peftc.data.dataset import Dataset
from peftc.data.stored import Flat
from peftc.data.tokens import IGNORED, around, ready
from peftc.errors import ShortError, UsageError
from peftc.models import inputs
from peftc.models.model import Model
from peftc.models.place import dtype_of, place_of
from peftc.options import Reading
from peftc.store.documents import canonical
from peftc.tasks.task import Batch, Encoded
from peftc.tasks.windows import known, some_of

TRIED = (5, 3, 7)  # tokens of the texts by which is tried whether a network keeps them apart
ROUNDED = 1e-6  # of the largest output in float32: experts that get other tokens sum them in another order
SAME = 0.02  # of the largest output: where a text in a window gives what it gives alone, rounded otherwise


@dataclass(frozen=True)
class _Pieces:
    """Texts, or parts of those that are longer than a window: where each begins, its tokens, whether it ends a text."""

    starts: list[int]
    lengths: list[int]
    ends: list[bool]


def encode_packed(model: Model, data: Dataset, settings: Reading) -> Encoded:
    """Return windows of whole texts, each begun and ended as the tokenizer does; a long text is cut into several.

    Raises:
        DataError: there are no texts.
    """
    if data.kind != "text":
        raise UsageError("`--packing` joins texts", why=f"`{data.name}` holds none", hint="leave it out")
    tokenizer, length = ready(model, settings.max_length)
    start, end = around(model, tokenizer)
    room = length - len(start) - len(end)
    if room < 2:
        raise UsageError(f"`--max-length` is {length}", why="at least two tokens of a text are needed")
    ids = tokenised.of_each(model, tokenizer, data)
    pieces = _cut(ids, room)
    if not pieces.starts:
        raise ShortError(f"`{data.name}` is too short", why="its texts have no tokens")
    sizes = [len(start) + own + len(end) * ends for own, ends in zip(pieces.lengths, pieces.ends, strict=True)]
    bins = packed(sizes, length)
    chosen = some_of(len(bins), settings).tolist()
    filler = tokenizer.pad_token_id or 0

    def batch(indices: Sequence[int]) -> Batch:
        shape = len(indices), length
        given, targets = torch.full(shape, filler), torch.full(shape, IGNORED)
        mask, places = torch.zeros(shape, dtype=torch.long), torch.arange(length).repeat(len(indices), 1)
        for row, index in enumerate(indices):
            at = 0
            for piece in bins[chosen[index]]:
                begin = pieces.starts[piece]
                own = ids.between(begin, begin + pieces.lengths[piece]).tolist()
                text = torch.tensor([*start, *own, *(end if pieces.ends[piece] else [])])
                stop = at + len(text)
                given[row, at:stop], mask[row, at:stop] = text, 1
                targets[row, at : stop - 1] = text[1:]
                places[row, at:] = torch.arange(length - at)  # what pads is a text of its own, behind the last
                at = stop
            places[row, at:] = torch.arange(length - at)
        return Batch({"input_ids": given, "attention_mask": mask, inputs.APART: places}, targets)

    told = canonical([start, end, length, settings.seed, len(chosen)])
    key = known(ids, ["packed", told], lambda: _digest(ids, told))
    texts = sum(pieces.ends)
    whole = 1 - sum(sizes) / (length * len(bins))
    alone = 1 - sum(sizes) / (length * len(sizes))
    saved = length * (len(sizes) - len(bins))
    note = (
        f"data: {texts:,} texts in {len(bins):,} windows of {length} tokens, none seeing another; {whole:.1%} is "
        f"padding, of windows of one text {alone:.1%} would be: {saved:,} padded tokens saved"
    )
    return Encoded(len(chosen), batch, key=key, notes=[note])


def _cut(ids: Flat, room: int) -> _Pieces:
    """Find texts, each of which stands behind the number of its tokens, and cut them to what a window has room for."""
    found, before = _Pieces([], [], []), 0
    for part in ids.parts:
        at = 0
        while at < len(part):
            number, at = int(part[at]), at + 1
            for begin in range(0, number, room):
                found.starts.append(before + at + begin)
                found.lengths.append(min(room, number - begin))
                found.ends.append(begin + room >= number)
            at += number
        before += len(part)
    return found


def packed(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Return which of some sizes share a window: the largest first, each into the fullest one that has room for it.

    Best fit decreasing takes at most 11/9 of the fewest windows and four more (Johnson et al., 1974).

    Args:
        sizes: at least 1 and at most ``room`` each.
        room: of a window.
    """
    found: list[list[int]] = []
    by_room: list[list[list[int]]] = [[] for _ in range(room + 1)]
    open_ = 0  # bit n is set where a window has n left
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        size, left, some = sizes[at], room, list[int]()
        if fits := open_ >> size:
            left = size + (fits & -fits).bit_length() - 1
            some = by_room[left].pop()
            if not by_room[left]:
                open_ &= ~(1 << left)
        else:
            found.append(some)
        some.append(at)
        left -= size
        if left:
            by_room[left].append(some)
            open_ |= 1 << left
    return found


def _digest(ids: Flat, told: str) -> str:
    found = hashlib.sha256(told.encode())
    for part in ids.parts:
        found.update(part.astype(np.int64).tobytes())
    return found.hexdigest()


def refuse_unpackable(model: Model) -> None:
    """Refuse a network that mixes texts of one window, or gives for one another output than alone (UsageError).

    It is tried: another first text may change nothing of what the second one gives.
    """
    if "position_ids" not in inspect.signature(model.module.forward).parameters:
        raise _refusal(model, "it takes no positions of tokens")
    generator = torch.Generator().manual_seed(0)
    words = inputs.vocabulary(model)
    first, other, *rest = (torch.randint(0, words, (1, length), generator=generator) for length in (TRIED[0], *TRIED))
    places = torch.cat([torch.arange(length) for length in TRIED])[None]
    begun, ended = TRIED[0], sum(TRIED[:2])

    def given(text: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([text, *rest], 1)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), inputs.APART: places}
        place = place_of(model.module)
        return inputs.outputs(model, {name: each.to(place) for name, each in batch.items()})[:, begun:ended].float()

    place = place_of(model.module)
    try:
        one, two = given(first), given(other)
        alone = inputs.outputs(model, {"input_ids": rest[0].to(place)}).float()
    except inputs.DOES_NOT_RUN as error:
        raise _refusal(model, str(error).partition("\n")[0]) from error
    most = float(alone.abs().max())
    rounded = ROUNDED * most if dtype_of(model.module) == torch.float32 else 0.0
    if not torch.allclose(one, two, rtol=0, atol=rounded):
        raise _refusal(model, "what it gives for a text depends on the one before it in the window")
    if not torch.allclose(one, alone, rtol=0, atol=SAME * most):
        raise _refusal(model, "a text in the middle of a window gives another output than alone")


def _refusal(model: Model, why: str) -> UsageError:
    return UsageError(f"`--packing` does not go with `{model.name}`", why=why, hint="leave it out")
