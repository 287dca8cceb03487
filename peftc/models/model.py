"""A network with its weights and all that must travel with it."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from peftc.models import families
from peftc.store.header import TensorInfo
from peftc.store.manifest import Manifest
from peftc.store.source import Source

PREPROCESS = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode")  # what may be said of images


@dataclass(frozen=True)
class Shards:
    """What is known of a network that lies in pieces in several processes.

    Attributes:
        layers: names of its layers, found while it was whole.
        whole: the same network before, its weights on their files.
    """

    layers: tuple[str, ...]
    whole: nn.Module


@dataclass
class Model:
    """A network with its weights and all that must travel with it."""

    module: nn.Module  # in eval mode; parameters are mapped from the file unless moved
    source: Source  # what the user named
    library: str  # ``timm``, ``transformers`` or ``python``
    config: dict[str, Any]  # content of ``config.json``; empty for ``python``
    base: dict[str, Any]  # the manifest's record of the base network
    name: str  # a short name for folders and tables
    folder: Path | None = None  # where tokenizer and processor files lie, or None
    preprocess: dict[str, Any] = field(default_factory=dict)  # input_size, mean, std, crop_pct, interpolation
    labels: list[str] | None = None  # class names in output order, where known
    manifest: Manifest | None = None  # when the source is an artifact
    infos: dict[str, TensorInfo] = field(default_factory=dict)  # name -> bytes of a file; without those in memory
    files: list[Path] = field(default_factory=list)  # the weight files
    notes: list[str] = field(default_factory=list)  # what people should know about how it was loaded
    max_memory: int | None = None  # bytes that running it may take; None for no limit
    hub: tuple[str, str] | None = None  # of a fetched artifact: ``owner/name`` and commit
    shards: Shards | None = None  # where its module lies in pieces, see `peftc.models.sharding`

    @property
    def kind(self) -> str:
        """What it reads: ``image``, ``text``, ``image-text`` or ``other``, by main input or first module."""
        module: Any = self.module
        if self.library == "timm":
            return "image"
        if self.library == "transformers":
            if hasattr(module.config, "text_config") and hasattr(module.config, "vision_config"):
                return "image-text"
            return families.INPUTS.get(getattr(module, "main_input_name", ""), "other")
        kinds = {nn.Conv2d: "image", nn.Embedding: "text", nn.Linear: "other"}
        found = (kind for child in module.modules() for cls, kind in kinds.items() if isinstance(child, cls))
        return next(found, "other")

    @property
    def place(self) -> dict[str, str]:
        """How a record names it: as it was named, or the commit of the hub where it was fetched."""
        return {"spec": f"hf:{self.hub[0]}", "revision": self.hub[1]} if self.hub else {"spec": self.source.spec}

    @property
    def architecture(self) -> str:
        """The name of the network's class or timm architecture."""
        return str(self.base.get("architecture", ""))


def detached(module: nn.Module) -> nn.Module:
    """Return a copy of a network that shares its tensors, so that moving or editing it leaves the original alone."""
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


Batch: TypeAlias = "Tensor | dict[str, Tensor]"
