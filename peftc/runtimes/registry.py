"""Factors for ``create_model`` of timm, as an architecture of its registry that is made of another one.

Others may add architectures to that registry, and not change what one builds. So the folder that `peftc export` writes
names this one, and among its arguments the real one and the factors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model, load_pretrained, register_model
from torch import nn

from peftc.errors import SourceError
from peftc.nn import surgery
from peftc.store import documents, quantization


def register() -> None:
    """Let timm know the architecture; a second time changes nothing."""
    if not is_model(quantization.ARCHITECTURE):
        build.__name__ = quantization.ARCHITECTURE
        register_model(build)


def build(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **arguments: Any,
) -> nn.Module:
    """Return a network of timm with factors, as an entry of its registry is called.

    Raises:
        SourceError: no config says which network and which factors.
    """
    told = arguments.pop(quantization.METHOD, None)
    arguments.pop("pretrained_model_args", None)  # the arguments once more, of a later timm for its own networks
    if why := documents.misfit(told, {**quantization.SHAPE, "architecture": str}):
        hint = 'name a folder of `peftc export --format timm`: `create_model("local-dir:FOLDER", pretrained=True)`'
        raise SourceError(f"`{quantization.ARCHITECTURE}` alone is no network", why=why, hint=hint)
    settings: dict[str, Any] = {"pretrained_cfg": pretrained_cfg, "pretrained_cfg_overlay": pretrained_cfg_overlay}
    network: Any = timm.create_model(told["architecture"], pretrained=False, **settings, **arguments)
    surgery.skip(network, told.get("skipped", {}))
    surgery.apply_edits(network, told["modules"])
    surgery.tie(network, told.get("tied", {}))
    for name in told["modules"]:
        for part in network.get_submodule(name).to_empty(device="cpu").modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    if pretrained:
        shared = {alias: names[0] for names in surgery.stored_names(network).values() for alias in names[1:]}

        def complete(module: nn.Module, state: dict[str, Any], *_: Any) -> None:  # a file holds what is shared once
            state.update({alias: state[name] for alias, name in shared.items() if name in state})

        handle = network.register_load_state_dict_pre_hook(complete)
        load_pretrained(
            network, num_classes=network.num_classes, in_chans=arguments.get("in_chans", 3), cache_dir=cache_dir
        )
        handle.remove()
    return network  # type: ignore[no-any-return]
