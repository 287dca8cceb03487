"""How to train, checked; torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peftc import processes
from peftc.errors import PeftcError, UsageError

SPREAD = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs, steps, minutes: how long, exactly one of them; minutes become steps as timed here before the first.
        batch_size: samples that one step learns from, over all processes and parts.
        accumulate: parts that a process cuts its share of a step into, to fit its memory.
        learning_rate: the highest, after warm-up; it ends at 0.
        weight_decay: of AdamW; norms and biases do not decay.
        warmup: share of the steps over which the rate rises, in [0, 1).
        clip: largest norm of the gradient; 0 for none.
        ema: decay per step of an exponential moving average, in [0, 1), which then is the result; None for none.
        dropout: let dropout and drop-path act; without, the network trains as it will run, batch norms apart.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        evaluations: how often the held-out samples are looked at, evenly spread over the steps, the last one after the
            last step.
        seed: of order, dropout and augmentation.
    """

    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    ema: float | None = None
    dropout: bool = False
    mixed_precision: str = "no"
    evaluations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and a launch that asks for what peftc does not do.

        Raises:
            UsageError: naming the option.
            PeftcError: a launcher was asked to spread the weights; without GPUs Accelerate itself does not listen.
        """
        for kind in SPREAD:
            if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("true", "1", "yes"):
                raise cannot_train(kind)
        if sum(each is not None for each in (self.epochs, self.steps, self.minutes)) != 1:
            raise UsageError("say how long to train", hint="with one of `--epochs`, `--steps` and `--minutes`")
        ranges: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
            "epochs": (self.epochs, lambda value: value > 0, "above 0"),
            "steps": (self.steps, lambda value: value >= 1, "at least 1"),
            "minutes": (self.minutes, lambda value: value > 0, "above 0"),
            "batch-size": (self.batch_size, lambda value: value >= 1, "at least 1"),
            "accumulate": (self.accumulate, lambda value: value >= 1, "at least 1"),
            "learning-rate": (self.learning_rate, lambda value: value > 0, "above 0"),
            "weight-decay": (self.weight_decay, lambda value: value >= 0, "at least 0"),
            "warmup": (self.warmup, lambda value: 0 <= value < 1, "in [0, 1)"),
            "clip": (self.clip, lambda value: value >= 0, "at least 0"),
            "ema": (self.ema, lambda value: 0 <= value < 1, "in [0, 1)"),
            "evaluations": (self.evaluations, lambda value: value >= 1, "at least 1"),
        }
        for option, (value, fits, rule) in ranges.items():
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise UsageError(f"`--{option}` is {value}", why=f"it has to be {rule}")
        parts = processes.size() * self.accumulate
        if self.batch_size % parts:
            raise UsageError(
                f"a step of {self.batch_size} samples cannot be cut into {parts} equal parts",
                why=f"{processes.size()} processes with `--accumulate {self.accumulate}` share it",
                hint=f"choose a `--batch-size` that {parts} divides",
            )


def length(epochs: float | None, steps: int | None, minutes: float | None, usual: float) -> dict[str, Any]:
    """Return how long to train, as was asked for; ``usual`` epochs where nothing was."""
    asked = {"epochs": epochs, "steps": steps, "minutes": minutes}
    return asked if any(each is not None for each in asked.values()) else {**asked, "epochs": usual}


@dataclass
class Outcome:
    """What came of a training.

    Attributes:
        losses: the sum of the terms at each step.
        start: each term at the first step.
        scores: (step, score) on the held-out samples, larger is better.
        best: step whose weights are the result.
        steps: how many there were.
        seconds_per_step: mean wall-clock time of this process.
        resumed: step from which an interrupted run went on; 0 for a run from the start.
        optimizer_bytes: of the optimizer's state.
    """

    losses: list[float] = field(default_factory=list)
    start: dict[str, float] = field(default_factory=dict)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    steps: int = 0
    seconds_per_step: float = 0.0
    resumed: int = 0
    optimizer_bytes: int = 0


def cannot_train(kind: str) -> PeftcError:
    """Return the refusal of a way to spread a training over processes."""
    return PeftcError(
        f"peftc does not train under {kind} yet",
        why="its checkpoints need whole weights in each process",
        hint="configure Accelerate for data parallel training: `accelerate launch --num_processes N -m peftc ...`",
    )


def rate(step: int, total: int, warmup: float) -> float:
    """Return the share of the highest learning rate at ``step`` in [0, total): up in a line, down in half a cosine."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def mixed(seed: int, *parts: int) -> int:
    """Return a seed that differs for every combination of numbers."""
    value = seed
    for part in parts:
        value = (value * 0x9E3779B97F4A7C15 + part + 0x632BE59BD9B4E019) & (2**63 - 1)
    return value


EPOCHS = 10  # where no length is given
