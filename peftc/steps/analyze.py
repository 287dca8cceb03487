"""Source > Model > spectra > allocate > Plan > Report: where is the slack?"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import progress
from peftc.calibration.collection import Statistics, source_of
from peftc.calibration.prepared import Prepared, Request
from peftc.data.given import Data, spec_of
from peftc.errors import UsageError
from peftc.factors import advice, prediction, spectra
from peftc.factors.asked import eligible, refuse_together
from peftc.factors.decide import ranked
from peftc.factors.factoring import Factoring
from peftc.factors.joint import arrange, said
from peftc.factors.prediction import Anchors
from peftc.factors.ranks import allocation_of
from peftc.factors.spectra import Factorizer
from peftc.factors.speedup import tell_timed
from peftc.factors.tables import dense_table
from peftc.factors.trial import Trial, trial_of
from peftc.methods.spectrum import tail_energies
from peftc.models.load import load, refuse_non_finite
from peftc.models.model import Model
from peftc.models.place import device_of, solver_device
from peftc.models.targets import every_weight, find_targets
from peftc.nn.surgery import parameters
from peftc.options import Budgets, Calibration, Reading
from peftc.pages import pictures
from peftc.pages.plot import draw, refuse_unwritable
from peftc.plans import allocate
from peftc.plans.plan import Aim, Input, Target, budget_of, multiple_of
from peftc.report import Report, Table, by_kind, count, percent
from peftc.store.source import Source

ENERGIES = (90, 95, 99)
SAMPLES = 16  # of the calibration set for one module; plans are tried on four times as many
POINTS = 25  # of a spectrum, in JSON


def analyze(
    model: str | Path | Source | nn.Module | Model,
    *,
    plan: str | Path | None = None,
    plot: str | Path | None = None,
    ratio: str | float | Fraction | None = None,
    rank: int | None = None,
    energy: str | float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    speedup: str | float | None = None,
    allocation: str = "auto",
    rank_multiple: int = 1,
    method: str = "auto",
    conv_method: str = "spatial",
    settings: Mapping[str, Any] | None = None,
    joint: bool = False,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    data: Data | None = None,
    statistics: str | Path | None = None,
    calibration_samples: int = 512,
    calibration_tokens: float | None = None,
    bias_correction: bool = True,
    task: str | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Report:
    """Measure the rank spectrum of every Linear, Conv and Embedding module, and predict what each ratio loses.

    With a budget, plan ranks for it. One weight is read at a time; only a calibration holds the model.

    Args:
        model: any form of MODEL.
        plan: where to write the plan that `decompose` takes; without a budget, for ``ratio`` 0.5.
        plot: where to draw the spectra and the predicted losses, as PNG or SVG by its ending.
        ratio, rank, energy, target_params, target_macs, speedup: the budget of the plan, at most one.
        allocation, rank_multiple, method, conv_method, settings, joint, include, skip, device, seed: as for
            `decompose`.
        data, statistics, calibration_samples, calibration_tokens, bias_correction, task, image_column, text_column,
            label_column: what predictions and plans are calibrated on, as for `decompose`; the spectra in the table
            stay those of the weights alone.
        streaming: read a data set of the hub as it comes, keep no copy of it, and calibrate on samples of its first
            rows.
        workers: processes that read samples ahead, 0 for none; when None as many as pay, within the cores.
        batch_size, image_size, max_length: what a ``speedup`` is timed on, as for `decompose`.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    given = locals()
    budgets, reading, calibration = Budgets.of(given), Reading.of(given), Calibration.of(given)
    data = None if data is None else spec_of(data, reading)
    notes = []
    if plan is not None and budgets == Budgets():
        budgets = Budgets(ratio="0.5")
        notes.append("no budget was given: planned for `--ratio 0.5`")
    budget = None if budgets == Budgets() else budget_of(**vars(budgets))
    refuse_together({"joint": joint, "speedup": speedup})
    for option, path in (("--plan", plan), ("--plot", plot)):
        refuse_unwritable(option, path)
    with_data, place = data is not None or statistics is not None, solver_device(device_of(device))
    factorize = spectra.factorizer(method, conv_method, settings, with_data=with_data, correct_bias=bias_correction)
    if data is not None and not factorize.needs:
        raise UsageError("`--data` is of no use here", why=f"`--method {factorize.name}` takes the weights alone")
    sample = Input(batch_size, image_size, max_length, device, seed)
    allocation, multiple = allocation_of(allocation, factorize.needs), multiple_of(rank_multiple)

    loaded = load(model)
    refuse_non_finite(loaded)
    find = find_targets if budget is None else eligible
    targets, reasons = find(loaded, conv_method=conv_method, include=include, skip=skip)
    asked = None if data is None else Request.of(data, reading, calibration)
    source = source_of(loaded, factorize.needs, asked, statistics, device, tries=True)
    weights = {**every_weight(loaded), **targets}
    found = _spectra(loaded, weights, spectra.factorizer("svd", conv_method, None), place)
    total = parameters(loaded.module)
    rows = [_row(weights[name], values, total, reasons.get(name)) for name, values in found.items()]
    report = Report("analyze", {"parameters": total, "modules": rows}, tables=[_table(rows), dense_table([], reasons)])
    report.notes += notes + loaded.notes
    arrange(loaded, targets, None, joint)
    work = Factoring(loaded, targets, factorize, place, reasons)
    work.leave_uncalled(include)
    with tempfile.TemporaryDirectory() as folder:
        if source is not None:
            work.calibrate(source, Path(folder))
            report.notes += work.factorize.statistics.notes  # type: ignore[union-attr]
            report.warnings += work.factorize.statistics.warnings  # type: ignore[union-attr]
        elif factorize.name == "svd":
            alone = [n for n, each in targets.items() if not each.members]
            work.losses |= {name: tail_energies(found[name]) for name in alone}
        trial = _trial(work, source, Path(folder))
        anchors = prediction.add_curve(report, work, allocation, multiple, trial) if work.targets else []
        if budget is not None:
            _plan(report, work, Aim(budget, allocation, multiple, sample), anchors, plan)
    if plot is not None:
        values = {name: each.tolist() for name, each in found.items()}
        draw(Path(plot), pictures.of_analysis(loaded.name, report.data, values))
        report.notes.append(f"spectra and predicted losses drawn in `{plot}`")
    spec = loaded.source.spec if isinstance(model, str | Path | Source) else "MODEL"
    advice.add(report, spec, data, None if plan is None else str(plan))
    return report


