"""What is special about a family of models: one row each, matched by library and architecture.

Everything else is found by module type. To add a family is to add a row; which modules stay dense is PELA's eligibility
(papers notes, section 1.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Matching:
    """Names in a network whose text encoder fuses a text with an image, for a head that tells whether they belong."""

    text_encoder: str  # a module, as the three below
    image_projection: str
    text_projection: str
    head: str
    scores: str  # the output of the head in what the network returns
    fused: tuple[str, ...]  # how the names of modules of the text encoder end that read image patches


@dataclass(frozen=True)
class Family:
    """A row: which models, and what peftc has to know of them; all rows that match a model add up."""

    library: str  # ``timm`` or ``transformers``
    architecture: str  # pattern over the name of a class or of timm's architecture, in lower case
    skip: Mapping[str, str] = field(default_factory=dict)  # pattern over dotted names -> why those stay dense
    counts: tuple[str, ...] = ()  # config keys that count layers; these three are tried for all models of the library
    stages: tuple[str, ...] = ()  # config keys that list a count for each stage
    positions: tuple[str, ...] = ()  # config keys that say how many tokens there may be
    image_parts: tuple[str, ...] = ()  # how the names of the modules of an image tower start
    class_token: bool = False  # whether a token at the start of a text stands for all of it
    full_texts: bool = False  # whether texts are padded to the whole length
    retrieval: str = ""  # the class that gives a vector per image and per text
    matching: Matching | None = None  # what that class has beside its towers


INPUTS: Mapping[str, str] = {"input_ids": "text", "pixel_values": "image"}  # the main input of a network -> its kind

# a pattern matches a whole dotted name or a run of whole components of it: `head` is not `multihead_attn`
COMMON: Mapping[str, str] = {
    "head": "output head",
    "heads": "output head",
    "head_dist": "output head",
    "classifier": "output head",
    "lm_head": "output head",
    "score": "output head",
    "cls": "output head",
    "qa_outputs": "output head",
    "*norm*": "normalisation",
    "patch_embed*": "patch embedding",
    "embeddings": "embedding",
    "pos_embed*": "embedding",
}
LINEAR_ONLY: Mapping[str, str] = {"downsample": "patch merging"}  # in a ResNet, `downsample` is an ordinary 1 x 1 conv

FAMILIES = (
    Family("timm", "*", counts=("depth",), stages=("depths", "layers")),
    Family("timm", "swin*", {"attn.proj": "PELA leaves Swin's attention projection dense"}),
    Family("transformers", "swin*", {"attention.output.dense": "PELA leaves Swin's attention projection dense"}),
    Family(
        "transformers",
        "*",
        {"pooler": "pooler"},
        counts=(
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_encoder_layers",
            "num_decoder_layers",
            "depth",
        ),
        stages=("depths", "layers"),
        positions=("max_position_embeddings", "n_positions", "max_target_positions"),
        image_parts=("vision", "visual"),
    ),
    *(Family("transformers", f"*{name}*", class_token=True) for name in ("bert", "electra", "mpnet", "ernie")),
    Family(
        "transformers",
        "*t5*",
        {"wo": "its parent reads the weight at every call, which would multiply the factors out"},
    ),
    Family("transformers", "*clip*", {"*_projection": "contrastive projection"}, retrieval="CLIPModel"),
    Family("transformers", "siglip*", full_texts=True, retrieval="SiglipModel"),
    Family(
        "transformers",
        "*blip*",
        {"vision_proj": "contrastive projection", "text_proj": "contrastive projection", "itm_head": "matching head"},
        retrieval="BlipForImageTextRetrieval",
        matching=Matching(
            text_encoder="text_encoder",
            image_projection="vision_proj",
            text_projection="text_proj",
            head="itm_head",
            scores="itm_score",
            fused=(".crossattention.self.key", ".crossattention.self.value"),
        ),
    ),
)


def of(architecture: str, library: str = "transformers") -> list[Family]:
    """Return the rows of a model, by the name of its class or architecture."""
    name = architecture.lower()
    return [row for row in FAMILIES if row.library == library and fnmatchcase(name, row.architecture)]


def known(what: str, library: str = "transformers") -> tuple[Any, ...]:
    """Return what the rows of a library say under one of their fields, those that say something, each once."""
    said = [getattr(row, what) for row in FAMILIES if row.library == library]
    return tuple(dict.fromkeys(each for one in said if one for each in (one if isinstance(one, tuple) else (one,))))


def skips(library: str, architecture: str) -> dict[str, str]:
    """Return pattern -> reason for a model: the common rows and those of its families."""
    return dict(COMMON) | {pattern: why for row in of(architecture, library) for pattern, why in row.skip.items()}


def matches(name: str, *patterns: str) -> bool:
    """Return whether one of the patterns matches the dotted ``name``, or a run of whole components of it."""
    parts = name.split(".")
    for pattern in patterns:
        length = pattern.count(".") + 1
        runs = (".".join(parts[at : at + length]) for at in range(len(parts) - length + 1))
        if fnmatchcase(name, pattern) or any(fnmatchcase(run, pattern) for run in runs):
            return True
    return False
