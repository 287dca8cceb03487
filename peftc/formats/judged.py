"""Export > its own runtime > the figures of the task, beside those of the model in PyTorch or of the chain's start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftc.data import open_data
from peftc.errors import ArtifactError, DataError
from peftc.formats import parity
from peftc.formats.exported import Exported
from peftc.models.model import Model
from peftc.options import Gates, Reading
from peftc.report import Report
from peftc.tasks import baseline, seen
from peftc.tasks.evaluation import Exam, evaluated
from peftc.tasks.figures import refuse_idle
from peftc.tasks.table import task_of


@dataclass(frozen=True)
class Judge:
    """How the quality of an export is measured.

    Attributes:
        exam: the samples.
        reference: the model to measure beside it.
        is_gate: whether the figures were asked for: then what stands in their way is an error, and else a note.
    """

    exam: Exam
    reference: Model
    is_gate: bool

    def measure(self, report: Report, runs: Model, written: Exported) -> None:
        """Add what an export reaches in its runtime, by single samples where its answers depend on the batch.

        Args:
            report: to add to.
            runs: the model that it was made from.
            written: the export.

        Raises:
            DataError: a gate asks for a figure that these samples cannot give.
        """
        size = 1 if written.mixes else self.exam.batch_size
        try:
            exam = replace(self.exam, batch_size=size)
            found = evaluated(parity.in_runtime(runs, written), self.reference, exam)
        except DataError as error:
            if self.is_gate:
                raise
            report.notes.append(f"quality was not measured: {error.what}")
            return
        report.data["quality"] = {**found.data, "batch_size": size}
        report.tables += [replace(table, main=False) for table in found.tables]
        report.notes += found.notes
        report.warnings += found.warnings


def judge_of(stored: Model, runs: Model, data: str, reading: Reading, gates: Gates, *, batch_size: int) -> Judge | None:
    """Return how to measure the quality of an export; None where the samples have no labels and no gate asks for it.

    A gate is judged on all samples, beside the earliest model of the chain. Otherwise the figures are of the samples
    that outputs are compared on, beside those of the exported model itself.

    Raises:
        DataError: a gate is asked for, and the model knows these samples; a UsageError where no drop could be as large.
        ArtifactError: the model that a drop is judged against is not there.
    """
    row = task_of(stored, reading.task)
    dataset = open_data(data, task=row.name if row else None, streaming=reading.streaming)
    if gates:
        exam = Exam(data, replace(reading, num_samples=None), batch_size=batch_size, device="cpu")
        refuse_idle(row, gates.max_drop)
        if known_to := seen.by(stored.manifest, data, dataset):
            seen.refuse_gate(known_to, dataset)
        return Judge(exam, _start(stored, gates.max_drop) or runs, is_gate=True)
    has_labels = dataset.labels is not None or dataset.pairs is not None
    if not has_labels and (row is None or not row.is_language):
        return None
    return Judge(Exam(data, reading, batch_size=batch_size, device="cpu"), runs, is_gate=False)


def _start(stored: Model, max_drop: float | None) -> Model | None:
    """Return the model that a drop is judged against, where that is not the exported one itself."""
    try:
        found = baseline.of_gate(stored)
    except ArtifactError:
        if max_drop is not None:
            raise
        return None
    return None if found is stored else found
