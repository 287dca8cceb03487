"""The only training loop: AdamW, cosine with warm-up, gradient clipping; devices and processes are Accelerate's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from peftc import progress
from peftc.errors import PeftcError
from peftc.models.load import device_of

LARGEST_NORM = 1.0  # of the gradient


def fit(
    module: nn.Module,
    dataset: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    device: str = "auto",
    seed: int = 0,
) -> list[float]:
    """Train ``module`` in place, leave it in eval mode, and return the loss of each step.

    The same seed, machine and thread count give the same weights; the caller's random state is left as it was.

    Args:
        module: what learns; parameters with two or more axes decay, norms and biases do not.
        dataset: samples by index, of equal shapes, shuffled anew each epoch.
        loss: maps the module and a collated batch to a scalar.
        epochs: passes over the dataset; exactly one of ``epochs`` and ``steps``.
        steps: optimizer steps.
        batch_size: samples per step and process.
        learning_rate: the highest, after warm-up; it ends at 0.
        weight_decay: of AdamW.
        warmup: share of the steps over which the rate rises, in [0, 1).
        device: where to train.
        seed: of order and dropout.

    Raises:
        PeftcError: the loss is NaN or infinite; nothing after that step is worth keeping.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("fit takes exactly one of epochs and steps")
    accelerator = Accelerator(cpu=device_of(device).type == "cpu")
    loader = DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(_groups(module, weight_decay), lr=learning_rate)
    model, prepared, loader = accelerator.prepare(module, optimizer, loader)
    total = steps if steps is not None else (epochs or 0) * len(loader)
    # the schedule counts our steps, so it stays out of `prepare`, which would advance it once per process
    schedule = LambdaLR(optimizer, lambda step: rate(step, total, warmup))
    losses: list[float] = []
    module.train()
    with _seeded(seed, accelerator.device), progress.track("training", total) as advance:
        for batch in islice(chain.from_iterable(repeat(loader)), total):
            value = loss(model, batch)
            losses.append(_finite(value, len(losses) + 1))
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            prepared.step()
            prepared.zero_grad()
            advance(f"loss {losses[-1]:.3f}, rate {schedule.get_last_lr()[0]:.1e}")
            schedule.step()
    module.eval()
    return losses


def rate(step: int, total: int, warmup: float) -> float:
    """Return the share of the highest learning rate at ``step`` in [0, total): up in a line, down in half a cosine."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in learning if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in learning if parameter.ndim < 2], "weight_decay": 0.0},
    ]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise PeftcError(f"the loss became {value} at step {step}", hint="lower the learning rate")
    return value
