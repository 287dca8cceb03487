"""The tokenizer beside a model."""

from contextlib import AbstractContextManager
from typing import Any

from peftc.errors import DataError, told_as
from peftc.models.model import Model
from peftc.store import pointers

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


def tokenizer_of(model: Model) -> Any:
    """Return the tokenizer that lies beside a model (DataError: there is none)."""
    if model.folder is None or not any(next(model.folder.glob(name), None) for name in TOKENIZERS):
        why = f"none of {', '.join(TOKENIZERS)} lies beside its weights"
        hint = "copy the tokenizer files of the original into its folder"
        raise DataError(f"`{model.name}` has no tokenizer", why=why, hint=hint)
    from transformers import AutoTokenizer

    for name in TOKENIZERS:
        for file in model.folder.glob(name):
            pointers.refuse(file, DataError)
    with refusing(model):
        trusted = model.source.trust_remote_code
        return AutoTokenizer.from_pretrained(model.folder, local_files_only=True, trust_remote_code=trusted)


def refusing(model: Model) -> AbstractContextManager[None]:
    """Refuse files, by whoever they are, on which a tokenizer raises or its Rust code panics (DataError)."""
    return told_as(DataError, f"cannot read the tokenizer of `{model.name}`")
