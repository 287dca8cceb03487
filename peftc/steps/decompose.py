"""Source > Model > Plan > Method per module > surgery > Artifact > Report (PELA, step 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from peftc.calibration import memory
from peftc.calibration.collection import Statistics, identity_of, source_of
from peftc.calibration.prepared import Prepared, Request
from peftc.data import open_data
from peftc.data.given import Data, spec_of
from peftc.data.spec import GENERATED
from peftc.errors import ClassesError, UsageError
from peftc.factors import estimate, ordered, spectra, tables
from peftc.factors.asked import asked_budget, asked_plan, eligible, refuse_together, request_of, words
from peftc.factors.decide import Question, carry_out, rehearse
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import allocation_of
from peftc.factors.sequential import refuse_unfit
from peftc.factors.speedup import unusual
from peftc.models import write
from peftc.models.live import refuse_unbuildable
from peftc.models.load import load, refuse_non_finite
from peftc.models.model import Model, detached
from peftc.models.place import device_of, solver_device
from peftc.nn.surgery import tensor_bytes
from peftc.options import Budgets, Calibration, Gates, Reading
from peftc.pages import brief
from peftc.plans.plan import Aim, Input, Plan, multiple_of
from peftc.report import Report, gate_size
from peftc.store.source import Source
from peftc.tasks import baseline, quality, seen
from peftc.tasks.evaluation import Exam, evaluated
from peftc.tasks.figures import refuse_idle
from peftc.tasks.table import task_of

UNMEASURED = "the samples were calibrated on, but quality was not measured:"
FEW_SAMPLES, FEW_WINDOWS = 8, 1  # that show whether a model can be measured on the data


def decompose(
    model: str | Path | Source | nn.Module | Model,
    *,
    output_dir: str | Path | None = None,
    ratio: str | float | Fraction | None = None,
    rank: int | None = None,
    energy: str | float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    speedup: str | float | None = None,
    plan: str | Path | Plan | None = None,
    keep_all_ranks: bool = False,
    allocation: str = "auto",
    rank_multiple: int = 1,
    method: str = "auto",
    conv_method: str = "spatial",
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    data: Data | None = None,
    statistics: str | Path | None = None,
    calibration_samples: int = 512,
    calibration_tokens: float | None = None,
    max_memory: str | float | None = None,
    bias_correction: bool = True,
    sensitivity: int = 16,
    sequential: bool = False,
    joint: bool = False,
    task: str | None = None,
    num_samples: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    batch_size: int | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    max_params: float | None = None,
    max_bytes: float | None = None,
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    seed: int = 0,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Report:
    """Replace dense modules by low-rank factors and write the result as an artifact.

    Args:
        model: any form of MODEL; a live network is copied, not changed.
        output_dir: the artifact's folder; ``<model>-decompose`` when None.
        ratio: share of the eligible modules' weight entries to keep, in (0, 1].
        rank: the same rank in every eligible module, >= 1.
        energy: share of each module's squared singular values to keep, in (0, 1].
        target_params, target_macs: size of the whole model.
        speedup: how many times faster the whole model is to be, > 1, as measured here on random batches of
            ``batch_size`` (16 when None) samples of ``image_size`` or ``max_length``.
        plan: ranks decided before, as `analyze` writes them.
        keep_all_ranks: in place of a budget, keep the weights and store the factors of every rank for `truncate`.
        allocation: ``uniform`` (PELA's formula), or one greedy pass: ``global``, ``energy``, ``convex``; ``auto`` is
            ``convex`` for a method whose losses compare across modules (`kfac`), else ``energy``.
        rank_multiple: every rank is a multiple of it, >= 1, for hardware that works in blocks.
        method, conv_method, settings: how to factor; ``auto`` is `kfac` with data or statistics, else `svd`.
        include, skip: patterns over dotted names; a skip beats an include.
        data: calibrates a method that needs statistics, on its train split where it has one, and measures the result
            on its test split.
        statistics: what `calibrate` collected before, instead of a calibration here.
        calibration_samples, calibration_tokens: at most so many are calibrated on.
        max_memory: bytes of anonymous memory (what is mapped from files apart), or of the device, to calibrate and
            factor within.
        bias_correction: let biases make up for the mean of what the factors lose, where there is a second moment.
        sensitivity: measure each module's own loss on so many samples kept apart from calibration, >= 0, and correct
            the predicted one by it, then measure whole plans; 0 trusts the prediction.
        sequential: fit each module on the inputs that the modules before it, already factored, produce.
        joint: let linear modules that read the same input, as q, k and v, share one down factor.
        task, num_samples, image_size, max_length, image_column, text_column, label_column: how to read the data, and
            how much to measure on.
        streaming: read a data set of the hub as it comes, keep no copy of it, and calibrate and measure on its first
            rows.
        workers: processes that read samples ahead, 0 for none; when None as many as pay, within the cores.
        batch_size: samples at once of the measurement, and of what is timed.
        max_drop, min_quality, max_params, max_bytes: gates; a drop is against the earliest model of the chain with
            the same head.
        max_shard_size: bytes per weight file, as ``5GB``.
        device, seed: where and with which random numbers to compute.
        dry_run: stop at the plan and write nothing.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    asked = locals()
    reading, gates, calibration = Reading.of(asked), Gates.of(asked), Calibration.of(asked)
    data, shard_bytes = None if data is None else spec_of(data, reading), write.shard_bytes(max_shard_size)
    if data is None and gates:
        raise UsageError("`--max-drop` and `--min-quality` need held-out data", hint="name it: `--data DATA`")
    budget = asked_budget(plan, Budgets.of(asked), keep_all_ranks=keep_all_ranks)
    refuse_together(asked)
    with_data, place = data is not None or statistics is not None, solver_device(device_of(device))
    factorize = spectra.factorizer(method, conv_method, settings, with_data=with_data, correct_bias=bias_correction)
    allocation = allocation_of(allocation, factorize.needs)
    multiple = multiple_of(rank_multiple, planned=plan is not None)
    sample = Input(batch_size, image_size, max_length, device, seed)
    aim = None if budget is None else Aim(budget, allocation, multiple, sample)

    by_shape = not factorize.needs and (aim is None or not aim.needs_weights)
    loaded = _loaded(model, weights=not (dry_run and by_shape), stored=not dry_run)
    loaded = memory.bounded(loaded, max_memory)
    targets, reasons = eligible(loaded, conv_method=conv_method, include=include, skip=skip)
    given = asked_plan(plan, targets, loaded, joint=joint)
    work = Factoring(loaded, targets, factorize, place, reasons)
    work.leave_uncalled(include)
    estimate.refuse_unsolvable(work)
    some = None if data is None else Request.of(data, reading, calibration)
    tries = sensitivity > 0 and not keep_all_ranks
    source = source_of(loaded, factorize.needs, some, statistics, device, tries=tries)
    if sequential:
        refuse_unfit(source, factorize.needs)
    exam = None if data is None else Exam(data, reading, gates, batch_size, device)
    measured = not dry_run and _is_measured(loaded, source, exam)

    question = Question(aim, given, source, words(budget, allocation, plan), sensitivity, sequential, keep_all_ranks)
    if dry_run:
        return rehearse(work, question)
    request = {
        "command": "decompose",
        **request_of(budget, allocation, given),
        **factorize.request(),
        "conv_method": conv_method,
        "include": list(include),
        "skip": list(skip),
        "max_shard_bytes": shard_bytes,
        "device": place.type,
        "seed": seed,
        **({"keep_all_ranks": True} if keep_all_ranks else {}),
        **({"joint": True} if joint else {}),
        **identity_of(source, sensitivity, sequential),
        **unusual(aim),
    }
    against = None if max_drop is None or loaded.manifest is None else baseline.of_gate(loaded)
    output = write.output_folder(output_dir, loaded, "decompose")
    report = _carried_out(work, question, request, output, overwrite=overwrite)
    gate_size(report, max_params, max_bytes)
    if exam is not None:
        question = replace(question, source=None)
        loaded = replace(loaded, module=detached(loaded.module).to("meta"))
        del work, source  # what is measured is loaded afresh, and need not stand in memory beside these
        _measure(report, measured, model, loaded, exam, against)
    return _summarised(report, question, factorize.name, data)


def _carried_out(
    work: Factoring, question: Question, request: dict[str, Any], output: Path, *, overwrite: bool
) -> Report:
    """Factor and write, or report again what the same request wrote."""
    with write.writing(work.model, output, request, overwrite=overwrite) as (work.job, base):
        if work.job.done:
            return write.already(work.job, "decompose")
        work.job.require(2 * tensor_bytes(work.model.module))
        return carry_out(work, question, base, request)


def _summarised(report: Report, question: Question, method: str, data: str | None) -> Report:
    if question.keeps_all:
        then = brief.command("truncate", report.artifact, "--ratio", "0.5", "-o", "small")
        brief.tell(report, f"the factors of every rank, by {method}", then=then)
    else:
        on = "" if data is None else f", calibrated on `{data}`"
        tables.summarise(report, f"{question.words[0]}, factors by {method}{on}", data=data)
    return report


def _measure(
    report: Report, measured: bool | None, model: Any, loaded: Model, exam: Exam, against: Model | None
) -> None:
    """Measure what was written against another model, or itself before, or say why that could not be."""
    if measured is None:
        report.warnings.append(f"{UNMEASURED} the classes of `{exam.data}` are not those of `{loaded.name}`")
    elif measured:
        itself = model if isinstance(model, nn.Module | Model) else load(loaded.source)
        some = quality.bounded(loaded, exam)
        quality.add(report, loaded, some, against=against or itself)
        quality.announce(report, exam, some)


def _loaded(model: str | Path | Source | nn.Module | Model, *, weights: bool, stored: bool) -> Model:
    """Load a model that may be edited, refusing one that cannot be decomposed or, where it will be, not be stored."""
    loaded = load(model, weights=weights)
    ordered.refuse_ordered(loaded)
    if isinstance(model, Model):
        loaded = replace(loaded, module=detached(loaded.module))
    if isinstance(model, nn.Module) and stored:
        refuse_unbuildable(loaded)
    if not next(loaded.module.parameters()).is_meta:
        refuse_non_finite(loaded)
    return loaded


def _is_measured(model: Model, source: Any, exam: Exam | None) -> bool | None:
    """Return whether the data measure the result: they have labels, or measure is all that they are for.

    The model itself is evaluated on a few samples, so that data that does not fit is refused before the work. None
    where they are samples of another task, which the model is to learn later, and no gate asks for a figure.
    """
    if exam is None or (isinstance(source, Prepared) and not source.labelled and not exam.gates):
        return False
    task = task_of(model, exam.reading.task)
    refuse_idle(task, exam.gates.max_drop)
    number = FEW_WINDOWS if task is not None and task.is_language else FEW_SAMPLES
    few = replace(quality.sparing(model, exam), reading=replace(exam.reading, num_samples=number), gates=Gates())
    try:
        evaluated(replace(model, module=detached(model.module)), None, few)
    except ClassesError:
        if exam.gates or not isinstance(source, Prepared):
            raise
        return None
    if exam.gates and source is not None:
        _refuse_seen(source, exam)
    return True


def _refuse_seen(source: Prepared | Statistics, exam: Exam) -> None:
    """Refuse a gate on the samples that are calibrated on, before any work.

    Raises:
        DataError: they are the same.
    """
    about = source.data if isinstance(source, Prepared) else source.note["data"]
    if not exam.data.startswith(GENERATED):
        dataset = open_data(exam.data, task=exam.reading.task, streaming=exam.reading.streaming)
        if seen.among(about, exam.data, dataset):
            seen.refuse_gate("decompose", dataset)
