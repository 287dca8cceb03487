"""Source > Model > head and updates > Data > train on the task > delta, or merge > Artifact > Report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from peftc import processes
from peftc.data.given import Data, spec_of
from peftc.errors import ClassesError, UsageError, one_of
from peftc.factors import ordered
from peftc.measure import costs
from peftc.methods import registry
from peftc.models import sharding, write
from peftc.models.delta import is_delta, reference
from peftc.models.heads import Headed
from peftc.models.live import refuse_unbuildable
from peftc.models.load import load
from peftc.models.model import Model
from peftc.models.place import place_of
from peftc.models.weights import piece, pieces_of
from peftc.nn import surgery
from peftc.nn.adapted import adapted_modules
from peftc.nn.surgery import tensor_bytes
from peftc.options import EPOCHS, Augment, Gates, Reading, Recipe, length
from peftc.pages import brief
from peftc.report import Report, Table
from peftc.steps.merge import taken_in
from peftc.store.job import Job
from peftc.store.source import Source
from peftc.tasks import baseline, quality
from peftc.tasks.evaluation import Exam
from peftc.tasks.figures import refuse_idle
from peftc.training import imitation, journal, student
from peftc.training.imitation import TASK, Imitation
from peftc.training.lesson import Lesson, learn, prepared, weights_of
from peftc.training.parallel import refuse_method
from peftc.training.schedule import Outcome
from peftc.training.student import Student
from peftc.training.teacher import tell

METHODS_OWN = ("learning_rate", "weight_decay")  # unless they are asked for
SMALLER = {"decompose", "truncate", "prune-layers"}  # steps after which speed is the question
WITH_TEACHER = {"features": 1.0, TASK: 1.0}


def finetune(
    model: str | Path | Source | nn.Module | Model,
    *,
    output_dir: str | Path | None = None,
    data: Data,
    method: str = "lora",
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    on_product: bool = False,
    same_rank: bool = False,
    head: str = "auto",
    delta: bool | None = None,
    teacher: str | Path | Source | nn.Module | Model | None = None,
    loss: str | Mapping[str, float] | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
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
    """Tune a model for a task by few parameters, and write the tuned model, or only what the task changed.

    Args:
        model: dense, factored or depth-pruned; a live network is copied, not changed.
        output_dir: the artifact's folder; ``<model>-finetune`` when None.
        data: of the task: its train split. With a test split and labels the result is measured on that.
        method: of the table of adapters, as ``lora``, ``flora``, ``snella``, ``head`` or ``full``.
        settings: of the method, as ``{"rank": 16}``; those of a loss term as ``{"features.scale_free": True}``.
        include: patterns of modules to adapt that have no update unless asked: embeddings, the first convolution.
        skip: patterns of modules to leave as they are.
        on_product: adapt a factored linear module as one matrix; each of its factors is adapted otherwise. Merged, its
            rank grows by that of the update,
        same_rank: or is cut back to what it was, at an error that is reported.
        head: ``auto`` gives the model a new head where its classes are not those of the data, ``new`` always, ``keep``
            never.
        delta: write what the task changed and name the model that it changes, or a whole model; as ``model`` is when
            None.
        teacher: who is imitated, too.
        loss: weights of the terms as for `distill`; the task's alone when None, and features=1 with a teacher.
        epochs, steps, minutes: how long, one of them; 10 epochs when all are None.
        batch_size: samples that one step learns from, over all processes.
        accumulate: parts that a process cuts its share of a step into.
        learning_rate, weight_decay: of the optimizer; those of the method when None.
        optimizer, schedule, warmup, clip: see `peftc.options.Recipe`.
        ema: decay of a moving average of the weights, which then is the result.
        dropout: let dropout and drop-path act, that of updates too.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        augment, mixup, cutmix: random changes to images, as for `distill`.
        held_out: share of the train split that says which weights are best, where there is no validation split; 0
            keeps the last weights.
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
    one_of("--head", head, ["auto", "new", "keep"])
    own = {name: value for name, value in (settings or {}).items() if "." not in name}
    of_terms = {name: value for name, value in (settings or {}).items() if "." in name}
    adapter = registry.find("adapter", method, "--method")
    if registry.with_settings(adapter, method, own).get("dropout") and not dropout:
        raise UsageError("`--set dropout` acts in training mode only", hint="add `--dropout`")
    usual = {name: registry.recipe_of(adapter)[name] for name in METHODS_OWN if given[name] is None}
    recipe = Recipe.of(given | usual, **length(given, EPOCHS))
    reading, gates, changes = Reading.of(given), Gates.of(given), Augment.of(given)
    data, shard_bytes = spec_of(data, reading), write.shard_bytes(max_shard_size)

    stored = load(model, merge=False)
    ordered.refuse_ordered(stored)
    if stored.manifest is None and not stored.files:
        refuse_unbuildable(stored)
    fitted = student.headed(stored, data, reading, head)
    stored = fitted.model
    places: Any = {"include": include, "skip": skip, "on_product": on_product}
    if recipe.spread:
        refuse_method(method, adapter)
    pupil = student.build(fitted, method, own, **places, task=task, device=device, seed=seed, recipe=recipe)
    of_task = {TASK: 1.0} if teacher is None else WITH_TEACHER
    asked = weights_of(of_task if loss is None else loss, pupil.model, task)
    lesson = Lesson(data, reading, recipe, changes, loss, of_terms, teacher, device)
    try:
        work = prepared(lesson, pupil.model, stored, asked)
    except ClassesError as error:  # what is told to those who measure a model does not help those who tune it
        raise ClassesError(error.what, why=error.why, hint="give it a new head: `--head new`") from None
    refuse_idle(work.samples.task, max_drop)
    guide = None if teacher is None or work.teacher is None else sharding.whole(work.teacher)
    against = _against(guide, fitted, max_drop)

    request = {
        "command": "finetune",
        "method": method,
        "settings": dict(settings or {}),
        "include": list(include),
        "skip": list(skip),
        "on_product": on_product,
        "same_rank": same_rank,
        "head": head,
        "delta": is_delta(stored) if delta is None else delta,
        "max_shard_bytes": shard_bytes,
        **lesson.request(work),
    }
    output = write.output_folder(output_dir, stored, "finetune")
    with write.writing(stored, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            report = write.already(job, "finetune")
        else:
            job.require(tensor_bytes(stored.module) // (8 if request["delta"] else 1))
            report = _carry_out(job, base, request, work, pupil, lesson, log_with)
    exam, learnt = Exam(data, reading, gates, device=device), work.samples.about["split"]
    quality.measure_on_test(report, stored, exam, learnt=learnt, labelled=work.samples.labelled, against=against)
    _summarise(report, stored, method, data, as_delta=request["delta"])
    return report


def _summarise(report: Report, stored: Model, method: str, data: str, *, as_delta: bool) -> None:
    made = {step["request"]["command"] for step in (stored.manifest.steps if stored.manifest else [])}
    then = brief.time(report.artifact) if made & SMALLER else brief.command("analyze", report.artifact, "--data", data)
    whole = brief.command("merge", report.artifact, "-o", "whole")
    brief.tell(report, f"tune for `{data}` by {method}", then=whole if as_delta else then)


def _against(guide: Model | None, fitted: Headed, max_drop: float | None) -> Model | None:
    """Return the model that does the same task and that the result is compared with.

    A teacher that was named; else of a gate the earliest of the chain, and without one the model itself before.
    """
    if guide is not None and (guide.labels == fitted.model.labels or not fitted.new):
        return guide
    if not fitted.new:
        return fitted.model if max_drop is None else baseline.of_gate(fitted.model)
    if max_drop is not None:
        why = "the head is new, so there is no quality before"
        hint = "gate on the result: `--min-quality`, or name a `--teacher` with these classes"
        raise UsageError("`--max-drop` needs something to compare with", why=why, hint=hint)
    return None


def _carry_out(
    job: Job,
    base: dict[str, Any],
    request: dict[str, Any],
    work: Imitation,
    pupil: Student,
    lesson: Lesson,
    log_with: str | None,
) -> Report:
    """Train, write and verify."""
    report = Report("finetune", notes=[*pupil.stored.notes, *work.samples.notes, *lesson.recipe.idle])
    student.tell(report, pupil)
    place = place_of(pupil.model.module)
    outcome = _fit(job, work, pupil, registry.find("adapter", request["method"], "--method"), lesson, log_with)
    pupil.model = student.together(pupil.model, pupil.stored.module, pupil.placed.adapters, job.work)
    if lesson.recipe.minutes is not None:
        request = write.settle(job, pupil.stored, base, request | {"minutes": None, "steps": outcome.planned})
    tell(report, work, outcome, {})
    student.tell_sparsity(report, pupil)
    memory = {"optimizer_bytes": outcome.optimizer_bytes, "peak_bytes": costs.peak_bytes(place)}
    report.data["memory"] = memory
    report.notes.append(
        f"memory: {memory['optimizer_bytes'] / 1e6:.4g} MB of the optimizer's state, "
        f"{memory['peak_bytes'] / 1e6:,.0f} MB of the process at most"
    )
    if processes.rank():
        return report
    record, written = _write(job, base, request, pupil, report)
    report.tables.append(Table("written", ["", "bytes"], [["weights", f"{record.weight_bytes:,}"]]))
    shutil.copyfile(job.work / journal.LOG, job.folder / journal.LOG)
    write.close(job, record, report, written, place)
    return report


def _fit(
    job: Job, work: Imitation, pupil: Student, adapter: Callable[..., Any], lesson: Lesson, log_with: str | None
) -> Outcome:
    """Let the pupil learn, with what its method adds to the loss and does after each step."""
    adapted, held, size = adapted_modules(pupil.model.module), work.samples.held, lesson.recipe.batch_size
    penalty, after = registry.trait(adapter, "penalty", None), registry.trait(adapter, "after_step", None)

    def loss(module: nn.Module, given: Any) -> Mapping[str, Any]:
        found = None if penalty is None else penalty(adapted)
        return {**work.loss(module, given), **({} if found is None else {"penalty": found})}

    def score() -> float:
        """Return how good the pupil is on the held-out samples, with weights that may just have been averaged."""
        assert held is not None
        for each in adapted.values():
            student.settle(each.update)
        return work.score(held, size)

    def after_step(step: int, steps: int) -> None:
        updates = {name: each.update for name, each in adapted.items()}
        after(updates, step, steps, steps if work.samples.stream else len(work.samples.train) / size)

    own = {"loss": loss, "score": None if held is None else score, "after_step": None if after is None else after_step}
    return learn(job, lesson, work, log_with, **own, keep_last=registry.trait(adapter, "KEEPS_LAST", False))


def _write(
    job: Job, base: dict[str, Any], request: dict[str, Any], pupil: Student, report: Report
) -> tuple[Any, Model]:
    """Write what was learnt, as a delta or whole, and return the manifest and the network that is to reload from it."""
    stored, adapters, learned = pupil.stored, pupil.placed.adapters, pupil.learned
    module = student.as_stored(pupil.model.module, stored.module, adapters)
    tuned = replace(stored, module=module, infos={}, files=[])
    options: dict[str, Any] = {"max_shard_bytes": request["max_shard_bytes"], "new_head": bool(pupil.head.new)}
    if request["delta"]:
        names, there = student.beneath(pupil, learned)
        tensors = surgery.tensors_of(module)
        pieces = {name: piece(tensors[name]) for name in names}
        record = write.write_artifact(
            job,
            tuned,
            base,
            request,
            pieces,
            imitation.factored(stored),
            adapters=adapters,
            delta=reference(stored, base, there),
            **options,
        )
        merged, _ = taken_in(tuned, adapters, report)
    else:
        merged, left = taken_in(tuned, adapters, report, same_rank=request["same_rank"])
        record = write.write_artifact(
            job, merged, base, request, pieces_of(merged), imitation.factored(merged), adapters=left, **options
        )
    return record, merged
