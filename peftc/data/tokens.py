"""Texts to tokens: the tokenizer beside a model, what the model takes, and texts drawn from a model."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc import progress
from peftc.data.dataset import Dataset
from peftc.data.spec import GENERATED
from peftc.errors import DataError, UsageError, WeightError
from peftc.models.inputs import vocabulary
from peftc.models.model import Model
from peftc.models.padding import reads_last_token
from peftc.models.place import place_of
from peftc.models.tokenizer import refusing, tokenizer_of

IGNORED = -100  # a target that is not predicted
LONGEST = 512  # tokens, where neither the user nor the model asks for fewer
GENERATED_LENGTH = 128  # tokens of a text that is drawn, where `--max-length` is not given


def window(model: Model, max_length: int | None, tokenizer: Any = None, *, least: int = 2, usual: int = LONGEST) -> int:
    """Return how many tokens a sample may have: as asked, at least ``least``; else what it takes, up to ``usual``."""
    config = model.config.get("text_config") or model.config
    known = [config.get(key) for key in ("max_position_embeddings", "n_positions")]
    inner = getattr(getattr(model.module, "config", None), "text_config", None)  # a file may leave out what is usual
    most = getattr(tokenizer, "model_max_length", None)
    if not isinstance(most, int | float | None):
        raise DataError(f"cannot read the tokenizer of `{model.name}`", why=f"`model_max_length` is {most!r}")
    known += [getattr(inner, "max_position_embeddings", None), most]
    limit = min((int(value) for value in known if value), default=sys.maxsize)
    if max_length is None:
        return min(limit, usual)
    if max_length < least:
        raise UsageError(f"`--max-length` is {max_length}", why=f"at least {least} tokens are needed")
    if max_length > limit:
        raise DataError(f"`{model.name}` takes at most {limit} tokens", why=f"`--max-length` asks for {max_length}")
    return max_length


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts."""

    pad: Callable[[Sequence[int]], dict[str, Tensor]]  # gives rows as one padded batch
    lengths: list[int]  # tokens of each text
    limit: int  # where longer texts were cut
    digest: str  # the sha256 over all tokens


def tokenise(model: Model, texts: Sequence[Any], max_length: int | None, *, full: bool = False) -> Tokens:
    """Tokenise texts, or pairs of texts that one input joins, keeping what the model's forward takes.

    Args:
        model: with the files of its tokenizer.
        texts: str each, or two of them.
        max_length: tokens, where longer texts are cut; what the model takes when None.
        full: pad every text to that length, for a model that was trained so.
    """
    tokenizer, limit = ready(model, max_length)
    made = rows_to_tokens(model, tokenizer, texts, limit)
    keys = keys_of(model, made)
    pad = padding(tokenizer, {key: made[key] for key in keys}, limit if full else None)
    digest = hashlib.sha256(repr([made[key] for key in keys]).encode()).hexdigest()
    return Tokens(pad, [len(ids) for ids in made["input_ids"]], limit, digest)


def ready(model: Model, max_length: int | None) -> tuple[Any, int]:
    """Return a model's tokenizer, which can pad, and how many tokens a text may have."""
    tokenizer = tokenizer_of(model)
    if tokenizer.pad_token is None:  # what pads is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    if reads_last_token(model.module):
        tokenizer.padding_side = "right"  # positions are counted from the left, so a text behind padding is another
    return tokenizer, window(model, max_length, tokenizer)


def rows_to_tokens(model: Model, tokenizer: Any, texts: Sequence[Any], limit: int) -> Any:
    """Return what a tokenizer makes of texts, or pairs of texts, all of which the model has to know."""
    is_pair = isinstance(texts[0], tuple)
    firsts, seconds = ([text[at] for text in texts] for at in (0, 1)) if is_pair else (list(texts), None)
    with refusing(model):
        made = tokenizer(firsts, seconds, truncation=True, max_length=limit)
    refuse_unknown(model, [*made["input_ids"], [tokenizer.pad_token_id or 0]])
    return made


def keys_of(model: Model, made: Any) -> list[str]:
    """Return which parts of what a tokenizer makes the model's forward takes."""
    return [key for key in made if key in inspect.signature(model.module.forward).parameters]


