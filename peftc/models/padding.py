"""Padding of the classifiers that read the last token of a text, as decoders do.

transformers finds that token by its id: it is the last that is not `pad_token_id` of the config, and without one in the
config only a single text is taken. GPT-2 and Llama, as they are published, have none. So the masked tokens of a batch
get the id of the config or, where that names none, one in which no text of the batch ends: a batch then gives what its
texts give one at a time.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from peftc.errors import DataError
from peftc.models.model import Model
from peftc.models.tokenizer import tokenizer_of

NEVER = -1  # the id of no token: nothing in the batch is padding


def reads_last_token(module: nn.Module) -> bool:
    """Return whether a classifier of transformers reads the last token, which it finds by the id of padding."""
    config, cls = getattr(module, "config", None), type(module)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return _asks_for_padding(cls)  # type: ignore[arg-type]


@lru_cache
def _asks_for_padding(cls: Any) -> bool:
    """Whether its forward looks for padding by id: nothing else in a class of transformers tells."""
    try:
        return cls.__name__.endswith("ForSequenceClassification") and "pad_token_id" in inspect.getsource(cls.forward)
    except (OSError, TypeError):  # no source
        return False


def padding_id(module: Any) -> int | None:
    """Return the id that the config of a classifier names for padding; None where it names none that is a token."""
    config = module.config.get_text_config()
    found = config.pad_token_id
    return found if isinstance(found, int) and 0 <= found < config.vocab_size else None  # Llama 1 says -1


@contextmanager
def told(module: Any, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Give a batch as a network takes it, whose config names meanwhile what pads it (DataError: no id is left)."""
    inner = module if hasattr(module, "config") else getattr(module, "module", module)  # in a launch it is wrapped
    if "input_ids" not in batch or not reads_last_token(inner):
        yield dict(batch)
        return
    config, named = inner.config.get_text_config(), padding_id(inner)
    before = config.pad_token_id
    config.pad_token_id = _unused(batch, config.vocab_size) if named is None else named
    try:
        yield filled(batch, config.pad_token_id)
    finally:
        config.pad_token_id = before


def filled(batch: Mapping[str, Tensor], padding: int) -> dict[str, Tensor]:
    """Return a batch whose masked tokens have an id."""
    mask = batch.get("attention_mask")
    if mask is None or padding == NEVER:
        return dict(batch)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(mask == 0, padding)}


def _unused(batch: Mapping[str, Tensor], tokens: int) -> int:
    """Return the first id in which no text of a batch ends."""
    mask = batch.get("attention_mask")
    if mask is None or mask.is_meta or bool(mask.all()):
        return NEVER
    places = mask.new_tensor(range(mask.shape[1]))
    last = batch["input_ids"].gather(1, (places * (mask != 0)).argmax(1, keepdim=True))
    if free := set(range(min(tokens, len(last) + 1))) - set(last.flatten().tolist()):
        return min(free)
    why = f"its {tokens} tokens all stand at the end of a text"
    raise DataError(f"no token is left to pad a batch of {len(last)} texts", why=why, hint="lower `--batch-size`")


def id_to_write(model: Model) -> int:
    """Return the id for a config that has to name one: of the tokenizer's padding, else the end of a text, else 0."""
    known: list[Any] = [model.config.get("eos_token_id")]
    try:
        tokenizer = tokenizer_of(model)
        known = [tokenizer.pad_token_id, *known, tokenizer.eos_token_id]
    except DataError:  # a network in memory has none
        pass
    ids = [each[0] if isinstance(each, list) and each else each for each in known]
    tokens = model.module.config.get_text_config().vocab_size
    return next((each for each in ids if isinstance(each, int) and 0 <= each < tokens), 0)
