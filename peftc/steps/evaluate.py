"""Source > Model > Data > Encoded > figures per sample > metrics with their intervals > Report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftc import progress
from peftc.data import Dataset, open_data
from peftc.data.classes import match
from peftc.data.tokens import GENERATED, length_to_draw, number_to_draw, sample
from peftc.errors import DataError, UsageError, WeightError
from peftc.hooks import batches
from peftc.measure.intervals import Interval, bootstrap, paired_shares, wilson
from peftc.models import load
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.models.recorded import load_base
from peftc.report import Report, Table
from peftc.steps import baseline, measured, seen
from peftc.store.source import Source
from peftc.tasks.language import digest_of
from peftc.tasks.table import TASKS, fitting, guess, named_task
from peftc.tasks.task import Batch, Columns, Encoded, Metric, Settings, Task, concatenated


@dataclass
class _Side:
    """One of the models compared: how it reads the data, and what it gave."""

    model: Model
    encoded: Encoded
    outputs: list[int] = field(default_factory=list)  # the output of each class of the data
    columns: Columns = field(default_factory=dict)


def evaluate(
    model: str | Path | Source | nn.Module | Model,
    *,
    data: str | Path,
    task: str | None = None,
    against: str | Path | Source | nn.Module | Model | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> Report:
    """Measure how good a model is on labelled data, or on text drawn from a language model, with 95 % intervals.

    Args:
        model: any form of MODEL.
        data: a `--data` spec, or `generated:N` for N sequences drawn from ``against`` (else the base, else the model).
        task: a name of the task table; guessed from the model when None.
        against: another model, or `base` for the earliest of the artifact's chain with the same head and task; adds
            paired differences.
        num_samples: evaluate on a seeded subset; all samples when None.
        batch_size: samples at once.
        image_size: side in pixels instead of the model's.
        max_length: tokens per text or window.
        image_column, text_column, label_column: columns of a table, where their names are not usual ones.
        max_drop: gate: how much worse than ``against`` the first metric may be, in its own unit.
        min_quality: gate: the least the first metric must be; for perplexity, where less is better, the most.
        device, dtype: where and in what precision to run.
        seed: of subsets, masks, drawn text and resampling.

    Raises:
        DataError: the data cannot be read, or does not fit the model or the task.
        WeightError: the model gives NaN or infinite outputs.
    """
    _check(max_drop, min_quality, against, batch_size)
    data, subject = str(data), load.load(model)
    reference = None if against is None else baseline.before(subject) if against == "base" else load.load(against)
    report = Report("evaluate", notes=[*subject.notes, *(reference.notes if reference else [])])
    if against == "base" and Path("base").exists():
        report.notes.append(baseline.FOLDER)
    row = named_task(task) if task else guess(subject)
    for each in (subject, reference):
        if each is not None:
            runnable(each, device=device, dtype=dtype)
    settings = Settings(image_size, max_length, num_samples, seed)
    if data.startswith(GENERATED):
        dataset = _generated(data, row, subject, reference, settings, report, device=device, dtype=dtype)
    else:
        dataset = open_data(
            data,
            num_samples=num_samples,
            seed=seed,
            image_column=image_column,
            text_column=text_column,
            label_column=label_column,
            task=row.name if row else None,
        )
    row = fitting(row or _by_data(subject, dataset), dataset)
    known_to = seen.by(subject.manifest, data, dataset)
    if known_to and (max_drop is not None or min_quality is not None):
        seen.refuse_gate(known_to, dataset)
    if known_to:
        report.warnings.append(
            f"`{known_to}` calibrated or taught the model with samples of these: its figure on others may be worse"
        )
    report.notes += dataset.notes if task else [f"task: `{row.name}`, guessed from `{subject.name}`", *dataset.notes]
    sides = _sides(row, [subject] if reference is None else [subject, reference], dataset, settings, report)
    compared = _run(row, sides, dataset, batch_size or row.batch_size, report)
    report.data = {
        "task": row.name,
        "data": {
            "spec": data,
            "split": dataset.split,
            "samples": sides[0].encoded.size,
            "digest": digest_of(row, dataset, sides[0].encoded),
        },
        "seen": known_to is not None,
        "metric": row.metrics[0].name,
        "higher_is_better": row.metrics[0].higher_is_better,
        "metrics": _metrics(row, sides[0].columns, seed),
    }
    if reference is not None:
        report.data["against"] = _against(row, sides, compared, seed)
    report.tables.append(_table(row, sides, report.data))
    _gates(row, report, max_drop, min_quality)
    if isinstance(model, str | Path | Source):  # a network in memory may be a part of other work
        keep(report, subject)
    return report


def keep(report: Report, model: Model) -> None:
    """Keep what was measured beside the artifact that it was measured of."""
    data = report.data
    against = data["against"]["name"] if "against" in data else None
    measured.keep(report, model, [data["task"], data["data"]["digest"], data["data"]["samples"], against])


def _check(max_drop: float | None, min_quality: float | None, against: Any, batch_size: int | None) -> None:
    for option, limit in (("--max-drop", max_drop), ("--min-quality", min_quality)):
        if limit is not None and not math.isfinite(limit):
            raise UsageError(f"`{option}` is {limit}", why="a limit is a finite number")
    if max_drop is not None and against is None:
        raise UsageError(
            "`--max-drop` needs something to compare with", hint="add `--against base` or `--against MODEL`"
        )
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"`--batch-size` is {batch_size}", why="a batch has at least one sample")


def _by_data(model: Model, dataset: Dataset) -> Task:
    if model.library == "python" and dataset.kind in ("image", "tensor"):
        return TASKS["image-classification"]
    raise DataError(
        f"cannot guess the task of `{model.name}`",
        why=f"neither its class, {type(model.module).__name__}, nor the data tells",
        hint=f"name it with `--task`: {', '.join(TASKS)}",
    )


def _generated(
    spec: str,
    row: Task | None,
    subject: Model,
    reference: Model | None,
    settings: Settings,
    report: Report,
    **place: str,
) -> Dataset:
    """Draw the evaluation text from the model that the others are measured against."""
    number = number_to_draw(spec, subject, row.name if row else None)
    author = reference
    if author is None and subject.manifest is not None:
        author = runnable(load_base(subject), **place)
    if author is None:
        author = subject
        report.warnings.append(
            f"the text is drawn from `{subject.name}` itself, so its perplexity says how varied it is, not how good; "
            "add `--against`"
        )
    length = length_to_draw(author, settings.max_length)
    report.notes.append(f"data: {number} sequences of {length} tokens drawn from `{author.name}`, seed {settings.seed}")
    return sample(author, number, length, seed=settings.seed).take(settings.num_samples, seed=settings.seed)


def _sides(row: Task, models: list[Model], dataset: Dataset, settings: Settings, report: Report) -> list[_Side]:
    sides = [_Side(model, row.encode(model, dataset, settings)) for model in models]
    report.notes += sides[0].encoded.notes
    if len(sides) == 2 and row.name.endswith("-lm") and sides[0].encoded.key != sides[1].encoded.key:
        raise DataError(
            f"`{models[0].name}` and `{models[1].name}` read `{dataset.name}` as different tokens",
            why="perplexities over different tokens cannot be compared",
            hint="compare with a model of the same tokenizer",
        )
    if row.has_classes:
        for side in sides:
            _match_classes(row, side, dataset, report)
    return sides


def _match_classes(row: Task, side: _Side, dataset: Dataset, report: Report) -> None:
    """Find the output of each class by running one sample, so that a mismatch is refused before the rest."""
    logits = _forward(side.model, side.encoded.batch([0]), row)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise DataError(
            f"`{side.model.name}` does not classify",
            why=f"for one sample it gives outputs of shape {list(logits.shape)}, not one score per class",
            hint="choose another `--task`, or a model with a classifier",
        )
    side.outputs, note = match(dataset.classes or [], side.model.labels, logits.shape[1])
    if note not in report.notes:
        report.notes.append(note)


def _run(row: Task, sides: list[_Side], dataset: Dataset, batch_size: int, report: Report) -> Columns | None:
    """Run every sample through both models, batch by batch, and keep figures per sample; return how they compare."""
    encoded = sides[0].encoded
    seen: list[list[Columns]] = [[] for _ in sides]
    compared: list[Columns] | None = [] if row.compare and len(sides) == 2 else None
    if compared is not None and sides[0].outputs != sides[1].outputs:
        compared = None
        report.notes.append(
            "the two models order their classes differently, so neither agreement nor divergence is measured"
        )
    same = all(side.encoded.key == encoded.key for side in sides)
    with progress.track(f"evaluating on {dataset.name}", encoded.size) as advance:
        for indices in batches(encoded.lengths, encoded.size, batch_size):
            given: list[tuple[Tensor, Batch]] = []
            for side, columns in zip(sides, seen, strict=True):
                batch = given[0][1] if given and same else side.encoded.batch(indices)
                given.append((_forward(side.model, batch, row), batch))
                columns.append(row.observe(given[-1][0], _mapped(side, batch)))
            if compared is not None and row.compare is not None and _comparable(given, report):
                compared.append(row.compare(given[1][0], given[0][0], given[0][1]))
            for _ in indices:
                advance("")
    for side, columns in zip(sides, seen, strict=True):
        side.columns = row.over(columns)
    return concatenated(compared) if compared else None


def _comparable(given: list[tuple[Tensor, Batch]], report: Report) -> bool:
    shapes = [list(logits.shape) for logits, _ in given]
    note = f"outputs of shapes {shapes[0]} and {shapes[1]}: neither agreement nor divergence is measured"
    if shapes[0] != shapes[1] and not any(known.startswith("outputs of shapes") for known in report.notes):
        report.notes.append(note)
    return shapes[0] == shapes[1]


def _mapped(side: _Side, batch: Batch) -> Batch:
    return Batch(batch.inputs, torch.tensor(side.outputs)[batch.targets]) if side.outputs else batch


def _forward(model: Model, batch: Batch, row: Task) -> Tensor:
    """Return the outputs for a batch, moved to the model's device and dtype first."""
    logits = row.outputs(model, batch)
    if not torch.isfinite(logits).all():
        dtype = str(logits.dtype).removeprefix("torch.")
        raise WeightError(
            f"`{model.name}` gives NaN or infinite outputs",
            why=f"it ran in {dtype}; no figure over them would mean anything",
            hint="run in a wider type, `--dtype float32`, or look for NaN in its weights with `peftc analyze`",
        )
    return logits


