"""Retrieval between images and texts: samples, recall over a whole set, and the losses of dual encoders."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.data import tokenised
from peftc.data.dataset import Dataset
from peftc.data.images import reader
from peftc.errors import DataError
from peftc.models import dual, families
from peftc.models.model import Model
from peftc.models.place import moved
from peftc.nn.peers import ALONE, Peers
from peftc.options import Reading
from peftc.tasks.images import refuse_size
from peftc.tasks.task import Batch, Columns, Encoded, Metric, Task

TEMPERATURE = 0.07  # where a network has none of its own, as BLIP's class in transformers (Li et al., 2022)
BLOCK = 1024  # queries ranked at once


# samples


def _encode(model: Model, data: Dataset, settings: Reading) -> Encoded:
    known = data.pairs
    if model.kind != "image-text" or known is None:
        why = f"`image-text-retrieval` needs a tower for each, and it reads {model.kind} inputs"
        raise DataError(f"`{model.name}` does not compare images with texts", why=why, hint="choose another `--task`")
    if not model.preprocess.get("input_size"):
        what = f"`{model.name}` does not say how images become inputs"
        why = "neither preprocessor_config.json nor processor_config.json lies beside its weights"
        hint = "copy it from the original, or give `--preprocess input_size=3,224,224` with `mean` and `std`"
        raise DataError(what, why=why, hint=hint)
    refuse_size(model, settings.image_size, is_fixed=True)
    captions = [known.captions[row] for row in data.rows]
    number: dict[str, int] = {}
    groups = [number.setdefault(caption, len(number)) for caption in captions]
    if len(set(known.captions)) < 2:
        raise DataError(f"`{data.name}` has too few captions to rank", why="all of them are the same text")
    full_texts = any(row.full_texts for row in families.of(type(model.module).__name__))
    tokens = tokenised.of_rows(model, data, captions, settings.max_length, full=full_texts)
    # where CLIP takes the vector of a text; without it, it would look at the first token
    end = getattr(getattr(model.module, "text_model", None), "eos_token_id", None)
    if end not in (None, 2) and not (tokens.pad([0])["input_ids"] == end).any():  # 2 means the highest number to CLIP
        why = f"the network reads the vector of a text at token {end}, and captions do not end with it"
        hint = "set `eos_token_id` of `text_config` in config.json to the token that ends a text"
        raise DataError(f"the tokenizer of `{model.name}` is not the one it was made for", why=why, hint=hint)
    pixels = reader(data, model.preprocess)
    targets = torch.tensor([groups, [known.images[row] for row in data.rows]]).T  # (samples, 2)
    others = next_other(groups) if dual.matching(model.module) and len(number) > 1 else None

    def batch(indices: Sequence[int]) -> Batch:
        rows = list(indices)
        inputs = {"pixel_values": pixels(rows), **tokens.pad(rows)}
        return Batch(inputs, targets[rows], tokens.pad([others[row] for row in rows]) if others else None)

    full = sum(length == tokens.limit for length in tokens.lengths)
    notes = [f"data: {full} captions reach {tokens.limit} tokens and may be cut there"] if full else []
    key = f"{sorted(model.preprocess.items(), key=str)} {tokens.digest} {others is not None}"
    return Encoded(len(captions), batch, key, tokens.lengths, notes)


def next_other(groups: Sequence[int]) -> list[int]:
    """Return for each sample the next one, the first after the last, that has another caption."""
    size = len(groups)
    found = list(range(size))
    for at in reversed(range(2 * size - 1)):  # twice around, for runs that go over the end
        one, other = at % size, (at + 1) % size
        found[one] = found[other] if groups[one] == groups[other] else other
    return found


# figures


def _run(model: Model, batch: Batch) -> Tensor:
    """Return (batch, rows, width): what `dual.stacked` says, with the scores of other texts as a fourth row."""
    with torch.inference_mode():
        found = dual.towers(model.module, moved(model, batch.inputs))  # type: ignore[arg-type]
        if found is None:
            why = "its outputs have no `image_embeds` and `text_embeds` of one shape"
            hint = "choose another `--task`"
            raise DataError(f"`{model.name}` gives no vector per image and per text", why=why, hint=hint)
        if found.patches is None or batch.others is None:
            return dual.stacked(found)
        return dual.stacked(found, dual.matched(model.module, found.patches, moved(model, batch.others)))  # type: ignore[arg-type]


def _observe(outputs: Tensor, batch: Batch) -> Columns:
    rows = outputs.float().cpu().numpy()
    columns = {"image": rows[:, 0], "text": rows[:, 1]}
    columns |= {"caption": batch.targets[:, 0].numpy(), "picture": batch.targets[:, 1].numpy()}
    if rows.shape[1] == 4 and batch.others is not None:
        own, other = (rows[:, at, 1] - rows[:, at, 0] for at in (2, 3))
        columns["matching"] = own > other
    return columns


def ranks(columns: Columns) -> Columns:
    """Rank every caption's images and every image's captions by the product of their vectors.

    Each distinct caption and each distinct image is a query once and stands in the gallery once. Any image that some
    row pairs with a caption is right for it, and the other way round; what ties with the best right answer stands
    before it, so that a network that says the same of everything finds nothing.

    Args:
        columns: ``image`` and ``text`` (rows, width), ``caption`` and ``picture`` (rows,), which number the distinct.

    Returns:
        ``image_rank`` and ``text_rank``, the rank of the best right answer from 1; ``new_caption`` and ``new_picture``,
        whether a row is the first of its caption or image; ``matching`` as it is.
    """
    _, caption_at, caption = np.unique(columns["caption"], return_index=True, return_inverse=True)
    _, picture_at, picture = np.unique(columns["picture"], return_index=True, return_inverse=True)
    texts, images = columns["text"][caption_at], columns["image"][picture_at]
    first = np.arange(len(caption))
    return {
        "image_rank": _ranks(texts, images, caption, picture)[caption],
        "text_rank": _ranks(images, texts, picture, caption)[picture],
        "new_caption": caption_at[caption] == first,
        "new_picture": picture_at[picture] == first,
        **{name: columns[name] for name in ("matching",) if name in columns},
    }


def _ranks(queries: np.ndarray, gallery: np.ndarray, asked: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return (queries,): the rank of the best right answer; row i says that ``right[i]`` is one for ``asked[i]``."""
    found: np.ndarray = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ gallery.T
        rows = (asked >= start) & (asked < start + BLOCK)
        is_right = np.zeros(scores.shape, dtype=bool)
        is_right[asked[rows] - start, right[rows]] = True
        best = np.where(is_right, scores, -np.inf).max(1, keepdims=True)
        found[start : start + BLOCK] = 1 + ((scores >= best) & ~is_right).sum(1)
    return found


