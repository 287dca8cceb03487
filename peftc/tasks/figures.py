"""Figures of a task with their intervals, as numbers, as a table and as gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from peftc.errors import DataError
from peftc.measure.intervals import Interval, bootstrap, paired_shares, wilson
from peftc.options import Gates
from peftc.report import Report, Table
from peftc.tasks.sides import Side
from peftc.tasks.task import Columns, Metric, Task


def metrics_of(row: Task, columns: Columns, seed: int) -> dict[str, dict[str, float]]:
    """Return each metric of a task with its 95 % interval."""
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


def compared_with(row: Task, sides: list[Side], compared: Columns | None, seed: int) -> dict[str, Any]:
    """Return what the second model gives, the paired difference to it, and how far the two agree."""
    one, other = (side.columns for side in sides)
    shared = [metric for metric in _measurable(row, one) if metric in _measurable(row, other)]
    result: dict[str, Any] = {
        "name": sides[1].model.name,
        "metrics": metrics_of(row, other, seed),
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


def table_of(row: Task, sides: list[Side], data: dict[str, Any]) -> Table:
    """Return the figures as a table for people."""

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


def add_gates(report: Report, found: Mapping[str, Any], metric: Metric, gates: Gates) -> None:
    """Judge what was found of a metric: a drop is how much worse it is, whichever direction is worse."""
    judge = report.at_least if metric.higher_is_better else report.at_most
    if gates.min_quality is not None:
        judge("--min-quality", gates.min_quality, found["metrics"][metric.name]["value"])
    if gates.max_drop is not None:
        difference = found["against"]["difference"][metric.name]["value"]
        report.at_most("--max-drop", gates.max_drop, 0.0 - difference if metric.higher_is_better else difference)