def _metrics(row: Task, columns: Columns, seed: int) -> dict[str, dict[str, float]]:
    return {metric.name: _estimate(metric, columns, seed)._asdict() for metric in _measurable(row, columns)}


def _measurable(row: Task, columns: Columns) -> list[Metric]:
    return [metric for metric in row.metrics if metric.column is None or metric.column in columns]


def _estimate(metric: Metric, columns: Columns, seed: int) -> Interval:
    if metric.proportion:
        hits = metric.of(columns)
        return wilson(int(hits.sum()), len(hits))
    samples = len(next(iter(columns.values())))
    return _defined(bootstrap(lambda rows: metric.of(_rows(columns, rows)), samples, seed=seed), metric)


def _difference(metric: Metric, one: Columns, other: Columns, seed: int) -> Interval:
    if metric.proportion:
        return paired_shares(metric.of(one), metric.of(other))
    samples = len(next(iter(one.values())))
    return bootstrap(lambda rows: metric.of(_rows(one, rows)) - metric.of(_rows(other, rows)), samples, seed=seed)


def _defined(interval: Interval, metric: Metric) -> Interval:
    if not math.isfinite(interval.value):
        raise DataError(
            f"`{metric.name}` has no value on these samples", why="the model gives all of them the same answer"
        )
    return interval


