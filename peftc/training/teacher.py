"""The teacher of a training, and what is said of it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc import processes
from peftc.errors import ArtifactError, UsageError
from peftc.measure.intervals import Z
from peftc.models import halved, write
from peftc.models.layers import layers
from peftc.models.load import load, load_base
from peftc.models.model import Model, detached
from peftc.models.place import device_of, runnable, usual_dtype
from peftc.options import Recipe
from peftc.report import Report, Table
from peftc.store.source import Source
from peftc.tasks import baseline
from peftc.training import imitation, parallel, samples
from peftc.training.arrival import said
from peftc.training.imitation import TASK, Imitation
from peftc.training.schedule import Outcome

QUIET = 0.01  # of the task's loss: a term below it hardly pulls


def teacher_of(
    teacher: str | Path | Source | nn.Module | Model | None,
    student: Model,
    terms: Mapping[str, Any],
    device: str,
    recipe: Recipe,
) -> Model | None:
    """Return who is imitated, in its own precision, or in pieces as asked; None where no term asks for one."""
    if not any(set(term.needs) & set(imitation.OF_TEACHER) for term in terms.values()):
        return None
    if teacher is None and student.manifest is None:
        hint = "name a teacher: `--teacher MODEL`"
        raise UsageError(f"`{student.name}` records no base that could teach it", hint=hint)
    guide = _before(student) if teacher is None else load(teacher)
    place = device_of(device)
    if not recipe.spread and halved.suits(guide.module, recipe) and usual_dtype(guide, place) == torch.float32:
        guide = replace(guide, module=detached(guide.module))
        halved.widen(guide.module, place)
        halved.attach(guide)
    elif not recipe.spread:
        guide = runnable(guide, device=device)
    guide.module.requires_grad_(False)
    return parallel.in_pieces(guide, layers(guide), recipe, device, learns=False) if recipe.spread else guide


def _before(student: Model) -> Model:
    """Return the base that a student records or, where a step gave it another head, what that step wrote."""
    steps = student.manifest.steps if student.manifest is not None else []
    if not any(step.get("new_head") for step in steps):
        return load_base(student)
    try:
        return baseline.before(student)
    except ArtifactError as error:
        hint = "name the teacher: `--teacher MODEL`"
        raise ArtifactError(f"no teacher of `{student.name}` is there", why=error.what, hint=hint) from error


def identity_of(guide: Model, *, named: bool) -> dict[str, Any]:
    """Return what a request says of the teacher: what was named, None for the base, and a digest of its content."""
    content = guide.manifest.id if guide.manifest is not None else write.base_record(guide)["files"]
    return {"spec": guide.source.spec if named else None, "content": content}


@processes.watched()
def taught_by(work: Imitation, batch_size: int) -> float | None:
    """Return how good the teacher is on the held-out samples; None where that says nothing."""
    held, teacher = work.samples.held, work.teacher
    if held is None or not work.samples.labelled or teacher is None:
        return None
    return parallel.agreed(lambda: samples.figures(teacher, work.samples, held, batch_size), teacher.module)


def standing(work: Imitation, outcome: Outcome, taught: float | None, report: Report) -> dict[str, float]:
    """Return how good student and teacher were before the training, and say where there was nothing to teach."""
    if taught is None:
        return {}
    untaught = dict(outcome.scores)[0]
    chance = 1 / len(work.samples.outputs) if work.samples.outputs else None
    if chance is not None and taught - chance <= _noise(work, taught, chance):
        report.warnings.append(
            f"the teacher is no better than chance on the held-out samples: {taught:.3f} of {chance:.3f}"
        )
    elif untaught - taught > _noise(work, taught, untaught):
        sign = -1 if _scored_by(work)["negated"] else 1
        both = f"{sign * taught:.4g} and {sign * untaught:.4g}"
        report.warnings.append(f"the teacher is worse than the student on the held-out samples: {both}")
    return {"student": untaught, "teacher": taught}


def _noise(work: Imitation, one: float, other: float) -> float:
    """Return by how much two shares of the held-out samples may differ by chance; 0 for other figures."""
    task, held = work.samples.task, work.samples.held
    if held is None or task is None or not task.metrics[0].proportion:
        return 0.0
    return Z * math.sqrt((one * (1 - one) + other * (1 - other)) / len(held))


def _scored_by(work: Imitation) -> dict[str, Any]:
    """Return what the scores of held-out samples are, see `Imitation.score`."""
    task = work.samples.task
    if not work.task or not work.samples.labelled or task is None:
        return {"metric": "loss", "negated": True}
    return {"metric": task.metrics[0].name, "negated": not task.metrics[0].higher_is_better}


def tell(report: Report, work: Imitation, outcome: Outcome, before: Mapping[str, float]) -> None:
    """Say what the terms weighed at the start, and what the training came to."""
    start = outcome.start
    of_task = {name: value / start[TASK] for name, value in start.items()} if start.get(TASK) else {}
    rows = [[name, f"{value:.4g}", f"{of_task[name]:.3g}" if of_task else ""] for name, value in start.items()]
    report.tables.append(Table("terms at step 0, as weighted", ["term", "value", "of the task's"], rows))
    quiet = [name for name, share in of_task.items() if name in work.terms and share < QUIET]
    if quiet:
        report.notes.append(
            f"{', '.join(f'`{name}`' for name in quiet)} weighed under {QUIET:.0%} of the task's loss at step 0: raise "
            "its weight in `--loss` if it is to count"
        )
    report.data |= {
        "terms": start,
        "steps": outcome.steps,
        "losses": [outcome.losses[0], outcome.losses[-1]],
        "held_out": {
            "scores": [list(each) for each in outcome.scores],
            "best": outcome.best,
            **({} if work.samples.held is None else {"samples": len(work.samples.held)}),
            "before": dict(before),
            **_scored_by(work),
        },
        "seconds_per_step": outcome.seconds_per_step,
        **({"speed": outcome.speed} if outcome.speed else {}),
    }
    if outcome.scores:
        scores = dict(outcome.scores)
        report.notes.append(
            f"held out: {scores[0]:.4g} before, {scores[outcome.best]:.4g} after step {outcome.best}, the "
            + ("best" if scores[outcome.best] == max(scores.values()) else "last")
        )
        if outcome.best == 0 and max(score for step, score in outcome.scores if step) < scores[0]:
            report.warnings.append(
                "the training made nothing better: the weights are those it began with; train longer, or lower "
                "`--learning-rate`"
            )
    if outcome.steps < outcome.planned:
        report.notes.append(f"stopped after {outcome.steps} of {outcome.planned} steps: nothing got better")
    if outcome.resumed:
        report.notes.append(f"resumed at step {outcome.resumed} of {outcome.planned}")
    speed = f": {said(outcome.speed)}" if outcome.speed else ""
    report.notes.append(f"{outcome.steps} steps, {outcome.seconds_per_step:.3g} s each{speed}")
