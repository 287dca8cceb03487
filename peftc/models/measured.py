"""What was measured of an artifact > its ``result.json``, where `compare` and `report` find it."""

from __future__ import annotations

from typing import Any

from peftc import processes
from peftc.models.model import Model
from peftc.report import Report, plain
from peftc.store import artifact


def keep(report: Report, model: Model, question: Any) -> None:
    """Keep the figures of a report beside the artifact that they are of; another model, or one of the hub's cache, has
    no place for them.

    Args:
        report: of `evaluate` or `bench`.
        model: what was measured.
        question: on what, where and against what: the same question again replaces the answer.
    """
    if model.manifest is None or model.folder is None or model.hub is not None or processes.rank():
        return
    try:
        artifact.add_measured(model.folder, report.command, plain(question), plain(report.data))
    except OSError as error:
        report.notes.append(f"not kept in `{model.folder / artifact.RESULT}`: {str(error.strerror).lower()}")
