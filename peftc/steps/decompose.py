"""Source > Model > Plan > Method per module > surgery > Artifact > Report (PELA, step 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from peftc import allocate, measure
from peftc.allocate import Rank
from peftc.errors import PlanError, UsageError, one_of
from peftc.models.load import Model, detached, device_of, load, refuse_unbuildable, solver_device
from peftc.models.targets import targets as find_targets
from peftc.plan import Plan, Target
from peftc.report import Report, grouped
from peftc.source import Source
from peftc.steps import factored, ordered, spectra, write
from peftc.steps.factoring import Factoring

FEW_SAMPLES = 8


def decompose(
    model: str | Path | Source | nn.Module | Model,
    *,
    output_dir: str | Path | None = None,
    ratio: str | float | Fraction | None = None,
    rank: int | None = None,
    energy: str | float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    plan: str | Path | Plan | None = None,
    keep_all_ranks: bool = False,
    allocation: str = "energy",
    method: str = "svd",
    conv_method: str = "spatial",
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    data: str | None = None,
    task: str | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    max_params: float | None = None,
    max_bytes: float | None = None,
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    seed: int = 0,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Report:
    """Replace dense modules by low-rank factors and write the result as an artifact.

    Args:
        model: any form of MODEL; a live network is copied, not changed.
        output_dir: the artifact's folder; ``<model>-decompose`` when None.
        ratio: share of the eligible modules' weight entries to keep, in (0, 1].
        rank: the same rank in every eligible module, >= 1.
        energy: share of each module's squared singular values to keep, in (0, 1].
        target_params, target_macs: size of the whole model.
        plan: ranks decided before, as `analyze` writes them.
        keep_all_ranks: in place of a budget, keep the weights and store the factors of every rank for `truncate`.
        allocation: ``uniform`` (PELA's formula), or one greedy pass: ``global``, ``energy``, ``convex``.
        method, conv_method, settings: how to factor.
        include, skip: patterns over dotted names; a skip beats an include.
        data, task, num_samples, batch_size, image_size, max_length: held-out data to measure the result on.
        max_drop, min_quality, max_params, max_bytes: gates.
        max_shard_size: bytes per weight file, as ``5GB``.
        device, seed: where and with which random numbers to compute.
        dry_run: stop at the plan and write nothing.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    one_of("--allocation", allocation, allocate.ALLOCATIONS)
    if data is None and (max_drop is not None or min_quality is not None):
        raise UsageError("`--max-drop` and `--min-quality` need held-out data", hint="name it: `--data DATA`")
    budget = factored.asked_budget(
        plan, keep_all_ranks=keep_all_ranks, ratio=ratio, rank=rank, energy=energy, target_params=target_params,
        target_macs=target_macs,
    )  # fmt: skip
    factorize = spectra.factorizer(method, conv_method, settings)
    shard_bytes = factored.shard_bytes(max_shard_size)
    place = solver_device(device_of(device))

    by_shape = budget is None or not spectra.needs_spectra(budget, allocation)
    loaded = load(model, weights=not (dry_run and by_shape))
    ordered.refuse_ordered(loaded)
    if isinstance(model, Model):
        loaded = replace(loaded, module=detached(loaded.module))
    if isinstance(model, nn.Module) and not dry_run:
        refuse_unbuildable(loaded)
    targets, reasons = eligible(loaded, conv_method=conv_method, include=include, skip=skip)
    given = factored.asked_plan(plan, targets)
    if not next(loaded.module.parameters()).is_meta:
        spectra.refuse_non_finite(loaded)
    work = Factoring(loaded, targets, factorize, place)
    work.leave_uncalled(reasons, include)
    if keep_all_ranks:
        ordered.refuse_pairs(work.targets)
    asked, why_dense = factored.words(budget, allocation, plan)

    def ranks() -> dict[str, Rank | None]:
        return given.ranks if given else work.decide(budget, allocation)  # type: ignore[arg-type]

    if dry_run:
        if keep_all_ranks:
            report = ordered.report_on(work, {}, reasons)
        else:
            report = factored.report_on("decompose", work, ranks(), {}, reasons, asked, why_dense)
        report.notes.append("dry run: nothing was written")
        return report
    quality = {
        "data": data, "task": task, "batch_size": batch_size, "image_size": image_size, "max_length": max_length,
        "device": device, "seed": seed,
    }  # fmt: skip
    if data is not None:
        _refuse_unfit_data(loaded, **quality)
    request = {
        "command": "decompose", "budget": {budget.kind: str(budget.amount)} if budget else None,
        "allocation": allocation if budget else None, "plan": given.to_json() if given else None,
        "method": method, "conv_method": conv_method, "settings": dict(factorize.settings),
        "include": list(include), "skip": list(skip), "max_shard_bytes": shard_bytes,
        "device": place.type, "seed": seed, **({"keep_all_ranks": True} if keep_all_ranks else {}),
    }  # fmt: skip
    output = write.output_folder(output_dir, loaded, "decompose")
    with write.writing(loaded, output, request, overwrite=overwrite) as (job, base):
        work.job = job
        if job.done:
            report = write.already(job, "decompose")
        elif keep_all_ranks:
            report = ordered.keep_all(work, base, request, reasons, max_shard_bytes=shard_bytes)
        else:
            job.require(2 * measure.tensor_bytes(loaded.module))
            decided = ranks()
            report = factored.report_on("decompose", work, decided, work.factor(decided), reasons, asked, why_dense)
            factored.carry_out(report, work, decided, base, request, budget, max_shard_bytes=shard_bytes)
    factored.gate_size(report, max_params, max_bytes)
    if data is not None:
        against = model if isinstance(model, nn.Module | Model) else loaded.source
        limits = {"num_samples": num_samples, "max_drop": max_drop, "min_quality": min_quality}
        _add_quality(report, loaded.source, against=against, **quality, **limits)
    return report


def _refuse_unfit_data(model: Model, **options: Any) -> None:
    """Evaluate the model itself on a few samples, so that data that does not fit it is refused before the work."""
    from peftc.steps.evaluate import evaluate

    evaluate(replace(model, module=detached(model.module)), num_samples=FEW_SAMPLES, **options)


def _add_quality(report: Report, source: Source, **options: Any) -> None:
    """Evaluate what was written against what it was made from, and add what came of it."""
    from peftc.steps.evaluate import evaluate

    quality = evaluate(replace(source, spec=str(report.artifact), allow_code=True), **options)
    report.data["quality"] = quality.data
    report.tables += quality.tables
    report.notes += quality.notes
    report.warnings += quality.warnings
    report.gates += quality.gates


def eligible(
    model: Model, *, conv_method: str, include: Sequence[str], skip: Sequence[str]
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the modules to factor and the reasons why others stay dense; refuse a model without any.

    Raises:
        PlanError: no module is eligible.
    """
    targets, reasons = find_targets(model, conv_method=conv_method, include=include, skip=skip)
    if not targets:
        groups = grouped(reasons)
        listed = ", ".join(f"`{kind}` ({reasons[names[0]]})" for kind, names in list(groups.items())[:4])
        raise PlanError(
            f"`{model.name}` has no eligible module",
            why=f"left dense: {listed}" if listed else "it has no Linear, Conv2d or Embedding module",
            hint="make some eligible: `--include PATTERN`"
            if model.manifest is None or not model.manifest.modules
            else "what could be factored is: decompose its base again, to another budget",
        )
    return targets, reasons
