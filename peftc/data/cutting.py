"""One long text to tokens, piece by piece: the same tokens as all at once, in the memory of some pieces.

A text is cut where a line begins with a letter or a digit. Each piece is tokenised with some lines before and behind
it, whose tokens are dropped. That gives the tokens of the whole text because

- no token of the vocabulary holds a new line and then a letter or a digit, so none reaches over a cut. Where a text is
  one word to a tokenizer, as in Llama's and Gemma's, merges on both sides of a cut know nothing of each other;
- on what lies around a cut, the piece before it and the one behind it have to agree token by token, which a rule that
  looks further than that would break.

A tokenizer for which either fails gets the whole text at once.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

PIECE = 1 << 17  # characters of a piece: in the making its tokens take 200 bytes of each
AT_ONCE = 4 * PIECE  # characters that are tokenised at once
CONTEXT = 1024  # characters before and behind a piece, at least
LINE = re.compile(r"(?:\A|(?<=\n))(?=[^\W_])")


class NotLocalError(Exception):
    """A piece alone has other tokens than in the whole text."""


def can_cut(tokenizer: Any) -> bool:
    """Return whether no token reaches over a cut, and the tokenizer can tell where each token stands."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    vocabulary = tokenizer.get_vocab()
    is_bytes = "Ċ" in vocabulary and not {"\n", "<0x0A>"} & vocabulary.keys()  # byte-level: each byte is a letter
    spaces = "ĊĠĉč" if is_bytes else r"\s▁"
    over = re.compile(f"[{'Ċ' if is_bytes else chr(10)}][^{spaces}]")
    return not any(over.search(token) for token in vocabulary)


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts, each ended by a new line but the last, as ones of about `PIECE` characters each."""
    held, size = list[str](), 0
    for text in texts:
        for part in _parts(text):
            held.append(part)
            size += len(part)
            if size >= PIECE and part.endswith("\n"):
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)


def _parts(text: str) -> Iterator[str]:
    """Cut a long text at ends of lines."""
    start = 0
    while len(text) - start > 2 * PIECE and (end := text.find("\n", start + PIECE) + 1):
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def tokens(tokenise: Callable[[list[str]], Any], texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the tokens of texts as if they were one, without special ones before or behind (NotLocalError).

    ``tokenise`` gives what a tokenizer makes of some texts.
    """
    behind: Sequence[int] = []  # tokens behind the cut, as the last piece has them
    before: Sequence[int] = []  # and its own
    for some in _batches(_overlapping(texts)):
        made = tokenise([text for text, _, _ in some])
        for (text, start, stop), ids, encoding in zip(some, made["input_ids"], made.encodings, strict=True):
            first = _token_at(encoding, text, start) if start else 0
            last = _token_at(encoding, text, stop) if stop < len(text) else len(ids)
            own = ids[first:last]
            if start:
                _agree(behind, own)
                _agree(before[::-1], ids[:first][::-1])
            behind, before = ids[last:], own
            yield np.array(own, np.int32)


def _batches(found: Iterator[tuple[str, int, int]]) -> Iterator[list[tuple[str, int, int]]]:
    held, size = list[tuple[str, int, int]](), 0
    for each in found:
        held.append(each)
        size += len(each[0])
        if size >= AT_ONCE:
            yield held
            held, size = [], 0
    if held:
        yield held


def _overlapping(texts: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Yield texts with what stands around them, and from where to where each is its own."""
    before = own = ""
    for piece in pieces(texts):
        cut = LINE.search(piece)
        if cut is None or not own:
            own += piece
            continue
        at = cut.start()
        own += piece[:at]
        behind = piece[at : piece.find("\n", at + CONTEXT) + 1 or len(piece)]
        yield before + own + behind, len(before), len(before) + len(own)
        both = before + own
        before, own = both[both.rfind("\n", 0, max(0, len(both) - CONTEXT)) + 1 :], piece[at:]
    if own:
        yield before + own, len(before), len(before) + len(own)


def _token_at(encoding: Any, text: str, place: int) -> int:
    """Return which token begins with a character, or with the white space before it."""
    at = encoding.char_to_token(place)
    if at is None:
        raise NotLocalError
    start = encoding.token_to_chars(at)[0]
    if text[start:place].strip() or start > place or (at and encoding.token_to_chars(at - 1)[1] > start):
        raise NotLocalError
    return int(at)


def _agree(one: Sequence[int], other: Sequence[int]) -> None:
    """Compare tokens from a cut on, as long as the end of the shorter ones is far."""
    number = min(len(one), len(other)) // 2
    if list(one[:number]) != list(other[:number]):
        raise NotLocalError