def _plan(report: Report, work: Factoring, aim: Aim, anchors: Anchors, file: str | Path | None) -> None:
    """Add the plan under a budget and what it is predicted to lose, and write it."""
    decided = ranked(work, aim)
    _say_plan(report, work.targets, decided.ranks, str(aim.budget), aim.allocation)
    report.data["plan"]["predicted"] = prediction.add_read_off(report, work, decided.ranks, anchors)
    tell_timed(report, decided)
    if file is not None:
        work.plan(decided.ranks, f"{aim.budget} {aim.allocation}").write(Path(file))
        report.artifact = Path(file)


def _trial(work: Factoring, source: Prepared | Statistics | None, folder: Path) -> Trial | None:
    """Return what measures ranks as a whole on a few samples; None where losses are no divergences."""
    trial = trial_of(work, source, SAMPLES, folder)
    if trial is not None:
        work.keep_bases(folder)
    return trial


def _spectra(
    model: Model, weights: Mapping[str, Target], factorize: Factorizer, device: torch.device
) -> dict[str, Tensor]:
    """Return name -> singular values (k,), descending, reading one weight at a time."""
    found = {}
    with progress.track("spectra", len(weights)) as advance:
        for name, target in weights.items():
            found[name] = factorize(spectra.weight_of(model, target, device), target).values.cpu()
            advance(name)
    return found


