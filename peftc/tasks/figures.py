"""Figures of a task with their intervals, as numbers, as a table and as gates."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from peftc.errors import DataError, UsageError
from peftc.measure.intervals import Interval, bootstrap, paired_shares, wilson
from peftc.options import Gates
from peftc.pages.records import cut_text
from peftc.report import Report, Table, figure
from peftc.tasks.sides import Side
from peftc.tasks.task import Columns, Metric, Task

MOST = 10**7  # samples: nobody has more held out


def metrics_of(row: Task, seed: int, *sides: Columns) -> dict[str, dict[str, float]]:
    """Return each metric of a task with its 95 % interval; of two sides how much more of it the first has."""
    known = [metric for metric in row.metrics if all(metric.column in (None, *side) for side in sides)]
    return {metric.name: interval_of(metric, seed, *sides)._asdict() for metric in known}


def interval_of(metric: Metric, seed: int, columns: Columns, other: Columns | None = None) -> Interval:
    """Return a metric, or how much more of it there is than of another model, with its 95 % interval."""
    if metric.proportion:
        hits = metric.of(columns)
        return wilson(int(hits.sum()), len(hits)) if other is None else paired_shares(hits, metric.of(other))

    def at(rows: np.ndarray) -> float:
        one, two = ({name: each[rows] for name, each in (side or {}).items()} for side in (columns, other))
        return metric.of(one) - metric.of(two) if two else metric.of(one)

    found = bootstrap(at, len(next(iter(columns.values()))), seed=seed)
    if other is None and not math.isfinite(found.value):
        why = "the model gives all of them the same answer"
        raise DataError(f"`{metric.name}` has no value on these samples", why=why)
    return found


def compared_with(row: Task, sides: list[Side], compared: Columns | None, seed: int) -> dict[str, Any]:
    """Return what the second model gives, the paired difference to it, and how far the two agree."""
    one, other = (side.columns for side in sides)
    result: dict[str, Any] = {
        "name": sides[1].model.name,
        "metrics": metrics_of(row, seed, other),
        "difference": metrics_of(row, seed, one, other),
        "agreement": None,
        "divergence": None,
    }
    if compared is not None:
        same, number = compared["same"], compared["count"]

        def mean(sums: np.ndarray) -> dict[str, float]:  # over predictions, resampling the samples that they belong to
            found = bootstrap(lambda rows: float(sums[rows].sum() / number[rows].sum()), len(number), seed=seed)
            return found._asdict()

        result["divergence"] = mean(compared["kl"])
        result["agreement"] = wilson(int(same.sum()), len(same))._asdict() if row.has_classes else mean(same)
    return result


def table_of(row: Task, sides: list[Side], data: dict[str, Any]) -> Table:
    """Return the figures as a table for people."""

    def cell(values: dict[str, float] | None) -> str:
        return "" if values is None else str(Interval(**values))

    used = data["data"]
    known = " that the model knows" if data["seen"] else ""
    what = f"{row.name}: {used['spec']}, split {used['split']}{cut_text(used)}"
    title = f"{what}, {used['samples']} samples{known}, 95 % intervals"
    against = data.get("against")
    columns = ["metric", sides[0].model.name]
    if against is None:
        return Table(title, columns, [[name, cell(values)] for name, values in data["metrics"].items()], main=True)
    rows = [
        [name, cell(values), cell(against["metrics"].get(name)), cell(against["difference"].get(name))]
        for name, values in data["metrics"].items()
    ]
    rows += [[name, cell(against[name]), "", ""] for name in ("agreement", "divergence") if against[name]]
    return Table(title, [*columns, f"against {against['name']}", "difference"], rows, main=True)


def refuse_idle(row: Task | None, max_drop: float | None) -> None:
    """Refuse a gate on a drop that no result could miss, as 2 where 0.02 is meant (UsageError)."""
    metric = row.metrics[0] if row else None
    if metric is None or max_drop is None or max_drop <= 1 or not (metric.proportion or metric.to_one):
        return
    why = f"`{metric.name}` is at most 1, not 100, so a gate on a drop of more than 1 says nothing"
    meant = f"did you mean `--max-drop {max_drop / 100:g}`, {max_drop:g} points of 100?" if max_drop < 100 else None
    raise UsageError(f"`--max-drop {max_drop:g}` could not fail", why=why, hint=meant or "name a drop between 0 and 1")


def add_gates(report: Report, found: Mapping[str, Any], metric: Metric, gates: Gates) -> None:
    """Judge what was found of a metric: a drop is how much worse it is, whichever direction is worse."""
    judge = report.at_least if metric.higher_is_better else report.at_most
    judge("--min-quality", gates.min_quality, found["metrics"][metric.name]["value"])
    if gates.max_drop is not None:
        difference = Interval(**found["against"]["difference"][metric.name])
        drop = -difference if metric.higher_is_better else difference
        report.at_most("--max-drop", gates.max_drop, drop.value)
        if drop.value <= gates.max_drop < drop.high:
            said = f"is met by the middle of the interval; a drop of up to {figure(drop.high)} is not excluded"
            more = _needed(found["data"]["samples"], drop, gates.max_drop)
            by = f"by {found['data']['samples']:,} samples"
            report.notes.append(f"gate --max-drop {gates.max_drop:g} {said} {by}{more}")


def _needed(samples: int, drop: Interval, limit: float) -> str:
    """Say about how many samples would show the same drop to be within a limit: widths fall with their square root."""
    if limit <= drop.value:
        return ""
    needed = samples * ((drop.high - drop.value) / (limit - drop.value)) ** 2
    return f"; if it stays as it is, about {float(f'{needed:.2g}'):,.0f} would" if needed < MOST else ""