def _rows(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def _against(row: Task, sides: list[_Side], compared: Columns | None, seed: int) -> dict[str, Any]:
    one, other = (side.columns for side in sides)
    shared = [metric for metric in _measurable(row, one) if metric in _measurable(row, other)]
    result: dict[str, Any] = {
        "name": sides[1].model.name,
        "metrics": _metrics(row, other, seed),
        "difference": {metric.name: _difference(metric, one, other, seed)._asdict() for metric in shared},
        "agreement": None,
        "divergence": None,
    }
    if compared is not None:
        result["divergence"] = _mean(compared, "kl", seed)._asdict()
        result["agreement"] = _mean(compared, "same", seed)._asdict()
        if row.has_classes:
            result["agreement"] = wilson(int(compared["same"].sum()), len(compared["same"]))._asdict()
    return result


def _mean(compared: Columns, name: str, seed: int) -> Interval:
    """Return the mean over predictions, resampling the samples that they belong to."""
    total, count = compared[name], compared["count"]
    return bootstrap(lambda rows: float(total[rows].sum() / count[rows].sum()), len(total), seed=seed)


def _table(row: Task, sides: list[_Side], data: dict[str, Any]) -> Table:
    def cell(values: dict[str, float] | None) -> str:
        return "" if values is None else str(Interval(**values))

    used = data["data"]
    known = " that the model knows" if data["seen"] else ""
    title = f"{row.name}: {used['spec']}, split {used['split']}, {used['samples']} samples{known}, 95 % intervals"
    against = data.get("against")
    if against is None:
        return Table(
            title, ["metric", sides[0].model.name], [[name, cell(values)] for name, values in data["metrics"].items()]
        )
    rows = [
        [name, cell(values), cell(against["metrics"].get(name)), cell(against["difference"].get(name))]
        for name, values in data["metrics"].items()
    ]
    rows += [[name, cell(against[name]), "", ""] for name in ("agreement", "divergence") if against[name]]
    return Table(title, ["metric", sides[0].model.name, f"against {against['name']}", "difference"], rows)


def _gates(row: Task, report: Report, max_drop: float | None, min_quality: float | None) -> None:
    """Judge the first metric: a drop is how much worse it is, whichever direction is worse."""
    metric = row.metrics[0]
    value = report.data["metrics"][metric.name]["value"]
    judge = report.at_least if metric.higher_is_better else report.at_most
    judge("--min-quality", min_quality, value)
    if max_drop is not None:
        difference = report.data["against"]["difference"][metric.name]["value"]
        report.at_most("--max-drop", max_drop, 0.0 - difference if metric.higher_is_better else difference)
