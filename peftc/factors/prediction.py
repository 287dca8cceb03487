"""What ranks are expected to cost before anything is written, and the whole curve of that against the budget.

A sum over modules adds up their squared losses, each as if it were the only one that changed. `kfac` weighs them so
that half of it is the divergence from the dense model in nats, to second order (`peftc.methods.decompose.kfac`): of
language models per token, as `evaluate` measures it, of others per sample. On trained networks that is 2 to 9 times too
little: the error of one layer is carried through all others, and factors fit the samples that they were made from
(tests/benchmarks/RESULTS.md). So where a network can be run, ranks are tried as a whole on a few samples, and that is
what is said. The losses of other methods are in units of their own; they are only compared with the whole.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from peftc import processes
from peftc.errors import PlanError
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import Decision, Ranks
from peftc.factors.trial import Trial, is_in_nats, tokens_of
from peftc.plans.plan import Aim, Budget
from peftc.report import Report, Table, short

RATIOS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95", "1.0")
PER_SAMPLE, PER_TOKEN, SHARE = "nats per sample", "nats per token", "relative squared error"
TRIED = ("0.3", "0.5", "0.75", "0.9")  # ratios of the curve at which plans are tried as a whole
DIGITS = 4  # of a figure; the last ones of a loss depend on how its module was solved
MORE = "together they have lost 2 to 9 times that on trained models"

Point = dict[str, Any]  # of the curve, JSON-ready
Anchors = list[
    tuple[float, float]
]  # of plans that were tried: sum over modules and measured loss, both rising, above 0


def unit_of(work: Factoring) -> str:
    """Return what a predicted loss counts under the method at hand."""
    if not is_in_nats(work):
        return SHARE
    return PER_TOKEN if tokens_of(work) > 1 else PER_SAMPLE


def loss(work: Factoring, ranks: Ranks, cuts: Mapping[str, Mapping[str, Any]] | None = None) -> float:
    """Return the predicted loss of ranks: half the summed squared losses, or their mean share of each module's own.

    Args:
        work: the eligible modules; one without a rank loses nothing. A spectrum is computed only where none is known.
        ranks: of them.
        cuts: module -> what `Factoring.factor` found of it, in place of a spectrum.
    """

    def squared(name: str, rank: int) -> tuple[float, float]:
        if cuts:
            lost, whole = cuts[name]["squared"]
            return lost, whole
        table = work.losses_of(name)
        return float(table[rank]), float(table[0])

    found = [squared(name, rank) for name, rank in ranks.items() if rank is not None and name in work.targets]
    if unit_of(work) != SHARE:
        return _rounded(sum(lost for lost, _ in found) / 2 / tokens_of(work))
    return _rounded(sum(lost / whole for lost, whole in found if whole) / max(len(work.targets), 1))


def add(report: Report, work: Factoring, found: Decision, cuts: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the predicted loss of ranks to a report of `decompose`; where no weight was read there is none.

    ``cuts`` is what `Factoring.factor` found of each; empty in a dry run, and where all losses are known.
    """
    if not cuts and next(work.model.module.parameters()).is_meta:
        report.data["predicted"] = None
        report.notes.append(
            "predicted loss: none, as these ranks were found without reading a weight; see `peftc analyze`"
        )
        return
    apart, unit = loss(work, found.ranks, cuts), unit_of(work)
    if found.lost is None:
        report.data["predicted"] = {"unit": unit, "value": apart, "apart": apart}
        report.notes.append(f"predicted loss, not measured: {_said(apart, unit)}")
        return
    figures = {name: _rounded(each) for name, each in found.lost._asdict().items()}
    report.data["predicted"] = {"unit": unit, **figures, "apart": apart, "samples": found.samples}
    report.notes.append(
        f"predicted loss: {found.lost} {unit} of divergence from the dense model, what these ranks lost on "
        f"{found.samples} samples kept apart from calibration, before anything was written"
    )


def _said(value: float, unit: str) -> str:
    if unit != SHARE:
        return (
            f"{value:g} {unit} of divergence from the dense model, the sum of what modules lose one by one; "
            f"{MORE}, so compare budgets by it"
        )
    return f"{value:g} relative squared error, the mean over the eligible modules"


def anchors_of(tried: Sequence[tuple[float, float]]) -> Anchors:
    """Return the anchors of trials; one that lost less than a milder plan counts as much as that."""
    kept: Anchors = []
    for apart, measured in sorted(each for each in tried if min(each) > 0):
        kept.append((apart, max(measured, kept[-1][1] if kept else 0.0)))
    return kept


