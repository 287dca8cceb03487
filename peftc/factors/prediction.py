"""What ranks are expected to cost before anything is written, and the whole curve of that against the budget.

A sum over modules adds up their squared losses, each as if it were the only one that changed. `kfac` weighs them so
that half of it is the divergence from the dense model in nats, to second order (`peftc.methods.decompose.kfac`): of
language models per token, as `evaluate` measures it, of others per sample. On trained networks that is 2 to 9 times too
little: the error of one layer is carried through all others, and factors fit the samples that they were made from
(tests/benchmarks/RESULTS.md). So where a network can be run, ranks are tried as a whole on a few samples, and that is
what is said. The losses of other methods are in units of their own; they are only compared with the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from peftc.errors import PlanError
from peftc.factors import sensitivity
from peftc.factors.factoring import Factoring
from peftc.measure.intervals import Interval
from peftc.plans.plan import Budget
from peftc.report import Report, Table, short

RATIOS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95", "1.0")
PER_SAMPLE, PER_TOKEN, SHARE = "nats per sample", "nats per token", "relative squared error"
TRIED = ("0.3", "0.5", "0.75", "0.9")  # ratios of the curve at which plans are tried as a whole
DIGITS = 4  # of a figure; the last ones of a loss depend on how its module was solved

Point = dict[str, Any]  # of the curve, JSON-ready


@dataclass(frozen=True)
class Trial:
    """What measures ranks as a whole.

    Attributes:
        lost: ranks -> divergence from the dense model, in nats per sample, of language models per token.
        samples: of the calibration set, on which it is measured.
    """

    lost: Callable[[Mapping[str, int | None]], Interval]
    samples: int


@dataclass(frozen=True)
class Held:
    """Squared errors by rank, of a weight that was let go."""

    table: Tensor

    def losses(self) -> Tensor:
        """Return them."""
        return self.table


def unit_of(work: Factoring) -> str:
    """Return what a predicted loss counts under the method at hand."""
    if "output_gradient_gram" not in work.factorize.needs:
        return SHARE
    return PER_TOKEN if sensitivity.tokens_of(work) > 1 else PER_SAMPLE


def loss(work: Factoring, ranks: Mapping[str, int | None], squared: Callable[[str, int], tuple[float, float]]) -> float:
    """Return the predicted loss of ranks: half the summed squared losses, or their mean share of each module's own.

    Args:
        work: the eligible modules; one without a rank loses nothing.
        ranks: of them.
        squared: (module, rank) -> its squared loss at that rank, and at rank 0.
    """
    found = [squared(name, rank) for name, rank in ranks.items() if rank is not None and name in work.targets]
    if unit_of(work) != SHARE:
        total = sum(lost for lost, _ in found) / 2 / sensitivity.tokens_of(work)
    else:
        total = sum(lost / whole for lost, whole in found if whole) / max(len(work.targets), 1)
    return _rounded(total)


def from_spectra(work: Factoring) -> Callable[[str, int], tuple[float, float]]:
    """Return a reader of squared losses that computes a spectrum only where none is known yet."""

    def squared(name: str, rank: int) -> tuple[float, float]:
        table = work.losses_of(name)
        return float(table[rank]), float(table.flatten()[0])

    return squared


def add(
    report: Report,
    work: Factoring,
    ranks: Mapping[str, int | None],
    cuts: Mapping[str, Mapping[str, Any]],
    measured: Interval | None = None,
    samples: int = 0,
) -> None:
    """Add the predicted loss of ranks to a report; where no weight was read there is none.

    Args:
        report: of `decompose`.
        work: the eligible modules.
        ranks: of them.
        cuts: what `Factoring.factor` found of each; empty in a dry run.
        measured: what the ranks lost when they were tried as a whole; None where they were not.
        samples: of the calibration set, on which they were tried.
    """
    if not cuts and next(work.model.module.parameters()).is_meta:
        report.data["predicted"] = None
        report.notes.append(
            "predicted loss: none, as these ranks were found without reading a weight; see `peftc analyze`"
        )
        return
    known = {name: tuple(cut["squared"]) for name, cut in cuts.items()}
    read = (lambda name, _rank: known[name]) if known else from_spectra(work)
    apart, unit = loss(work, ranks, read), unit_of(work)
    if measured is None:
        report.data["predicted"] = {"unit": unit, "value": apart, "apart": apart}
        report.notes.append(f"predicted loss, not measured: {said(apart, unit)}")
        return
    figures = {name: _rounded(each) for name, each in measured._asdict().items()}
    report.data["predicted"] = {"unit": unit, **figures, "apart": apart, "samples": samples}
    report.notes.append(
        f"predicted loss: {measured} {unit} of divergence from the dense model, what these ranks lost on "
        f"{samples} samples kept apart from calibration, before anything was written"
    )


def said(value: float, unit: str) -> str:
    """Write a predicted loss with what it means."""
    if unit != SHARE:
        return (
            f"{value:g} {unit} of divergence from the dense model, the sum of what modules lose one by one; "
            "together they have lost 2 to 9 times that on trained models, so compare budgets by it"
        )
    return f"{value:g} relative squared error, the mean over the eligible modules"


@dataclass(frozen=True)
class Anchors:
    """What plans lose as a whole against the sum of what their modules lose.

    Attributes:
        tried: (sum over modules, measured), both rising and above 0; empty where nothing was tried.
    """

    tried: Sequence[tuple[float, float]] = ()

    @classmethod
    def of(cls, tried: Sequence[tuple[float, float]]) -> Anchors:
        """Return the anchors of trials; one that lost less than a milder plan counts as much as that."""
        kept: list[tuple[float, float]] = []
        for apart, measured in sorted(each for each in tried if min(each) > 0):
            kept.append((apart, max(measured, kept[-1][1] if kept else 0.0)))
        return cls(kept)

    def predicted(self, apart: float) -> float:
        """Return the expected loss of a plan: between the trials along lines in logarithms, beyond them in proportion.

        Args:
            apart: the sum over modules.
        """
        if not self.tried or not apart:
            return apart
        (low, first), (high, last) = self.tried[0], self.tried[-1]
        if apart <= low:
            return apart * first / low
        if apart >= high:
            return apart * last / high
        sums, losses = np.log(self.tried).T
        return float(np.exp(np.interp(math.log(apart), sums, losses)))


def curve(work: Factoring, allocation: str, multiple: int, trial: Trial | None = None) -> tuple[Anchors, list[Point]]:
    """Return predicted loss and size at each ratio that can be reached, each as `decompose` would plan it.

    It falls with the ratio where the allocation minimises what is predicted: always for ranks that are uniform, and for
    the default of a method. `global` and `convex` under `svd` weigh modules by their size, and may rise by a little.

    Args:
        work: the eligible modules; spectra that are known are not computed again.
        allocation, multiple: as the options say.
        trial: measures what ranks lose as a whole; None leaves it at the sums over modules.
    """
    known = {name: Held(work.losses_of(name)) for name in work.targets}
    dense = sum(target.entries for target in work.targets.values())
    points: list[Point] = []
    tried = []
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
        apart = loss(work, ranks, from_spectra(work))
        points.append(
            {
                "ratio": float(ratio),
                "apart": apart,
                "parameters": whole.parameters - dense + kept,
                "macs": None if whole.macs is None else whole.macs - saved,
                "factored": sum(rank is not None for rank in ranks.values()),
            }
        )
        if trial is not None and ratio in TRIED:
            tried.append((apart, trial.lost(ranks).value))
            points[-1]["measured"] = _rounded(tried[-1][1])
    anchors = Anchors.of(tried)
    return anchors, [{**point, "predicted": _rounded(anchors.predicted(point["apart"]))} for point in points]


def _rounded(value: float) -> float:
    return float(f"{max(value, 0.0):.{DIGITS}g}")


def add_curve(report: Report, work: Factoring, allocation: str, multiple: int, trial: Trial | None) -> Anchors:
    """Add the curve to a report, as figures and as a table; return how it was measured.

    Args:
        report: of `analyze`.
        work, allocation, multiple, trial: as for `curve`.
    """
    anchors, points = curve(work, allocation, multiple, trial)
    unit = unit_of(work)
    report.data["curve"] = {"unit": unit, "method": work.factorize.name, "allocation": allocation, "points": points}
    rows = [
        [
            f"{one['ratio']:g}",
            f"{one['predicted']:.3g}",
            f"{one['factored']} of {len(work.targets)}",
            short(one["parameters"]),
            "" if one["macs"] is None else short(one["macs"]),
        ]
        for one in points
    ]
    title = f"predicted loss ({unit}) against ratio, {work.factorize.name}, {allocation}"
    report.tables.append(Table(title, ["ratio", "predicted", "factored", "parameters", "multiply-adds"], rows))
    if anchors.tried and trial is not None:
        report.data["curve"]["samples"] = trial.samples
        ratios = ", ".join(f"{one['ratio']:g}" for one in points if "measured" in one)
        report.notes.append(f"predicted losses: measured on {trial.samples} samples kept apart, at ratio {ratios}")
    elif unit != SHARE:
        report.notes.append(
            "predicted losses are sums of what modules lose one by one; together they have lost 2 to 9 times that on "
            "trained models: compare budgets by them"
        )
    return anchors


def add_read_off(report: Report, work: Factoring, ranks: Mapping[str, int | None], anchors: Anchors) -> float:
    """Say what a plan is predicted to lose, as the curve has it, and return it."""
    value, unit = anchors.predicted(loss(work, ranks, from_spectra(work))), unit_of(work)
    about = f"{_rounded(value):g} {unit}, read off the curve" if anchors.tried else said(value, unit)
    report.notes.append(f"predicted loss of the plan: {about}")
    return _rounded(value)
