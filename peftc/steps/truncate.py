"""Artifact with ordered factors > Plan > slices > surgery > Artifact > Report: one decomposition, any size."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from peftc.factors import ordered, tables
from peftc.factors.asked import asked_budget, asked_plan, request_of, words
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import allocation_of
from peftc.factors.spectra import Factorizer
from peftc.methods import registry
from peftc.methods.spectrum import Spectrum
from peftc.models import write
from peftc.models.load import load
from peftc.models.model import Model, detached
from peftc.nn.surgery import tensor_bytes
from peftc.options import Budgets
from peftc.plans.plan import Aim, Plan
from peftc.report import Report, gate_size
from peftc.store.source import Source


def truncate(
    model: str | Path | Source | Model,
    *,
    output_dir: str | Path | None = None,
    ratio: str | float | Fraction | None = None,
    rank: int | None = None,
    energy: str | float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    plan: str | Path | Plan | None = None,
    allocation: str = "auto",
    max_params: float | None = None,
    max_bytes: float | None = None,
    max_shard_size: str | int = "5GB",
    dry_run: bool = False,
    overwrite: bool = False,
) -> Report:
    """Cut the factors of an artifact that `decompose` wrote with ``keep_all_ranks`` to a budget: a slice, no solving.

    The ranks and, within rounding, the factors are those that `decompose` finds for the same budget.

    Args:
        model: the artifact; it is not changed.
        output_dir: the artifact's folder; ``<model>-truncate`` when None.
        ratio, rank, energy, target_params, target_macs, plan: the budget, as for `decompose`.
        allocation: as for `decompose`.
        max_params, max_bytes: gates.
        max_shard_size: bytes per weight file, as ``5GB``.
        dry_run: stop at the plan and write nothing.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    budget = asked_budget(plan, Budgets.of(locals()))
    shard_bytes = write.shard_bytes(max_shard_size)

    loaded = load(model)
    record = ordered.refuse_unordered(loaded)
    method = registry.find("decompose", ordered.request_of(record)["method"], "--method")
    needs = registry.needs_of(method)
    allocation = allocation_of(allocation, needs)
    loaded = replace(loaded, module=detached(loaded.module), notes=[])
    targets, reasons = ordered.ordered_targets(loaded, record)
    known = ordered.stored(loaded, record, targets)
    given = asked_plan(plan, targets)
    work = Factoring(loaded, targets, Factorizer("kept", _solved, {}), torch.device("cpu"), reasons)
    work.losses = {name: each.losses for name, each in known.items()}
    work.cut = lambda name, rank: known[name].kept(rank)
    decided = given.ranks if given else work.decide(Aim(budget, allocation))  # type: ignore[arg-type]
    error = "loss" if needs else "error"  # weighted by statistics it is no error of the weights
    cuts = {name: {error: known[name].error(cut)} for name, cut in decided.items() if isinstance(cut, int)}
    report = tables.report_on("truncate", work, decided, cuts, words(budget, allocation, plan))
    if dry_run:
        report.notes.append("dry run: nothing was written")
        return report
    request = {
        "command": "truncate",
        **request_of(budget, allocation, given),
        "max_shard_bytes": shard_bytes,
    }
    output = write.output_folder(output_dir, loaded, "truncate")
    with write.writing(loaded, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            report = write.already(job, "truncate")
        else:
            work.job = job
            job.require(tensor_bytes(loaded.module))
            work.write(report, decided, base, request)
    gate_size(report, max_params, max_bytes)
    tables.summarise(report, words(budget, allocation, plan)[0], data=None)
    return report


def _solved(_weight: Tensor) -> Spectrum:
    raise AssertionError("unreachable: the factors of every module are stored")