def padding(
    tokenizer: Any, made: Mapping[str, Sequence[Any]], full: int | None
) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """Return the function from rows to one batch of them, padded to the longest, or to a length."""

    def pad(rows: Sequence[int]) -> dict[str, Tensor]:
        chosen = {key: [values[row] for row in rows] for key, values in made.items()}
        length = {} if full is None else {"padding": "max_length", "max_length": full}
        return dict(tokenizer.pad(chosen, return_tensors="pt", **length))

    return pad


def ids_of(model: Model, tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return the tokens of one long text, all of which the model has to know."""
    with refusing(model):
        ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    refuse_unknown(model, [ids])
    return ids


def refuse_unknown(model: Model, rows: Iterable[Any]) -> None:
    """Refuse tokens that a model does not know (DataError); ``rows`` are lists or arrays of them."""
    words, most = vocabulary(model), max((_largest(ids) for ids in rows), default=0)
    if most >= words:
        why = f"the model knows {words:,} tokens, from 0 on"
        hint = "put the tokenizer files beside it that it was trained with"
        raise DataError(f"the tokenizer of `{model.name}` gives the token {most:,}", why=why, hint=hint)


def _largest(ids: Any) -> int:
    return int(ids.max()) if isinstance(ids, np.ndarray) and len(ids) else max(ids, default=0)


def start_of(model: Model, tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text; none for most models that were trained without.

    A model that always saw one first makes little of a window that begins without it: Gemma 3 270M has a perplexity of
    78 there, and of 41 with it.
    """
    return around(model, tokenizer)[0]


def around(model: Model, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before a text, and those that it puts behind it."""
    whole, bare = (ids_of(model, tokenizer, "a", add_special_tokens=special) for special in (True, False))
    at = next((at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def number_to_draw(spec: str, model: Model, task: str | None) -> int:
    """Return the N of ``generated:N``, for a model whose task is to write text."""
    number = spec.removeprefix(GENERATED)
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(f"`--data {spec}` asks for no number of sequences", hint="write it as `--data generated:64`")
    if task != "causal-lm":
        raise DataError(f"cannot draw text from `{model.name}`", why="`generated:N` is for causal language models")
    return int(number)


def length_to_draw(model: Model, max_length: int | None) -> int:
    """Return the tokens of each sequence to be drawn."""
    return min(window(model, max_length), max_length or GENERATED_LENGTH)


def sample(model: Model, number: int, length: int, *, seed: int) -> Dataset:
    """Draw sequences from a causal language model: ancestral sampling at temperature 1, from its first token on.

    Every sequence has ``length`` tokens, the first included, whatever they are: the expected excess nll of another
    model on them is then exactly its divergence from this one.
    """
    config = model.config.get("text_config") or model.config
    start = next((config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None), None)
    start = start[0] if isinstance(start, list) else start
    if start is None:
        raise DataError(f"cannot draw text from `{model.name}`", why="its config names no first token (`bos_token_id`)")
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    batch_size = 32 if model.max_memory is None else 1
    with progress.track("drawing text from the model", number) as advance:
        while (done := sum(len(part) for part in parts)) < number:
            parts.append(_draw(model, start, min(batch_size, number - done), length, generator))
            for _ in parts[-1]:
                advance("")
    tokens = torch.cat(parts)

    def content(row: int) -> bytes:
        return tokens[row].numpy().tobytes()

    return Dataset("tensor", f"{GENERATED}{number}", "generated", tokens.__getitem__, content, range(number))


def _draw(model: Model, start: int, number: int, length: int, generator: torch.Generator) -> Tensor:
    device = place_of(model.module)
    tokens = torch.full((number, 1), start, device=device)
    taken = inspect.signature(model.module.forward).parameters
    word = "cache" if "cache" in taken else "past_key_values"  # the older name, which 5.24 warns of
    cache: Any = None
    with torch.inference_mode():
        while tokens.shape[1] < length:
            fresh = tokens if cache is None else tokens[:, -1:]
            out = model.module(input_ids=fresh, use_cache=True, **{word: cache})
            cache = getattr(out, word, None)
            chances = out.logits[:, -1].float().softmax(-1).cpu()  # drawn on the CPU: the same text on every device
            if not chances.isfinite().all():
                raise WeightError(f"`{model.name}` gives NaN or infinite outputs", why="no text can be drawn from it")
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator).to(device)], 1)
    return tokens.cpu()