def _row(target: Target, values: Tensor, total: int, reason: str | None) -> dict[str, Any]:
    """Return the figures of one module."""
    squares = values.square()
    energy = squares.sum()
    kept = squares.cumsum(0) / energy if energy else torch.ones_like(squares)
    share = values / values.sum() if energy else values
    entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
    largest = allocate.max_rank(target.shape, target.form)
    return {
        "name": target.name,
        "form": target.form,
        "shape": list(target.shape),
        "parameters": target.entries,
        "share": target.entries / total,
        "max_rank": largest,
        "break_even_rank": allocate.break_even_rank(target.shape, target.form),
        "effective_rank": math.exp(entropy) if energy else 0.0,
        "stable_rank": float(energy / squares[0]) if energy else 0.0,
        **{f"rank_{level}": min(int((kept < level / 100).sum()) + 1, largest) if energy else 0 for level in ENERGIES},
        "largest": float(values[0]),
        "smallest": float(values[-1]),
        "spectrum": _spectrum(values),
        "eligible": reason is None,
        "reason": reason,
    }


def _spectrum(values: Tensor) -> list[list[float]]:
    """Return rank and singular value in shares of the largest, at ranks that tell the shape of the spectrum."""
    last = len(values) - 1
    ranks = sorted({round(last * at / (POINTS - 1)) for at in range(POINTS)}) if last else [0]
    return [[rank + 1, float(f"{float(values[rank] / (values[0] or 1)):.4g}")] for rank in ranks]


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Group eligible modules of one kind: their share of the parameters, and medians of their ranks."""

    def shape(some: list[Any]) -> str:
        shapes = {"x".join(map(str, row["shape"])) for row in some}
        return shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"

    def middle(key: str) -> Callable[[list[Any]], str]:
        return lambda some: f"{sorted(row[key] for row in some)[len(some) // 2]:.0f}"

    columns = {
        "shape": shape,
        "share": lambda some: percent(sum(row["share"] for row in some)),
        "full": middle("max_rank"),
        "break-even": middle("break_even_rank"),
        "effective": middle("effective_rank"),
        "stable": middle("stable_rank"),
        **{f"{level} %": middle(f"rank_{level}") for level in (ENERGIES[0], ENERGIES[-1])},
    }
    found = {row["name"]: row for row in rows if row["eligible"]} or {row["name"]: row for row in rows}
    table = by_kind("", found, columns)
    path = _common_path([str(kind) for kind, *_ in table.rows])
    named = [[f"{str(kind)[len(path) :]} ({number})", *cells] for kind, number, *cells in table.rows]
    title = f"ranks of modules{f' in `{path[:-1]}`' if path else ''}, medians"
    return Table(title, ["module", *columns], named, main=True)


def _common_path(names: Sequence[str]) -> str:
    """Return what dotted names begin with, all of them, up to a dot and with it."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)  # as many as the shortest has
    same = list(itertools.takewhile(lambda some: len(set(some)) == 1, parts))
    return "".join(f"{some[0]}." for some in same)


def _say_plan(
    report: Report, targets: Mapping[str, Target], ranks: Mapping[str, int | None], budget: str, allocation: str
) -> None:
    kept = sum(targets[name].cost(rank, "entries") for name, rank in ranks.items())
    dense = sum(target.entries for target in targets.values())
    total = report.data["parameters"]
    by_module = {each: rank for name, rank in ranks.items() for each in targets[name].members or (name,)}
    for row in report.data["modules"]:
        if row["name"] in by_module:
            row["planned_rank"] = by_module[row["name"]]
    after, share = total - dense + kept, kept / dense if dense else 1.0
    report.data["plan"] = {"budget": budget, "allocation": allocation, "parameters": after, "eligible": share}
    report.notes += said(targets, ranks)
    factored = sum(rank is not None for rank in ranks.values())
    report.notes.append(
        f"planned {budget}, {allocation}: {factored} of {len(ranks)} eligible modules factored, "
        f"{percent(share)} of their weights and {count(after)} of {count(total)} parameters kept"
    )
