"""Figures of a model on data, beside those of another: what `evaluate` measures, and each step of what it wrote."""

from __future__ import annotations

from peftc.data import Dataset, open_data
from peftc.data.spec import Columns as Named
from peftc.data.tokens import GENERATED, length_to_draw, number_to_draw, sample
from peftc.errors import DataError
from peftc.models import measured
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.models.recorded import load_base
from peftc.report import Report
from peftc.tasks import seen
from peftc.tasks.figures import add_gates, compared_with, metrics_of, table_of
from peftc.tasks.language import digest_of
from peftc.tasks.sides import run, sides_of
from peftc.tasks.table import TASKS, fitting, guess, named_task
from peftc.tasks.task import Settings, Task

NAMED = Named()


def evaluated(
    subject: Model,
    reference: Model | None,
    data: str,
    *,
    task: str | None = None,
    columns: Named = NAMED,
    num_samples: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> Report:
    """Return figures with their intervals, and those of another model with the paired difference.

    Args:
        subject: what is measured; moved to the device.
        reference: what it is compared with; None measures it alone.
        data: a `--data` spec, or ``generated:N``.
        columns: of a table, where their names are not usual ones.
        task, num_samples, batch_size, image_size, max_length, max_drop, min_quality, device, dtype, seed: as for
            `evaluate`.

    Raises:
        DataError, WeightError: as `evaluate` does.
    """
    report = Report("evaluate", notes=[*subject.notes, *(reference.notes if reference else [])])
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
            image_column=columns.image,
            text_column=columns.text,
            label_column=columns.label,
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
    sides = sides_of(row, [subject] if reference is None else [subject, reference], dataset, settings, report)
    compared = run(row, sides, dataset, batch_size or row.batch_size, report)
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
        "metrics": metrics_of(row, sides[0].columns, seed),
    }
    if reference is not None:
        report.data["against"] = compared_with(row, sides, compared, seed)
    report.tables.append(table_of(row, sides, report.data))
    add_gates(report, report.data, row.metrics[0], max_drop, min_quality)
    return report


def keep(report: Report, model: Model) -> None:
    """Keep what was measured beside the artifact that it was measured of."""
    data = report.data
    against = data["against"]["name"] if "against" in data else None
    measured.keep(report, model, [data["task"], data["data"]["digest"], data["data"]["samples"], against])


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
