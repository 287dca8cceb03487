"""What ranks are expected to cost before anything is factored, and the whole curve of that against the budget.

A prediction adds up the squared losses of the modules, each as if it were the only one that changed. `kfac` weighs them
so that half their sum is the divergence from the dense model in nats per sample, to second order (`peftc.methods.
decompose.kfac`). The losses of other methods are in units of their own; they are only compared with the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from peftc.allocate import Rank
from peftc.errors import PlanError
from peftc.plan import Budget
from peftc.report import Report, Table, short
from peftc.steps.factoring import Factoring

RATIOS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95", "1.0")
NATS, SHARE = "nats per sample", "relative squared error"
DIGITS = 4  # of a figure; the last ones of a loss depend on how its module was solved


@dataclass(frozen=True)
class Held:
    """Squared errors by rank, of a weight that was let go."""

    table: Tensor

    def losses(self) -> Tensor:
        """Return them."""
        return self.table


def unit_of(work: Factoring) -> str:
    """Return what a predicted loss counts under the method at hand."""
    return NATS if "output_gradient_gram" in work.factorize.needs else SHARE


def loss(
    work: Factoring, ranks: Mapping[str, Rank | None], squared: Callable[[str, Rank], tuple[float, float]]
) -> float:
    """Return the predicted loss of ranks: half the summed squared losses, or their mean share of each module's own.

    Args:
        work: the eligible modules; one without a rank loses nothing.
        ranks: of them.
        squared: (module, rank) -> its squared loss at that rank, and at rank 0.
    """
    found = [squared(name, rank) for name, rank in ranks.items() if rank is not None and name in work.targets]
    if unit_of(work) == NATS:
        total = sum(lost for lost, _ in found) / 2
    else:
        total = sum(lost / whole for lost, whole in found if whole) / max(len(work.targets), 1)
    return float(f"{max(total, 0.0):.{DIGITS}g}")


def from_spectra(work: Factoring) -> Callable[[str, Rank], tuple[float, float]]:
    """Return a reader of squared losses that computes a spectrum only where none is known yet."""

    def squared(name: str, rank: Rank) -> tuple[float, float]:
        table = work.losses_of(name)
        return float(table[rank]), float(table.flatten()[0])

    return squared


def add(
    report: Report, work: Factoring, ranks: Mapping[str, Rank | None], cuts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add the predicted loss of ranks to a report; where no weight was read there is none.

    Args:
        report: of `decompose`.
        work: the eligible modules.
        ranks: of them.
        cuts: what `Factoring.factor` found of each; empty in a dry run.
    """
    if not cuts and next(work.model.module.parameters()).is_meta:
        report.data["predicted"] = None
        report.notes.append(
            "predicted loss: none, as these ranks were found without reading a weight; see `peftc analyze`"
        )
        return
    known = {name: tuple(cut["squared"]) for name, cut in cuts.items()}
    read = (lambda name, _rank: known[name]) if known else from_spectra(work)
    value, unit = loss(work, ranks, read), unit_of(work)
    report.data["predicted"] = {"unit": unit, "value": value}
    report.notes.append(f"predicted loss, not measured: {said(value, unit)}")


def said(value: float, unit: str) -> str:
    """Write a predicted loss with what it means."""
    if unit == NATS:
        return (
            f"{value:g} nats per sample of divergence from the dense model (to second order; too low with few samples)"
        )
    return f"{value:g} relative squared error, the mean over the eligible modules"


def curve(work: Factoring, allocation: str, multiple: int) -> list[dict[str, Any]]:
    """Return predicted loss and size at each ratio that can be reached, each as `decompose` would plan it.

    It falls with the ratio where the allocation minimises what is predicted: always for ranks that are uniform, and for
    the default of a method. `global` and `convex` under `svd` weigh modules by their size, and may rise by a little.

    Args:
        work: the eligible modules; spectra that are known are not computed again.
        allocation, multiple: as the options say.
    """
    known = {name: Held(work.losses_of(name)) for name in work.targets}
    dense = sum(target.entries for target in work.targets.values())
    points = []
    for ratio in RATIOS:
        try:
            ranks = work.decide(Budget("ratio", Fraction(ratio)), allocation, known, multiple)
        except PlanError:
            continue  # even the smallest rank everywhere is larger
        whole = work.whole
        kept, saved = 0, 0
        for name, target in work.targets.items():
            kept += target.cost(ranks[name], "entries")
            saved += target.cost(None, "macs") - target.cost(ranks[name], "macs")
        points.append({
            "ratio": float(ratio), "predicted": loss(work, ranks, from_spectra(work)),
            "parameters": whole.parameters - dense + kept, "macs": None if whole.macs is None else whole.macs - saved,
            "factored": sum(rank is not None for rank in ranks.values()),
        })  # fmt: skip
    return points


def add_curve(report: Report, work: Factoring, allocation: str, multiple: int) -> None:
    """Add the curve to a report, as figures and as a table."""
    points, unit = curve(work, allocation, multiple), unit_of(work)
    report.data["curve"] = {"unit": unit, "method": work.factorize.name, "allocation": allocation, "points": points}
    rows = [
        [f"{one['ratio']:g}", f"{one['predicted']:.3g}", f"{one['factored']} of {len(work.targets)}",
         short(one["parameters"]), "" if one["macs"] is None else short(one["macs"])]
        for one in points
    ]  # fmt: skip
    title = f"predicted loss ({unit}) against ratio, {work.factorize.name}, {allocation}"
    report.tables.append(Table(title, ["ratio", "predicted", "factored", "parameters", "multiply-adds"], rows))
    if unit == NATS:
        report.notes.append(
            "predicted losses are to second order, and too low with few samples: compare budgets by them"
        )