def _within(rank: str, queries: str, most: int) -> Callable[[Columns], np.ndarray]:
    return lambda columns: (columns[rank] <= most)[columns[queries]]


METRICS = (
    Metric("text_to_image_r1", _within("image_rank", "new_caption", 1), True),
    Metric("image_to_text_r1", _within("text_rank", "new_picture", 1), True),
    Metric("text_to_image_r5", _within("image_rank", "new_caption", 5), True),
    Metric("image_to_text_r5", _within("text_rank", "new_picture", 5), True),
    Metric("matching", itemgetter("matching"), True, column="matching"),
)
MADE_FOR = families.known("retrieval")
TASK = Task("image-text-retrieval", ("image-text",), MADE_FOR, _encode, _observe, METRICS, 32, run=_run, over_all=ranks)


# losses


def losses(
    module: nn.Module, found: dual.Towers, inputs: Mapping[str, Tensor], peers: Peers = ALONE
) -> dict[str, Tensor]:
    """Return the losses that a dual encoder is trained with, each a scalar, by name; their sum is the task's loss.

    ``contrastive`` is the symmetric cross-entropy over the batch of CLIP (Radford et al., 2021, section 2.3), or, for a
    network with a bias of its own, SigLIP's sigmoid loss (Zhai et al., 2023, equation 1). ``matching``, for a network
    with a matching head, is the cross-entropy over the pairs and, once each, over every image with the text before it,
    for which the fusion layers run once more. Equal texts of a batch count as right for each other's images, and are
    never taken for a wrong pair.

    Args:
        module: a dual encoder.
        found: what it gave for the batch, with gradients.
        inputs: of the batch.
        peers: whose batches are one with this: every image meets the texts of all, and the mean over them of what each
            returns is the loss of one process with all pairs.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    ids = peers.all(ids if mask is None else ids.masked_fill(mask == 0, -1), fill=-1)  # (pairs, tokens)
    same = (ids[:, None] == ids[None]).all(-1)  # (pairs, pairs)
    image, text = peers.all(torch.stack([found.image.float(), found.text.float()], 1)).unbind(1)
    terms = {"contrastive": contrastive(module, image, text, same)}
    if found.matching is not None and found.patches is not None:
        texts = {key: peers.all(tensor) for key, tensor in inputs.items() if key != "pixel_values"}
        before = {key: peers.own(tensor.roll(1, 0)) for key, tensor in texts.items()}
        is_wrong = ~same.roll(1, 1).diagonal()
        scores = torch.cat([found.matching, dual.matched(module, found.patches, before)[peers.own(is_wrong)]])
        belong = torch.arange(len(scores), device=scores.device) < len(found.matching)
        total = F.cross_entropy(scores.float(), belong.long(), reduction="sum")
        terms["matching"] = total * peers.number / (len(same) + is_wrong.sum())
    return terms


def contrastive(module: nn.Module, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
    """Return the contrastive loss of pairs, in nats.

    Args:
        module: for its ``logit_scale`` and ``logit_bias``, if it has them.
        image, text: (pairs, width), normalised, float32.
        same: (pairs, pairs), where the texts are equal.
    """
    scale = getattr(module, "logit_scale", None)
    scores = image @ text.T  # (images, texts)
    scores = scores / TEMPERATURE if scale is None else scores * scale.float().exp()
    bias = getattr(module, "logit_bias", None)
    if bias is not None:
        return -F.logsigmoid((scores + bias.float()) * (2 * same.float() - 1)).sum(1).mean()
    right = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
