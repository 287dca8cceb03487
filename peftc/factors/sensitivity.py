"""Measure what each module loses alone, to correct the predicted losses by it.

A method's loss is a second-order, module-by-module prediction. Here every module is cut to one rank, alone, and the
divergence of the model's outputs from the dense model's is measured on a few other samples; the whole curve of
that module is then scaled by measured / predicted. Modules of a layer are reached from its stored input, and samples
are as many as a measurement needs.
"""

import json
import time
from functools import partial

import torch
from torch import Tensor

from peftc import progress
from peftc.factors.trial import Trial, Tried
from peftc.methods.spectrum import Spectrum
from peftc.plans import allocate
from peftc.plans.plan import Target
from peftc.store import artifact

KEPT = "sensitivity.json"
SHARE = 0.45  # of the break-even rank, at which a module is tried
FAINT = 1e-6  # of the whole loss, below which both the prediction and the measurement are rounding
LARGEST = 1e3  # the measured loss may differ from the predicted one by so much, either way
NARROW = 0.15  # standard error over mean, below which no more samples are run
FEWEST = 4  # samples before that is looked at
SLOW = 10  # seconds, from which on it is said how long it will take


def alone(trial: Trial) -> dict[str, tuple[Tensor, float]]:
    """Return (k + 1,) squared errors by rank of every module as predicted, and what one measurement scales them by.

    One module at a time is cut, and measured by the samples' divergence from the dense model.
    """
    path, work = trial.folder / KEPT, trial.work
    scales: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    losses: dict[str, tuple[Tensor, float]] = {}
    tried, about = None, ""
    if any(name not in scales for name in work.targets):
        start = time.monotonic()
        tried = trial.on(trial.singles, trial.folder, keep=True)
        about = _about(trial, time.monotonic() - start)
    with progress.track(f"sensitivity{about}", len(work.targets)) as advance:
        for name, target in work.targets.items():
            found = work.spectrum(target)
            if name not in scales:
                assert tried is not None
                scales[name] = _scale(trial, target, found, tried)
                artifact.write_bytes(path, json.dumps(scales).encode())
            losses[name] = found.losses().cpu(), scales[name]
            del found  # before the next one is solved
            advance(name)
    return losses


def _about(trial: Trial, seconds: float) -> str:
    """Return how long it will take at most, by what a pass over the samples took."""
    number = max(len(trial.layers), 1)
    shares = [1 - trial.layer_of(target) / number for target in trial.work.targets.values()]
    whole = seconds * sum(shares)
    return f", {whole / 60:.0f} min at most" if whole > 60 else f", {whole:.0f} s at most" if whole > SLOW else ""


def _scale(trial: Trial, target: Target, found: Spectrum, tried: Tried) -> float:
    """Return the measured divergence over the predicted one, of one module at one rank."""
    rank, losses = rank_of(target), found.losses()
    predicted = float(losses[rank]) / 2
    if predicted <= FAINT * float(losses[0]) / 2:
        return 1.0
    start = trial.layer_of(target)
    tried.passes.check(start, 0, partial(trial.run, tried.batches[0]), tried.dense[0])
    seen = torch.zeros(0)
    with trial.cut(target, found, rank):
        for at in range(len(tried.batches)):
            seen = torch.cat([seen.double(), trial.divergences(tried, at, start).double()])
            if tried.in_order and len(seen) >= FEWEST and seen.std() <= NARROW * len(seen) ** 0.5 * seen.mean():
                break
    return min(max(float(seen.mean()) / predicted, 1 / LARGEST), LARGEST)


def rank_of(target: Target) -> int:
    """Return the rank at which a module is tried."""
    return max(1, int(SHARE * allocate.break_even_rank(target.shape, target.form)))
