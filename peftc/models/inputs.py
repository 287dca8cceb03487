"""What a network reads, and a random batch of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import SourceError, reason_of
from peftc.models import dual, families, padding
from peftc.models.model import Batch, Model
from peftc.models.place import place_of
from peftc.nn import surgery

APART = "places"  # in a batch: the places of tokens, each text of a window counted from 0
# what a network may raise on an input that was made up for it
DOES_NOT_RUN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


def probe(
    model: Model, *, batch: int = 1, image_size: int | None = None, max_length: int | None = None, seed: int = 0
) -> Batch:
    """Return a random batch that the network accepts, on its device and in its dtype.

    Args:
        model: loaded; its parameters may be on the meta device, and then so is the batch.
        image_size: side of the images in pixels; the model's own, or 224, when None.
        max_length: tokens; 32 when None.
    """
    first = next(iter(model.module.parameters()))
    dtype = surgery.uniform_dtype(model.module) or torch.float32
    generator = torch.Generator().manual_seed(seed)
    kind = model.kind
    known = [getattr(_config(model, "text_config"), name, None) for name in families.known("positions")]
    limits = [int(limit) - 2 for limit in known if isinstance(limit, int) and limit > 2]  # RoBERTa's start at 2
    length = max_length or min([32, *limits])

    def images() -> Tensor:
        size = model.preprocess.get("input_size")
        if not size:
            conv = next((m for m in model.module.modules() if isinstance(m, nn.Conv2d)), None)
            side = getattr(_config(model, "vision_config"), "image_size", 224)
            size = (3 if conv is None else conv.in_channels, *((side, side) if isinstance(side, int) else side))
        shape = size[0], int(image_size or size[1]), int(image_size or size[2])
        return torch.randn(batch, *shape, generator=generator).to(first.device, dtype)

    def ids() -> Tensor:
        drawn = torch.randint(0, vocabulary(model), (batch, length), generator=generator)
        end = getattr(_config(model, "text_config"), "eos_token_id", None)
        if kind == "image-text" and isinstance(end, int) and 0 <= end < vocabulary(model):
            drawn[:, -1] = end  # where CLIP takes the vector of a text
        return drawn.to(first.device)

    if model.library != "transformers" and kind == "other":
        linear = next((m for m in model.module.modules() if isinstance(m, nn.Linear)), None)
        if linear is None:
            why = "it has no convolution, embedding or linear module"
            raise SourceError(f"cannot guess what `{model.name}` reads", why=why)
        return torch.randn(batch, linear.in_features, generator=generator).to(first.device, dtype)
    if model.library != "transformers":
        return images() if kind == "image" else ids()
    inputs: dict[str, Tensor] = {}
    if "text" in kind:
        inputs["input_ids"] = ids()
        if not first.is_meta:  # masks are looked into, and a meta tensor holds nothing to see
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "image" in kind:
        inputs["pixel_values"] = images()
    if not inputs:
        why = f"its main input is `{getattr(model.module, 'main_input_name', '?')}`"
        raise SourceError(f"cannot make an input for `{model.name}`", why=why)
    if getattr(model.module.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids()
    return inputs


def vocabulary(model: Model) -> int:
    """Return how many tokens a network of texts knows."""
    if known := getattr(_config(model, "text_config"), "vocab_size", None):
        return int(known)
    table = next(m for m in model.module.modules() if isinstance(m, nn.Embedding))
    return table.num_embeddings


def _config(model: Model, part: str) -> Any:
    """Return a part of a network's config, or all of it where it has no parts; None where there is none."""
    config = getattr(model.module, "config", None)
    return getattr(config, part, config)


@contextmanager
def taken(model: Model) -> Iterator[None]:
    """Say so where a network does not take an input that was made up for it (SourceError: it did not)."""
    try:
        yield
    except DOES_NOT_RUN as error:
        hint = "look at its config: do its sizes fit one another?"
        raise SourceError(f"`{model.name}` does not run on a random input", why=reason_of(error), hint=hint) from error


@contextmanager
def still(model: Model) -> Iterator[None]:
    """Keep no gradients, and let random draws, as of a mask, be the same at every call."""
    place = place_of(model.module)
    # what is put together from pieces under `inference_mode` could not be trained on afterwards
    without = torch.inference_mode if model.shards is None else torch.no_grad
    with without(), torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def outputs(model: Model, batch: Batch) -> Tensor:
    """Return the main output for a batch, without gradients, and with the same random draws at every call."""
    with still(model):
        return forward(model, batch)


def run(module: nn.Module, batch: Batch) -> Any:
    """Return what a network gives for a batch; texts of one window do not see each other where their places say so.

    transformers looks at the places alone where no mask and no cache of keys is given.
    """
    if not isinstance(batch, dict):
        return module(batch)
    with padding.told(module, batch) as known:
        if (places := known.pop(APART, None)) is not None:
            known = {"input_ids": known["input_ids"], "position_ids": places, "use_cache": False}
        return module(**known)


def mask_of(inputs: Tensor | Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens of inputs are no padding, (batch, tokens); None where nothing says it."""
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def mask_of_outputs(inputs: Tensor | Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens of the outputs count; those of pairs of image and text are no tokens."""
    return None if isinstance(inputs, Mapping) and "pixel_values" in inputs else mask_of(inputs)


def forward(model: Model, batch: Batch) -> Tensor:
    """Return the network's main output for a batch: logits, the last hidden state, or the rows of `dual.stacked`."""
    value = run(model.module, batch)
    if isinstance(batch, dict) and dual.matching(model.module):
        return dual.stacked(dual.of_pairs(model.module, batch, value))
    return main_output(model, value)


def main_output(model: Model, value: Any) -> Tensor:
    """Return the tensor that matters of what a network returned."""
    vectors = dual.of_vectors(value)
    if vectors is not None:
        return dual.stacked(vectors)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(value, name, None) is not None:
            return getattr(value, name)
    while not isinstance(value, Tensor):
        if isinstance(value, dict):
            value = next(iter(value.values()))
        elif isinstance(value, list | tuple) and value:
            value = value[0]
        else:
            raise SourceError(f"`{model.name}` returns a {type(value).__name__}, in which peftc finds no tensor")
    return value
