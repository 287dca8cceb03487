"""What was asked of a training > samples, teacher and terms, opened early: what does not fit is refused before work."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from peftc import processes
from peftc.errors import DataError, UsageError
from peftc.models.layerwise import layerwise
from peftc.models.model import Model
from peftc.options import Augment, Reading, Recipe
from peftc.store.job import Job
from peftc.store.source import Source
from peftc.tasks import retrieval
from peftc.tasks.packing import refuse_unpackable
from peftc.tasks.table import task_of
from peftc.tasks.task import Task
from peftc.training import imitation, loop, samples
from peftc.training.imitation import TASK, Imitation
from peftc.training.schedule import Outcome
from peftc.training.teacher import identity_of, teacher_of

PELA = {"features": 1.0, "perturbation": 1.0, TASK: 1.0}  # the released scripts, section 1.3 of the papers notes


@dataclass(frozen=True)
class Lesson:
    """What was asked of a training.

    Attributes:
        data: a `--data` spec.
        reading, recipe, augment: how to read it, how to train on it, and what happens to its images.
        loss: weights of the terms, as typed; None for the usual ones.
        settings: of the terms, as ``{"features.scale_free": True}``.
        teacher: who is imitated; None for the base that the student records.
        device: where to compute.
    """

    data: str
    reading: Reading
    recipe: Recipe
    augment: Augment
    loss: str | Mapping[str, float] | None
    settings: Mapping[str, Any]
    teacher: str | Path | Source | nn.Module | Model | None
    device: str

    def request(self, work: Imitation) -> dict[str, Any]:
        """Return what of it makes two trainings the same question."""
        guide, weights = work.teacher, {name: term.weight for name, term in work.terms.items()}
        return {
            "teacher": None if guide is None else identity_of(guide, named=self.teacher is not None),
            "data": work.samples.about,
            "loss": weights | ({TASK: work.task} if work.task else {}),
            **self.recipe.request(),
            **asdict(self.augment),
            **self.reading.request(),
            "device": self.device,
        }


def weights_of(loss: str | Mapping[str, float] | None, student: Model, task: str | None) -> dict[str, float]:
    """Return the weight of each term that was asked for, or of those of PELA.

    Raises:
        UsageError: a weight is no number.
    """
    if loss is None:
        row = task_of(student, task)
        has_vectors = row is None or row.name in ("sentence-similarity", "image-text-retrieval")
        return PELA | ({"embeddings": 1.0} if has_vectors else {})
    if isinstance(loss, Mapping):
        return {name: float(weight) for name, weight in loss.items()}
    found: dict[str, float] = {}
    for part in loss.split(","):
        name, equals, value = part.strip().partition("=")
        try:
            found[name] = float(value) if equals else 1.0
        except ValueError:
            hint = "write it as `--loss features=1,task=0.5`"
            raise UsageError(f"`--loss {part}` has no weight", hint=hint) from None
    return found


@processes.watched()
def prepared(lesson: Lesson, student: Model, stored: Model, asked: Mapping[str, float]) -> Imitation:
    """Open the samples and the teacher, and try one batch.

    Args:
        lesson: what was asked.
        student: that learns, ready to run.
        stored: the model that it was made of.
        asked: the weight of each term.

    Raises:
        PeftcError: samples, teacher and student do not fit, or nothing is to be learnt.
    """
    terms = imitation.terms(asked, lesson.settings)
    if not imitation.factored(stored):
        terms.pop("perturbation", None)  # there are no products of factors
    if lesson.recipe.packing:
        _refuse_unpacked(task_of(student, lesson.reading.task))
        refuse_unpackable(student)
    given = samples.read(
        student,
        lesson.data,
        replace(lesson.reading, packed=lesson.recipe.packing),
        labels=bool(asked.get(TASK)),
        held_out=lesson.recipe.held_out,
        augment=lesson.augment,
        step=lesson.recipe.batch_size,
    )
    weight = asked.get(TASK, 0.0) if given.labelled else 0.0
    if lesson.loss is not None and asked.get(TASK) and not given.labelled:
        what = "the task's loss needs labels"
        raise DataError(what, why=f"`{lesson.data}` has none that the task reads", hint="leave `task` out of `--loss`")
    if weight and given.task is not retrieval.TASK and getattr(given.task, "objective", None) is None:
        why, hint = "its row in the table names no objective", "imitate a teacher: `--loss features=1 --teacher MODEL`"
        raise UsageError("the task cannot be learnt from its labels", why=why, hint=hint)
    if not terms and not weight:
        raise DataError(
            "there is nothing to learn",
            why="no term of `--loss` is left for this model and these samples",
            hint="imitate a teacher: `--loss features=1 --teacher MODEL`",
        )
    if lesson.recipe.spread:
        _refuse_in_pieces(terms, given.task is retrieval.TASK)
    guide = teacher_of(lesson.teacher, stored, terms, lesson.device, lesson.recipe)
    if lesson.recipe.packing and guide is not None:
        refuse_unpackable(guide)
    pairs = imitation.pair(student, guide) if guide is not None and "features" in terms else []
    work = Imitation(student, guide, given, terms, weight, pairs)
    work.check()
    return work


def _refuse_unpacked(task: Task | None) -> None:
    if task is None or task.name != "causal-lm":
        why = f"the task is `{task.name}`" if task else "nothing tells what the model is for"
        raise UsageError("`--packing` joins texts for causal language models", why=why, hint="leave it out")


def _refuse_in_pieces(terms: Mapping[str, Any], of_pairs: bool) -> None:
    if of_pairs:
        hint = "train them with whole weights in each process: leave `--shard` out"
        raise UsageError("`--shard` does not cut models of images and texts", why="their towers run apart", hint=hint)
    if "perturbation" in terms:
        why = "it compares all products of factors with all weights of the teacher in each step"
        hint = "leave it out, as it hardly weighs: `--loss features=1,task=1`"
        raise UsageError("`--shard` does not go with the term `perturbation`", why=why, hint=hint)


def learn(job: Job, lesson: Lesson, work: Imitation, log_with: str | None, **own: Any) -> Outcome:
    """Let the student learn within a job; ``own`` is what its method has of its own, as for `loop.fit`."""
    held, size = work.samples.held, lesson.recipe.batch_size
    number = work.samples.stream or len(work.samples.train)
    usual = {"loss": work.loss, "score": None if held is None else lambda: work.score(held, size)}
    logs = {"log_with": log_with, "log_folder": job.output.with_name(f"{job.output.name}-logs")}
    arrival = {"workers": lesson.reading.workers, "tokens": lambda given: given.tokens}
    recipe = lesson.recipe
    asked = {"recipe": recipe, "device": lesson.device, "folder": job.work}
    how: dict[str, Any] = {**asked, **arrival, **logs, **usual, **own}
    with layerwise(work.student, compiled=recipe.compile, recomputed=recipe.gradient_checkpointing):
        return loop.fit(work.student.module, number, work.batch, **how)