def predicted(anchors: Anchors, apart: float) -> float:
    """Return the expected loss of a plan, given the sum over its modules.

    Between the trials it lies along lines in logarithms, beyond them in proportion; without any it is the sum itself.
    """
    if not anchors or not apart:
        return apart
    (low, first), (high, last) = anchors[0], anchors[-1]
    if apart <= low:
        return apart * first / low
    if apart >= high:
        return apart * last / high
    sums, losses = np.log(anchors).T
    return float(np.exp(np.interp(math.log(apart), sums, losses)))


def curve(work: Factoring, allocation: str, multiple: int, trial: Trial | None = None) -> tuple[Anchors, list[Point]]:
    """Return predicted loss and size at each ratio that can be reached, each as `decompose` would plan it.

    It falls with the ratio where the allocation minimises what is predicted: always for ranks that are uniform, and for
    the default of a method. `global` and `convex` under `svd` weigh modules by their size, and may rise by a little.

    Args:
        work: the eligible modules; losses that are known are not computed again.
        allocation, multiple: as the options say.
        trial: measures what ranks lose as a whole; None leaves it at the sums over modules.
    """
    whole, targets = work.whole, work.targets
    points: list[Point] = []
    tried, on = [], None
    for ratio in RATIOS:
        try:
            ranks = work.decide(Aim(Budget("ratio", Fraction(ratio)), allocation, multiple))
        except PlanError:
            continue  # even the smallest rank everywhere is larger
        saved = {
            unit: sum(target.cost(None, unit) - target.cost(ranks[name], unit) for name, target in targets.items())
            for unit in ("entries", "macs")
        }
        apart = loss(work, ranks)
        points.append(
            {
                "ratio": float(ratio),
                "apart": apart,
                "parameters": whole.parameters - saved["entries"],
                "macs": None if whole.macs is None else whole.macs - saved["macs"],
                "factored": sum(rank is not None for rank in ranks.values()),
            }
        )
        if trial is not None and ratio in TRIED:
            on = on or trial.on(trial.samples, trial.folder / f"whole-{trial.samples}")
            lost = processes.agreed(lambda trial=trial, ranks=ranks, on=on: float(trial.lost(ranks, on).mean()))  # type: ignore[misc]
            tried.append((apart, lost))
            points[-1]["measured"] = _rounded(lost)
    anchors = anchors_of(tried)
    return anchors, [{**point, "predicted": _rounded(predicted(anchors, point["apart"]))} for point in points]


def _rounded(value: float) -> float:
    return float(f"{max(value, 0.0):.{DIGITS}g}")


def add_curve(report: Report, work: Factoring, allocation: str, multiple: int, trial: Trial | None) -> Anchors:
    """Add the curve to the report of `analyze`, as figures and as a table; return how it was measured."""
    anchors, points = curve(work, allocation, multiple, trial)
    unit, name, number = unit_of(work), work.factorize.name, len(work.targets)
    found = report.data["curve"] = {"unit": unit, "method": name, "allocation": allocation, "points": points}
    rows = []
    for one in points:
        sizes = [short(one["parameters"]), "" if one["macs"] is None else short(one["macs"])]
        rows.append([f"{one['ratio']:g}", f"{one['predicted']:.3g}", f"{one['factored']} of {number}", *sizes])
    title = f"predicted loss ({unit}) against ratio, {name}, {allocation}"
    columns = ["ratio", "predicted", "factored", "parameters", "multiply-adds"]
    report.tables.append(Table(title, columns, rows))
    if anchors and trial is not None:
        found["samples"] = trial.samples
        ratios = ", ".join(f"{one['ratio']:g}" for one in points if "measured" in one)
        report.notes.append(f"predicted losses: measured on {trial.samples} samples kept apart, at ratio {ratios}")
    elif unit != SHARE:
        report.notes.append(
            f"predicted losses are sums of what modules lose one by one; {MORE}: compare budgets by them"
        )
    return anchors


def add_read_off(report: Report, work: Factoring, ranks: Ranks, anchors: Anchors) -> float:
    """Say what a plan is predicted to lose, as the curve has it, and return it."""
    value, unit = predicted(anchors, loss(work, ranks)), unit_of(work)
    about = f"{_rounded(value):g} {unit}, read off the curve" if anchors else _said(value, unit)
    report.notes.append(f"predicted loss of the plan: {about}")
    return _rounded(value)
