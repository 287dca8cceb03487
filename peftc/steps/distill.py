"""Source of student and of teacher > Data > train towards the teacher > Artifact > Report (PELA, step 2)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from peftc import processes
from peftc.data.given import Data, spec_of
from peftc.errors import UsageError
from peftc.factors import ordered
from peftc.models import sharding, write
from peftc.models.load import load, refuse_non_finite
from peftc.models.model import Model
from peftc.models.place import place_of
from peftc.models.weights import pieces_of
from peftc.nn.surgery import tensor_bytes
from peftc.options import Augment, Gates, Reading, Recipe, length
from peftc.pages import brief
from peftc.report import Report
from peftc.store.job import Job
from peftc.store.source import Source
from peftc.tasks import baseline, quality
from peftc.tasks.evaluation import Exam
from peftc.tasks.figures import refuse_idle
from peftc.training import imitation, journal
from peftc.training.imitation import Imitation
from peftc.training.lesson import Lesson, learn, prepared, weights_of
from peftc.training.student import as_stored, together
from peftc.training.teacher import standing, taught_by, tell

EPOCHS = 5  # where no length is given


def distill(
    model: str | Path | Source | nn.Module | Model,
    *,
    output_dir: str | Path | None = None,
    teacher: str | Path | Source | nn.Module | Model | None = None,
    data: Data,
    loss: str | Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    learning_rate: float = 3e-4,
    weight_decay: float = 0.01,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    warmup: float = 0.1,
    clip: float = 1.0,
    ema: float | None = None,
    dropout: bool = False,
    mixed_precision: str = "no",
    evaluations: int = 5,
    early_stop: int | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    packing: bool = False,
    held_out: float = 0.1,
    shard: bool = False,
    offload: bool = False,
    augment: str | None = None,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    cache_teacher: bool = False,
    cache_top: int | None = None,
    log_with: str | None = None,
    task: str | None = None,
    num_samples: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Train a compressed model to give what its teacher gives, and write the result as an artifact.

    Args:
        model: the student; a live network is copied, not changed.
        output_dir: the artifact's folder; ``<model>-distill`` when None.
        teacher: who is imitated; when None the base that the student's manifest records or, where a step gave it a new
            head, what that step wrote.
        data: what to learn from: its train split. With a test split and labels the result is measured on that.
        loss: weights of the terms, as ``features=1,task=1``: ``features``, ``perturbation``, ``logits``,
            ``embeddings`` and ``task``. PELA's when None: features, perturbation and, with labels, the task; and
            embeddings for a model that gives vectors.
        settings: of the terms, as ``{"features.scale_free": True}``.
        epochs, steps, minutes: how long, one of them; 5 epochs when all are None.
        batch_size: samples that one step learns from, over all processes.
        accumulate: parts that a process cuts its share of a step into.
        learning_rate, weight_decay, optimizer, schedule, warmup, clip: of the optimizer and its schedule, see
            `peftc.options.Recipe`.
        ema: decay of a moving average of the weights, which then is the result.
        dropout: let the student's dropout and drop-path act, as PELA does; a short healing is better without.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        augment: random changes to images: ``crop``, or a policy of timm's as ``rand-m9-mstd0.5-inc1``.
        mixup, cutmix: alpha of mixing images in pairs, 0 for none.
        cache_teacher: keep on disk what the teacher gives of each sample, instead of asking it every epoch.
        cache_top: the same, and of its logits only so many, the largest, of each token or sample; all others count as
            one, so the term `logits` is a lower bound of the divergence.
        held_out: share of the train split that is not learnt from but says which weights are best, where the data has
            no validation split; 0 keeps the last weights.
        evaluations: how often the held-out samples are looked at.
        early_stop: stop where so many looks in a row brought nothing better.
        gradient_checkpointing: compute layers a second time in the backward pass, which takes time and saves memory.
        compile: compile the layers by `torch.compile`.
        packing: for a causal language model, join texts to windows of ``max_length`` tokens in which none sees another,
            so that hardly anything is padding; else all texts are one, and windows are cut from that.
        shard: cut weights, gradients and the optimizer's state, and the teacher's weights, over the processes of a
            launch, so that each holds its share of them. The figures are those of whole weights.
        offload: keep these shares in the memory of the CPU while a GPU computes.
        log_with: a tracker of Accelerate's, as ``tensorboard``.
        task, num_samples, image_size, max_length, image_column, text_column, label_column: how to read the data, and
            how much of it; see `peftc.options.Reading`.
        streaming: read a data set of the hub as it comes, shuffled a block at a time, and keep no copy of it; ``steps``
            says for how long. What is held out is its head.
        workers: processes that read samples ahead, 0 for none; when None as many as pay, within the cores.
        max_drop, min_quality: gates on the test split; a drop is against a teacher that was named, or the earliest
            model of the chain with the same head.
        max_shard_size: bytes per weight file, as ``5GB``.
        device, seed: where and with which random numbers to compute.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    given = locals()
    recipe, reading = Recipe.of(given, **length(given, EPOCHS)), Reading.of(given)
    gates, changes = Gates.of(given), Augment.of(given)
    option = "--cache-top" if cache_top is not None else "--cache-teacher" if cache_teacher else None
    if option and changes:
        why = "augmented samples differ each time"
        hint = f"leave out `{option}`, or `--augment`, `--mixup` and `--cutmix`"
        raise UsageError(f"`{option}` keeps one answer for each sample", why=why, hint=hint)
    data, shard_bytes = spec_of(data, reading), write.shard_bytes(max_shard_size)

    stored = load(model)
    ordered.refuse_ordered(stored)
    refuse_non_finite(stored)
    student = imitation.learner(stored, recipe, device)
    lesson = Lesson(data, reading, recipe, changes, loss, settings or {}, teacher, device)
    work = prepared(lesson, student, stored, weights_of(loss, student, task))
    refuse_idle(work.samples.task, max_drop)
    if cache_top is not None:
        work.keep_some(cache_top)
    against = sharding.whole(work.teacher) if work.teacher is not None else load(stored.source)
    if max_drop is not None and (work.teacher is None or teacher is None):
        against = baseline.of_gate(stored)

    request = {
        "command": "distill",
        "settings": dict(settings or {}),
        "max_shard_bytes": shard_bytes,
        **lesson.request(work),
        **({} if cache_top is None else {"cache_top": cache_top}),
    }
    output = write.output_folder(output_dir, stored, "distill")
    with write.writing(stored, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            report = write.already(job, "distill")
        else:
            job.require(6 * tensor_bytes(student.module))
            work.kept = job.work / "teacher" if option else None
            report = _carry_out(job, base, request, work, stored, lesson, log_with)
    exam, learnt = Exam(data, reading, gates, device=device), work.samples.about["split"]
    quality.measure_on_test(report, stored, exam, learnt=learnt, labelled=work.samples.labelled, against=against)
    terms = ", ".join([*work.terms, *(["task"] if work.task else [])])
    row = work.samples.task
    labels = "" if not work.task or row is None or row.is_language else ", and what their labels say"
    asked = f"give what `{against.name}` gives for samples of `{data}`{labels}; terms: {terms}"
    brief.tell(report, asked, then=brief.time(report.artifact))
    return report


def _carry_out(
    job: Job,
    base: dict[str, Any],
    request: dict[str, Any],
    work: Imitation,
    stored: Model,
    lesson: Lesson,
    log_with: str | None,
) -> Report:
    """Train, write and verify."""
    report = Report("distill", notes=[*stored.notes, *work.samples.notes, *lesson.recipe.idle])
    taught = taught_by(work, lesson.recipe.batch_size)
    place = place_of(work.student.module)
    outcome = learn(job, lesson, work, log_with)
    if lesson.recipe.minutes is not None:
        request = write.settle(job, stored, base, request | {"minutes": None, "steps": outcome.planned})
    tell(report, work, outcome, standing(work, outcome, taught, report))
    if work.left:
        others = sum(work.left) / len(work.left)
        kept = f"the {work.top} largest of the teacher's logits were kept, {1 - others:.2%} of its probability"
        report.notes.append(f"{kept}; the others count as one, so `logits` is at most the divergence")
    work.student = together(work.student, stored.module, {}, job.work)
    if processes.rank():
        return report
    edited = replace(work.student, module=as_stored(work.student.module, stored.module, {}))
    shard_bytes = request["max_shard_bytes"]
    record = write.write_artifact(
        job, edited, base, request, pieces_of(edited), imitation.factored(stored), max_shard_bytes=shard_bytes
    )
    shutil.copyfile(job.work / journal.LOG, job.folder / journal.LOG)
    write.close(job, record, report, edited, place)
    return report
