"""What SNELL and SNELLA do after each step of the training: thresholds follow the points, and layers compete.

Section A.1.4 of the papers notes, after the authors' code: a layer's score is the sensitivity of its points times how
uncertain that is (that of AdaLoRA, arXiv 2303.10512), averaged over them.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftc.nn.kernelized import Kernelized, Points, Settings
from peftc.plans import budgets

DECAY = 0.85  # of both averages

logger = logging.getLogger(__name__)


@torch.no_grad()
def after_step(updates: Mapping[str, nn.Module], step: int, steps: int, steps_per_epoch: float) -> None:
    """Bring the updates up to date after an optimizer's step, with the gradients of that step still there."""
    kernelized = {name: update for name, update in updates.items() if isinstance(update, Kernelized)}
    settings = next((update.settings for update in kernelized.values()), None)
    if settings is None or not settings.competes:
        return
    parts = {f"{name}.{place}": part for name, update in kernelized.items() for place, part in enumerate(update.parts)}
    for part in parts.values() if settings.scored else ():
        _learn(part)
    shared = settings.start is not None and budgets.refreshed(step, steps, steps_per_epoch, settings.refresh_every)
    if shared:
        kept = _allocate(parts, settings, step, steps)
    elif step % settings.threshold_every == 0 or step == steps:
        counts = torch.stack([part.kept for part in parts.values()]).tolist()  # one wait for the device, not many
        kept = dict(zip(parts, counts, strict=True))
    else:
        return
    for name, part in parts.items():
        part.settle(kept[name])


def _learn(part: Points) -> None:
    """Take a step's gradients into the averages of sensitivity |theta gradient| and of its spread."""
    for name, points in (("rows", part.rows), ("columns", part.columns)):
        mean: Tensor = getattr(part, f"_mean_{name}")
        spread: Tensor = getattr(part, f"_spread_{name}")
        found = torch.zeros_like(mean) if points.grad is None else (points * points.grad).abs_().to(mean.dtype)
        found = found.nan_to_num_(0.0, 0.0, 0.0)  # an overflow says nothing of a layer
        mean.lerp_(found, 1 - DECAY)
        spread.lerp_((found - mean).abs_(), 1 - DECAY)


def _allocate(parts: Mapping[str, Points], settings: Settings, step: int, steps: int) -> dict[str, int]:
    sizes = {name: part.entries for name, part in parts.items()}
    first, last = (
        sum(size - budgets.zeroed(size, sparsity) for size in sizes.values())
        for sparsity in (settings.start or 0.0, settings.sparsity)
    )
    scores, floor = dict.fromkeys(parts, 1.0), 1.0
    if settings.scored:
        found = [
            (part.get_buffer(f"_mean_{name}").double() * part.get_buffer(f"_spread_{name}").double()).mean()
            for part in parts.values()
            for name in ("rows", "columns")
        ]
        summed = torch.stack(found).view(-1, 2).sum(1).tolist()
        scores, floor = dict(zip(parts, summed, strict=True)), settings.min_keep
    kept = budgets.shares(scores, sizes, budgets.total(step, steps, first, last), floor)
    listed = ", ".join(f"{name} {kept[name] / sizes[name]:.3f}" for name in parts)
    logger.info("step %d of %d: share of the entries kept: %s", step, steps, listed)
    return kept
