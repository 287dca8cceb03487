"""Data tokenised once: the tokens lie on disk, named by content, tokenizer and settings, and are mapped into memory."""

import hashlib
import io
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from peftc.data import cutting, stored
from peftc.data.dataset import Dataset
from peftc.data.remembered import key_of
from peftc.data.tokens import around, ids_of, refuse_unknown
from peftc.errors import DataError
from peftc.models.model import Model
from peftc.models.tokenizer import TOKENIZERS, refusing

BESIDE = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "*.py")  # what a tokenizer reads beside
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

    def blocks() -> Iterator[np.ndarray]:
        start, end = around(model, tokenizer) if special else ([], [])
        yield np.array(start, np.int32)
        with refusing(model):
            for block in cutting.tokens(tokenizer, rows_of(data, protocol)):
                refuse_unknown(model, [block])
                yield block
        yield np.array(end, np.int32)
        refuse_change(data)

    def whole() -> Iterator[np.ndarray]:
        text = "".join(rows_of(data, protocol))
        yield np.array(ids_of(model, tokenizer, text, add_special_tokens=special), np.int32)
        refuse_change(data)

    name = fingerprint(model, data, protocol, special)
    try:
        return stored.flat(name, "int32", blocks if cutting.can_cut(tokenizer) else whole)
    except cutting.NotLocalError:
        return stored.flat(name, "int32", whole)


def refuse_change(data: Dataset) -> None:
    """Refuse data that were written to since they were opened (DataError): nothing may be kept of them."""
    if data.identity is not None and data.identity() != data.begun:
        raise DataError(f"`{data.name}` changed while it was read", hint="run again when nothing writes to it")


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
