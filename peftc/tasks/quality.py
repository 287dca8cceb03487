"""Artifact > evaluate on held-out data > report: what a writing step adds where it has data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peftc.data import parts_of, split_names
from peftc.data.dataset import split_word
from peftc.errors import DataError
from peftc.models.load import load
from peftc.models.model import Model
from peftc.report import Report
from peftc.tasks.evaluation import evaluated, keep


def add(report: Report, model: Model, *, against: nn.Module | Model | None, **options: Any) -> None:
    """Evaluate what was written, against another model where there is one, and add what came of it."""
    if report.artifact is None:  # the first process has it
        return
    written = load(replace(model.source, spec=str(report.artifact), allow_code=True))
    if model.max_memory is not None:
        written = replace(written, max_memory=model.max_memory)
        against = None if against is None else replace(load(against), max_memory=model.max_memory)
    reference = None if against is None else load(against)
    quality = evaluated(written, reference, **{**options, **sparing(model, options)})
    keep(quality, written)
    report.data["quality"] = quality.data
    report.tables += quality.tables
    report.notes += quality.notes
    report.warnings += quality.warnings
    report.gates += quality.gates


def sparing(model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch size of an evaluation: one sample where memory is limited and none was asked for."""
    return {"batch_size": options["batch_size"] or (None if model.max_memory is None else 1)}


def measure_on_test(
    report: Report,
    model: Model,
    *,
    learnt: str,
    labelled: bool,
    data: str,
    against: Model | None,
    max_drop: float | None,
    min_quality: float | None,
    **options: Any,
) -> None:
    """Evaluate what was written on the test split of what it learnt from, where there is one and it has labels.

    Args:
        report: to add to.
        model: that was read.
        learnt: the split that was learnt from.
        labelled: whether its labels mean something to the model.
        data, against, max_drop, min_quality, options: as for `evaluate`.

    Raises:
        DataError: a gate asks for a measurement, and there is no such split.
    """
    test = [name for name in split_names(data) if split_word(name) == "test" and name != learnt]
    if len(test) != 1 or not labelled:
        if max_drop is not None or min_quality is not None:
            raise DataError(
                "`--max-drop` and `--min-quality` need a test split with labels",
                why=f"`{data}` has none",
                hint="measure apart: `peftc evaluate`",
            )
        return
    add(
        report,
        model,
        against=against,
        data=f"{parts_of(data)[0]}@{test[0]}",
        max_drop=max_drop,
        min_quality=min_quality,
        batch_size=None,
        **options,
    )
