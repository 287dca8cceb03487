"""What is special about a family of models: one row each, matched by library and architecture.

Everything else is found by module type. A row says which modules PELA's eligibility leaves dense there, and why
(papers notes, section 1.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Family:
    """A row: which models, and which of their modules stay dense (pattern over the dotted name -> reason)."""

    library: str
    architecture: str
    skip: Mapping[str, str] = field(default_factory=dict)


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
    Family("timm", "swin*", {"attn.proj": "PELA leaves Swin's attention projection dense"}),
    Family("transformers", "swin*", {"attention.output.dense": "PELA leaves Swin's attention projection dense"}),
    Family("transformers", "*", {"pooler": "pooler"}),
    Family(
        "transformers",
        "*t5*",
        {"wo": "its parent reads the weight at every call, which would multiply the factors out"},
    ),
    Family("transformers", "*clip*", {"*_projection": "contrastive projection"}),
    Family(
        "transformers",
        "*blip*",
        {"vision_proj": "contrastive projection", "text_proj": "contrastive projection", "itm_head": "matching head"},
    ),
)


def skips(library: str, architecture: str) -> dict[str, str]:
    """Return pattern -> reason for a model: the common rows and those of its families."""
    found = dict(COMMON)
    for family in FAMILIES:
        if family.library == library and fnmatchcase(architecture.lower(), family.architecture):
            found.update(family.skip)
    return found


def matches(name: str, pattern: str) -> bool:
    """Return whether ``pattern`` matches the dotted ``name``, or a run of whole components of it."""
    if fnmatchcase(name, pattern):
        return True
    parts, length = name.split("."), pattern.count(".") + 1
    return any(fnmatchcase(".".join(parts[i : i + length]), pattern) for i in range(len(parts) - length + 1))
