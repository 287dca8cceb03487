"""Artifact > evaluate on held-out data > report: what a writing step adds where it has data."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peftc.data import split_names
from peftc.data.dataset import split_word
from peftc.data.given import other_split
from peftc.errors import DataError
from peftc.measure.intervals import Interval
from peftc.models.load import load
from peftc.models.model import Model
from peftc.report import Report
from peftc.tasks.evaluation import Exam, evaluated, keep
from peftc.tasks.table import task_of

WINDOWS, SAMPLES = 8, 2000  # of text, and of anything else, that a measurement nobody asked for is of


def add(report: Report, model: Model, exam: Exam, *, against: nn.Module | Model | None) -> None:
    """Evaluate what was written, against another model where there is one, and add what came of it."""
    if report.artifact is None:  # the first process has it
        return
    source = replace(model.source, spec=str(report.artifact), allow_code=True)
    written = replace(load(source), max_memory=model.max_memory)
    reference = None if against is None else replace(load(against), max_memory=model.max_memory)
    quality = evaluated(written, reference, sparing(model, exam))
    keep(quality, written)
    report.data["quality"] = quality.data
    report.tables += [replace(table, main=False) for table in quality.tables]
    report.notes += quality.notes
    report.warnings += quality.warnings
    report.gates += quality.gates


def loss(data: Mapping[str, Any]) -> str | None:
    """Return how much worse what was written is than the model before, where its interval says that it is."""
    found = data.get("quality") or {}
    if not found.get("against"):
        return None
    name, difference = found["metric"], Interval(**found["against"]["difference"][found["metric"]])
    lost = -difference if found["higher_is_better"] else difference
    return f"{lost} of {name}" if lost.low > 0 else None


def bounded(model: Model, exam: Exam) -> Exam:
    """Return how to measure where nobody asked for a figure, neither by a gate nor by a number of samples: on some."""
    if exam.gates or exam.reading.num_samples is not None:
        return exam
    task = task_of(model, exam.reading.task)
    number = WINDOWS if task is not None and task.is_language else SAMPLES
    return replace(exam, reading=replace(exam.reading, num_samples=number))


def announce(report: Report, exam: Exam, some: Exam) -> None:
    """Say of what was measured that it is of some samples only, where there are more."""
    number = some.reading.num_samples
    if some is not exam and report.data.get("quality", {}).get("data", {}).get("samples") == number:
        more = "`--num-samples N` takes more, `peftc evaluate` all"
        report.notes.append(f"quality: measured on {number:,} samples, as no number was asked for; {more}")


def sparing(model: Model, exam: Exam) -> Exam:
    """Return how to measure where memory is limited: a sample at once, if no number was asked for."""
    return replace(exam, batch_size=1) if model.max_memory is not None and not exam.batch_size else exam


def measure_on_test(
    report: Report, model: Model, exam: Exam, *, learnt: str, labelled: bool, against: Model | None
) -> None:
    """Evaluate what was written on the test split of what it learnt from, where there is one and it has labels.

    All samples of the split are taken. A gate without such a split is refused (DataError).

    Args:
        report, model: to add to, and the model that was read.
        exam: the data that it learnt from, of the split ``learnt``, and how to measure.
        labelled: whether its labels mean something to the model.
        against: another model to measure beside it.
    """
    test = [name for name in split_names(exam.data) if split_word(name) == "test" and name != learnt]
    if len(test) == 1 and labelled:
        whole = replace(exam.reading, num_samples=None)
        add(report, model, replace(exam, data=other_split(exam.data, test[0]), reading=whole), against=against)
    elif exam.gates:
        what, why = "`--max-drop` and `--min-quality` need a test split with labels", f"`{exam.data}` has none"
        raise DataError(what, why=why, hint="measure apart: `peftc evaluate`")
