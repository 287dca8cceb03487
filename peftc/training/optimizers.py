"""The optimizers of a training by name: those of torch, and of bitsandbytes in 8 bits or in memory that pages."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from peftc.errors import PeftcError
from peftc.models import sharding


class Optimizer(NamedTuple):
    """Where one is: its class, the package that holds it, and what it is made with beside rate and decay."""

    kind: str
    package: str = "torch"
    options: Mapping[str, Any] = {}


TABLE = {
    "adamw": Optimizer("AdamW"),
    "adam": Optimizer("Adam"),
    "nadam": Optimizer("NAdam"),
    "radam": Optimizer("RAdam"),
    "adamax": Optimizer("Adamax"),
    "adafactor": Optimizer("Adafactor"),
    "adagrad": Optimizer("Adagrad"),
    "rmsprop": Optimizer("RMSprop"),
    "sgd": Optimizer("SGD", options={"momentum": 0.9}),
    "adamw-8bit": Optimizer("AdamW8bit", "bitsandbytes"),
    "paged-adamw": Optimizer("PagedAdamW", "bitsandbytes"),
    "paged-adamw-8bit": Optimizer("PagedAdamW8bit", "bitsandbytes"),
}
FUSED = ("AdamW", "Adam", "SGD", "Adagrad")  # of torch: a step is one pass over weights, gradients and moments
FUSED_IN_PIECES = ("AdamW", "Adam")  # of weights that are cut over processes


def optimizer_of(
    name: str, module: nn.Module, *, learning_rate: float, weight_decay: float, place: torch.device
) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters of a module that learn; those of fewer than two axes do not decay.

    Args:
        name: of the `TABLE`.
        module: whose parameters lie where they will be trained.
        learning_rate: the highest of the schedule.
        weight_decay: as its class reads it.
        place: where the parameters lie.

    Raises:
        PeftcError: its package is not there, or has nothing for this device.
    """
    row = TABLE[name]
    options: dict[str, Any] = {"lr": learning_rate, **row.options}
    if row.package == "torch":
        kinds: Any = torch.optim
        fused = FUSED_IN_PIECES if sharding.is_cut(module) else FUSED
        if row.kind in fused and place.type in ("cpu", "cuda"):
            options["fused"] = True
    else:
        kinds = _bitsandbytes(name, place)
    return getattr(kinds, row.kind)(_groups(module, weight_decay), **options)  # type: ignore[no-any-return]


def _bitsandbytes(name: str, place: torch.device) -> Any:
    """Return the optimizers of bitsandbytes."""
    if place.type != "cuda":
        why = f"the training computes on `{place.type}`"
        raise PeftcError(f"`--optimizer {name}` needs a GPU", why=why, hint="use `--optimizer adamw`")
    try:
        from bitsandbytes import optim
    except ImportError as error:
        hint = "`pip install bitsandbytes`, or use `--optimizer adamw`"
        raise PeftcError(f"`--optimizer {name}` needs bitsandbytes", why=str(error), hint=hint) from None
    return optim


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in learning if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in learning if parameter.ndim < 2], "weight_decay": 0.0},
    ]
