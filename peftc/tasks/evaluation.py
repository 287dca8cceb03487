"""Figures of a model on data, beside those of another: what `evaluate` measures, and each step of what it wrote."""

from dataclasses import dataclass
from typing import Any

from peftc.data import Dataset, open_data
from peftc.data.spec import GENERATED
from peftc.data.tokens import length_to_draw, number_to_draw, sample
from peftc.errors import DataError, UsageError
from peftc.models import write
from peftc.models.load import load_base
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.options import Gates, Reading
from peftc.report import Report
from peftc.tasks import seen
from peftc.tasks.figures import add_gates, compared_with, metrics_of, refuse_idle, table_of
from peftc.tasks.language import digest_of
from peftc.tasks.sides import run, sides_of
from peftc.tasks.table import TASKS, fitting, task_of, told_by
from peftc.tasks.task import Encoded, Task

NO_GATES = Gates()


@dataclass(frozen=True)
class Exam:
    """What quality is measured on.

    Attributes:
        data: a `--data` spec, or ``generated:N``.
        reading: how to read it; the task is guessed where it names none.
        gates: what the first metric has to be.
        batch_size, device, dtype: as for `evaluate`.
    """

    data: str
    reading: Reading
    gates: Gates = NO_GATES
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"


def evaluated(subject: Model, reference: Model | None, exam: Exam) -> Report:
    """Return figures with their intervals, those of a reference and the paired difference; both move to the device."""
    data, reading = exam.data, exam.reading
    report = Report("evaluate", notes=[*subject.notes, *(reference.notes if reference else [])])
    row = task_of(subject, reading.task)
    name = row.name if row else None
    for each in (subject, reference):
        if each is not None:
            runnable(each, device=exam.device, dtype=exam.dtype)
    if data.startswith(GENERATED):
        number = number_to_draw(data, subject, name)
        author = reference or subject
        if reference is None and subject.manifest is not None:
            author = runnable(load_base(subject), device=exam.device, dtype=exam.dtype)
        elif reference is None:
            why = "so its perplexity says how varied it is, not how good; add `--against`"
            report.warnings.append(f"the text is drawn from `{subject.name}` itself, {why}")
        length = length_to_draw(author, reading.max_length)
        drawn = f"{number} sequences of {length} tokens drawn from `{author.name}`, seed {reading.seed}"
        report.notes.append(f"data: {drawn}")
        dataset = sample(author, number, length, seed=reading.seed).take(reading.num_samples, seed=reading.seed)
    else:
        how: dict[str, Any] = {"num_samples": reading.num_samples, "seed": reading.seed, "streaming": reading.streaming}
        dataset = open_data(data, task=name, **how)
    if row is None and subject.library == "python" and dataset.kind in ("image", "tensor"):
        row = TASKS["image-classification"]
    if row is None:
        why = f"neither its class, {type(subject.module).__name__}, nor the data tells"
        hint = f"name it with `--task`: {', '.join(TASKS)}"
        raise DataError(f"cannot guess the task of `{subject.name}`", why=why, hint=hint)
    row = fitting(row, dataset)
    refuse_idle(row, exam.gates.max_drop)
    if (asked := reading.windows.asked()) and row.name != "causal-lm":
        raise UsageError(f"`{asked[0]}` is for causal language models", why=f"the task is `{row.name}`")
    known_to = seen.by(subject.manifest, data, dataset)
    if known_to and exam.gates:
        seen.refuse_gate(known_to, dataset)
    if known_to:
        report.warnings.append(
            f"`{known_to}` calibrated or taught the model with samples of these: its figure on others may be worse"
        )
    guessed = [] if reading.task else [f"task: `{row.name}`, guessed from {told_by(subject)}"]
    report.notes += [*guessed, *dataset.notes]
    sides = sides_of(row, [subject] if reference is None else [subject, reference], dataset, reading, report)
    compared = run(row, sides, dataset, exam.batch_size or sides[0].encoded.batch_size or row.batch_size, report)
    report.data = {
        "task": row.name,
        "data": _about(data, row, dataset, sides[0].encoded),
        "seen": known_to is not None,
        "metric": row.metrics[0].name,
        "higher_is_better": row.metrics[0].higher_is_better,
        "metrics": metrics_of(row, reading.seed, sides[0].columns),
    }
    if reference is not None:
        report.data["against"] = compared_with(row, sides, compared, reading.seed)
    report.tables.append(table_of(row, sides, report.data))
    add_gates(report, report.data, row.metrics[0], exam.gates)
    return report


def _about(spec: str, row: Task, dataset: Dataset, encoded: Encoded) -> dict[str, Any]:
    """Return what identifies the samples of a measurement, and how a text was cut where that was asked for."""
    digest = digest_of(row, dataset, encoded)
    about = {"spec": str(spec), "split": dataset.split, "samples": encoded.size, "digest": digest}
    return {**about, "windows": encoded.windows} if encoded.windows else about


def keep(report: Report, model: Model) -> None:
    """Keep what was measured beside the artifact that it was measured of."""
    data = report.data
    against = data["against"]["name"] if "against" in data else None
    write.keep_measured(report, model, [data["task"], data["data"]["digest"], data["data"]["samples"], against])
