"""Data tokenised once: the tokens lie on disk, named by content, tokenizer and settings, and are mapped into memory."""

import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from peftc import progress
from peftc.data import cutting, remembered, stored
from peftc.data.dataset import Dataset, Each
from peftc.data.remembered import key_of
from peftc.data.tokens import (
    Tokens,
    around,
    ids_of,
    keys_of,
    padding,
    ready,
    refuse_unknown,
    rows_to_tokens,
    tokenise,
)
from peftc.models.model import Model
from peftc.models.tokenizer import TOKENIZERS, refusing

BESIDE = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "*.py")  # what a tokenizer reads beside
AT_ONCE = 1000  # texts that are tokenised at once
SETTINGS = ("model_type", "tokenizer_class", "auto_map")  # of a model, which choose the class of its tokenizer


def fingerprint(model: Model, data: Dataset, *settings: object) -> str | None:
    """Return what tells tokens of a data set apart from all others; None where they are not to be kept."""
    if data.begun is None or not data.begun.is_settled:
        return None
    assert model.folder is not None
    found = hashlib.sha256()
    files = {path for pattern in (*TOKENIZERS, *BESIDE) for path in model.folder.glob(pattern)}
    for path in sorted(files):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    made_by = [version(name) for name in ("transformers", "tokenizers")]
    chosen = [model.config.get(key) for key in SETTINGS]
    return key_of("tokens", data.digest, found.hexdigest(), made_by, chosen, *settings)


def of_text(
    model: Model, tokenizer: Any, data: Dataset, protocol: str | None = None, *, special: bool = False
) -> stored.Flat:
    """Return the tokens of all texts as one; of a large data set they lie on disk.

    Args:
        model: which has to know them all.
        tokenizer: that lies beside it.
        data: texts.
        protocol: as for `rows_of`.
        special: put the tokens around the text that the tokenizer puts around one.
    """
    if data.identity is None:
        text = "".join(rows_of(data, protocol))
        return stored.Flat([np.array(ids_of(model, tokenizer, text, add_special_tokens=special), np.int64)])

    def call(texts: list[str]) -> Any:
        with refusing(model):
            return tokenizer(texts, add_special_tokens=False, verbose=False)

    def blocks() -> Iterator[np.ndarray]:
        if not cutting.can_cut(tokenizer):
            yield from whole()
            return
        start, end = around(model, tokenizer) if special else ([], [])
        yield np.array(start, np.int32)
        with progress.track(f"tokenising {data.name}") as advance:
            for block in cutting.tokens(call, rows_of(data, protocol)):
                refuse_unknown(model, [block])
                advance("")
                yield block
        yield np.array(end, np.int32)
        data.refuse_change()

    def whole() -> Iterator[np.ndarray]:
        text = "".join(rows_of(data, protocol))
        yield np.array(ids_of(model, tokenizer, text, add_special_tokens=special), np.int32)
        data.refuse_change()

    name = fingerprint(model, data, protocol, special)
    try:
        return stored.flat(name, "int32", blocks)
    except cutting.NotLocalError:
        return stored.flat(name, "int32", whole)


def of_each(model: Model, tokenizer: Any, data: Dataset) -> stored.Flat:
    """Return the tokens of each text, without special ones, behind how many it has; of a large data set on disk.

    The lines of a file are its texts.
    """

    def blocks() -> Iterator[np.ndarray]:
        texts = data.inputs()
        lines = (line.rstrip("\n") for text in (data.pieces() if data.pieces else texts) for line in io.StringIO(text))
        found = (line for line in lines if line) if data.has_lines else iter(texts)
        while some := list(itertools.islice(found, AT_ONCE)):
            with refusing(model):
                made = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            refuse_unknown(model, made)
            yield np.array([number for ids in made for number in (len(ids), *ids)], np.int32)
        data.refuse_change()

    name = fingerprint(model, data, "each") if data.identity else None
    return stored.flat(name, "int32", blocks) if data.identity else stored.Flat([*blocks()])


def of_rows(model: Model, data: Dataset, texts: Sequence[Any], max_length: int | None, *, full: bool = False) -> Tokens:
    """Return texts as `tokens.tokenise` does; those of a large data set lie on disk.

    Args:
        model, max_length, full: as there.
        data: from which the texts are.
        texts: all of them, or all halves of pairs, or the first of these.
    """
    if data.identity is None:
        return tokenise(model, texts, max_length, full=full)
    import pyarrow

    tokenizer, limit = ready(model, max_length)
    keys = keys_of(model, rows_to_tokens(model, tokenizer, texts[:1], limit))
    name = fingerprint(model, data, "rows", len(texts), isinstance(texts[0], tuple), limit, keys)
    schema = pyarrow.schema([(key, pyarrow.list_(pyarrow.int32())) for key in keys])

    def blocks() -> Iterator[Any]:
        starts = range(0, len(texts), AT_ONCE)
        with progress.track(f"tokenising {data.name}", len(starts)) as advance:
            for start in starts:
                made = rows_to_tokens(model, tokenizer, texts[start : start + AT_ONCE], limit)
                advance("")
                yield pyarrow.record_batch([made[key] for key in keys], schema=schema)
        data.refuse_change()

    table = stored.table(name, lambda: schema, blocks)
    made = {key: Each(len(texts), partial(_list, table[key])) for key in keys}
    lengths = [length for part in table["input_ids"].chunks for length in part.value_lengths().tolist()]
    digest = remembered.value(key_of(name, "digest"), partial(_digest, made)) if name else _digest(made)
    return Tokens(padding(tokenizer, made, limit if full else None), lengths, limit, digest)


def _list(column: Any, row: int) -> list[int]:
    found: list[int] = column[row].as_py()
    return found


def _digest(made: Mapping[str, Sequence[list[int]]]) -> str:
    """Return the digest of `tokens.tokenise`, over what Python writes for a list of all."""
    found = hashlib.sha256(b"[")
    for at, rows in enumerate(made.values()):
        found.update(b", [" if at else b"[")
        for number, row in enumerate(rows):
            found.update(f"{', ' if number else ''}{row}".encode())
        found.update(b"]")
    found.update(b"]")
    return found.hexdigest()


def rows_of(data: Dataset, protocol: str | None = None) -> Iterator[str]:
    """Yield what makes all texts one: each is ended by a new line, or by a protocol two of them stand between.

    There a line of a file is a row, as where WikiText is a data set: with its new line, or empty where it is blank.
    """
    texts = data.pieces() if data.pieces else (data[index][0] for index in range(len(data)))
    if protocol is None:
        for text in texts:
            yield text if text.endswith("\n") else text + "\n"
        return
    lines = (line if line.strip() else "" for text in texts for line in io.StringIO(text))
    held = None
    for row in lines if data.has_lines else texts:
        if held is not None:
            yield held + "\n\n"
        held = row
    if held is not None:
        yield held
