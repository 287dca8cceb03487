"""Modules that SNELL adapts, and its formulas written plainly."""

from typing import Any

import torch
from torch import Tensor, nn

from peftc.methods.adapter.snell import snell
from peftc.nn.adapted import Adapted, take_in


def adapted(module: nn.Module, **settings: Any) -> Adapted:
    update = snell(module, **{"rank": 4, **settings})
    assert update is not None
    return Adapted(module, update)


def merged(model: Adapted) -> Any:
    network = nn.Sequential(model)
    take_in(network)
    return network[0]


def plain(kernel: str, sparsify: str, rows: Tensor, columns: Tensor, threshold: Tensor, mix: Tensor) -> Tensor:
    """Compute the change in the way of the formulas, for autograd to go through."""
    if kernel == "linear":
        values = sum(b @ a.T for b, a in zip(rows, columns, strict=True))
    else:
        distances = [(b[:, None] - a[None]).square().sum(-1).sqrt() for b, a in zip(rows, columns, strict=True)]
        values = 0.1 * (distances[0] - distances[1])
        if kernel == "mix":
            values = values + mix[0] * torch.softmax(values / mix[1], 0) + mix[2]
    size = values.abs().detach()
    stays = size > threshold
    if sparsify == "paper":  # the threshold is a number to the gradient
        return torch.where(stays, values * (values.abs() - threshold.clamp(min=0)), 0)
    factor = {"none": torch.ones_like(size), "hard": stays.to(size.dtype), "code": size * stays}[sparsify]
    return values * factor
