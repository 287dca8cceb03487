"""What a dual encoder gives: a vector per image and one per text, and scores where a head compares both.

BLIP (Li et al., 2022, arXiv:2201.12086, section 3.1) has, beside the towers, layers that fuse a text with an image,
and a matching head on top of them; one pass through everything gives the outputs that all steps of peftc look at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.models import families


@dataclass(frozen=True)
class Towers:
    """What one forward pass of a batch of pairs gave."""

    image: Tensor  # (batch, width), normalised, as is text
    text: Tensor
    matching: Tensor | None = None  # (batch, 2): does not, does belong together; None without such a head
    patches: Tensor | None = None  # (batch, patches, width of the image tower), to match other texts with


def matching(module: nn.Module) -> families.Matching | None:
    """Return what a network's fusion layers and matching head are called; None where peftc knows of none."""
    name = type(module).__name__
    return next((row.matching for row in families.of(name) if row.retrieval == name), None)


def reads_image(name: str) -> bool:
    """Return whether a module of a dual encoder reads image patches, so that padding of texts says nothing there."""
    fused = tuple(end for parts in families.known("matching") for end in parts.fused)
    return name.split(".")[0].startswith(families.known("image_parts")) or name.endswith(fused)


def towers(module: Any, inputs: Mapping[str, Tensor]) -> Towers | None:
    """Run each tower once, and the fusion layers once on the pairs; None for what gives no vector of either."""
    value = module(**inputs)
    return of_pairs(module, inputs, value) if matching(module) else of_vectors(value)


def of_vectors(value: Any) -> Towers | None:
    """Return the vectors among what a network returned, if it names both."""
    image, text = getattr(value, "image_embeds", None), getattr(value, "text_embeds", None)
    is_pair = isinstance(image, Tensor) and isinstance(text, Tensor) and image.ndim == 2 and image.shape == text.shape
    return Towers(image, text) if is_pair else None


def of_pairs(module: Any, inputs: Mapping[str, Tensor], value: Any) -> Towers:
    """Return what a network with a matching head gives, after its forward on the pairs; the text tower runs now."""
    parts = matching(module)
    assert parts is not None
    patches = value.last_hidden_state
    texts = {key: tensor for key, tensor in inputs.items() if key != "pixel_values"}
    words = getattr(module, parts.text_encoder)(**texts).last_hidden_state
    image = F.normalize(getattr(module, parts.image_projection)(patches[:, 0]), dim=-1)
    text = F.normalize(getattr(module, parts.text_projection)(words[:, 0]), dim=-1)
    return Towers(image, text, getattr(value, parts.scores), patches)


def matched(module: Any, patches: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
    """Return (batch, 2): the scores of other texts with images whose ``patches`` are known."""
    parts = matching(module)
    assert parts is not None
    seen = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    encoder = getattr(module, parts.text_encoder)
    fused = encoder(**texts, encoder_hidden_states=patches, encoder_attention_mask=seen)
    return getattr(module, parts.head)(fused.last_hidden_state[:, 0])


def stacked(found: Towers, *scores: Tensor) -> Tensor:
    """Return the outputs of a dual encoder as one tensor (batch, 2 + rows of scores, width).

    The rows of each pair are its image vector, its text vector, its matching scores, and further scores, zeros behind
    the two scores of a row.
    """
    width = found.image.shape[1]
    padded = [F.pad(each, (0, width - each.shape[1])) for each in (found.matching, *scores) if each is not None]
    return torch.stack([found.image, found.text, *padded], 1)
