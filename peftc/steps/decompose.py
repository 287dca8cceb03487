"""Source > Model > Plan > Method per module > surgery > Artifact > Report (PELA, step 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from peftc import allocate, measure
from peftc import plan as plans
from peftc.allocate import Rank
from peftc.errors import ArtifactError, PlanError, UsageError, one_of
from peftc.manifest import Manifest
from peftc.models.load import Model, detached, device_of, load, refuse_unbuildable, solver_device
from peftc.models.targets import targets as find_targets
from peftc.plan import Budget, Plan, Target
from peftc.report import SIZES, Report, Table, count, grouped, percent, scaled, short, span
from peftc.report import size as bytes_text
from peftc.source import Source
from peftc.steps import spectra, write
from peftc.steps.factoring import Factoring
from peftc.steps.speedup import Decision, Input, decide, unusual

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
    speedup: str | float | None = None,
    plan: str | Path | Plan | None = None,
    allocation: str = "energy",
    rank_multiple: int = 1,
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
        speedup: how many times faster the whole model is to be, > 1, as measured here on random batches of
            ``batch_size`` (16 when None) samples of ``image_size`` or ``max_length``.
        plan: ranks decided before, as `analyze` writes them.
        allocation: ``uniform`` (PELA's formula), or one greedy pass: ``global``, ``energy``, ``convex``.
        rank_multiple: every rank is a multiple of it, >= 1, for hardware that works in blocks.
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
    budget = _budget(
        plan, ratio=ratio, rank=rank, energy=energy, target_params=target_params, target_macs=target_macs,
        speedup=speedup,
    )  # fmt: skip
    multiple = plans.multiple_of(rank_multiple, planned=plan is not None)
    sample = Input(batch_size, image_size, max_length, device, seed)
    factorize = spectra.factorizer(method, conv_method, settings)
    shard_bytes = _shard_bytes(max_shard_size)
    place = solver_device(device_of(device))

    by_shape = budget is None or not spectra.needs_weights(budget, allocation)
    loaded = load(model, weights=not (dry_run and by_shape))
    if isinstance(model, Model):
        loaded = replace(loaded, module=detached(loaded.module))
    if isinstance(model, nn.Module) and not dry_run:
        refuse_unbuildable(loaded)
    targets, reasons = eligible(loaded, conv_method=conv_method, include=include, skip=skip)
    given = _given(plan, targets)
    if not next(loaded.module.parameters()).is_meta:
        spectra.refuse_non_finite(loaded)
    work = Factoring(loaded, targets, factorize, place)
    work.leave_uncalled(reasons, include)
    asked, why_dense = _words(budget, allocation, plan)

    def decided() -> Decision:
        return Decision(given.ranks) if given else decide(work, budget, allocation, multiple, sample)  # type: ignore[arg-type]

    if dry_run:
        found = decided()
        report = found.say(_report(work, found.ranks, {}, reasons | found.slow, asked, why_dense))
        report.notes.append("dry run: nothing was written")
        return report
    quality: dict[str, Any] = {"data": data, "task": task, **asdict(sample)}
    if data is not None:
        _refuse_unfit_data(loaded, **quality)
    request = {
        "command": "decompose", "budget": {budget.kind: str(budget.amount)} if budget else None,
        "allocation": allocation if budget else None, "plan": given.to_json() if given else None,
        "method": method, "conv_method": conv_method, "settings": dict(factorize.settings),
        "include": list(include), "skip": list(skip), "max_shard_bytes": shard_bytes,
        "device": place.type, "seed": seed, **unusual(budget, multiple, sample),
    }  # fmt: skip
    output = write.output_folder(output_dir, loaded, "decompose")
    with write.writing(loaded, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            report = write.already(job, "decompose")
        else:
            work.job = job
            job.require(2 * measure.tensor_bytes(loaded.module))
            found = decided()
            reasons |= found.slow
            request = found.settle(job, loaded, base, request, work.plan(found.ranks, reasons, method, str(budget)))
            report = found.say(_report(work, found.ranks, work.factor(found.ranks), reasons, asked, why_dense))
            pieces, modules = work.edit(found.ranks)
            record = write.write_artifact(job, loaded, base, request, pieces, modules, max_shard_bytes=shard_bytes)
            report.warnings += write.verify(job.folder, loaded)
            _check_size(report, record, loaded, budget)
            write.finish(job, record, report, place)
            report.artifact = output
    report.at_most("--max-params", max_params, report.data["size"]["after"]["parameters"])
    report.at_most("--max-bytes", max_bytes, report.data["size"]["after"]["bytes"])
    if data is not None:
        against = model if isinstance(model, nn.Module | Model) else loaded.source
        limits = {"num_samples": num_samples, "max_drop": max_drop, "min_quality": min_quality}
        _add_quality(report, loaded.source, against=against, **quality, **limits)
    return report


def _budget(plan: str | Path | Plan | None, **asked: Any) -> Budget | None:
    """Return the budget, or None where a plan says the ranks; refuse both at once."""
    if plan is None:
        return plans.budget(**asked)
    given = [f"`--{name.replace('_', '-')}`" for name, value in asked.items() if value is not None]
    if given:
        raise UsageError(
            f"`--plan` and {given[0]} contradict each other",
            why="a plan already says the ranks",
            hint="give one of them",
        )
    return None


def _given(plan: str | Path | Plan | None, targets: Mapping[str, Target]) -> Plan | None:
    """Return the plan that was given, if one was and it fits the eligible modules."""
    given = plans.read(Path(plan)) if isinstance(plan, str | Path) else plan
    if given is not None:
        plans.check(given, targets)
    return given


def _words(budget: Budget | None, allocation: str, plan: object) -> tuple[str, str]:
    """Return what was asked, and why a module stays dense under it."""
    if budget is None:
        return f"--plan {plan}", "the plan keeps it"
    if budget.kind in ("rank", "energy"):  # these two leave nothing to allocate
        return str(budget), "its factors would not be smaller"
    greedy = "the budget keeps it, or its factors would not shrink"
    return f"{budget}, {allocation}", "its factors would not be smaller" if allocation == "uniform" else greedy


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


def _shard_bytes(text: str | int) -> int:
    try:
        return scaled(str(text), SIZES)
    except ValueError as error:
        raise UsageError(f"`--max-shard-size {text}` {error}", hint="write it as `--max-shard-size 5GB`") from None


def _report(
    work: Factoring, ranks: Mapping[str, Rank | None], cuts: Mapping[str, Mapping[str, Any]],
    reasons: Mapping[str, str], asked: str, why_dense: str,
) -> Report:  # fmt: skip
    """Say what is done with every module, and what becomes of the whole."""
    targets, whole = work.targets, work.whole
    ranks = {name: ranks.get(name) for name in work.targets}
    rows = [_module(targets[name], rank, cuts.get(name, {}), why_dense) for name, rank in ranks.items()]
    kept = sum(row["parameters_after"] for row in rows)
    dense = sum(row["parameters_before"] for row in rows)
    saved_macs = sum(t.cost(None, "macs") - t.cost(ranks[name], "macs") for name, t in work.targets.items())
    saved_bytes = sum(
        (row["parameters_before"] - row["parameters_after"])
        * work.model.module.get_submodule(row["name"]).weight.element_size()  # type: ignore[union-attr, operator]
        for row in rows
    )
    after = whole.parameters - dense + kept
    factored = sum(rank is not None for rank in ranks.values())
    before_bytes = sum(path.stat().st_size for path in work.model.files) or measure.tensor_bytes(work.model.module)
    size = {
        "before": {"parameters": whole.parameters, "macs": whole.macs, "bytes": before_bytes},
        "after": {
            "parameters": after,
            "macs": None if whole.macs is None else whole.macs - saved_macs,
            "bytes": before_bytes - saved_bytes,
        },
    }
    achieved = {"asked": asked, "eligible": round(kept / dense, 6), "model": round(after / whole.parameters, 6)}
    others = [{"name": name, "reason": reason} for name, reason in reasons.items()]
    report = Report("decompose", {"size": size, "ratio": achieved, "modules": rows, "dense": others})
    report.tables += [_modules_table(rows), _dense_table(rows, reasons), _size_table(size)]
    report.notes += [
        f"{factored} of {len(targets)} eligible modules factored ({asked}); kept {percent(achieved['eligible'])} of "
        f"their weights, {percent(achieved['model'])} of the model's parameters",
        *work.model.notes,
    ]
    tied = [
        f"`{name}` with {', '.join(f'`{a}`' for a in t.aliases)}"
        for name, t in targets.items()
        if t.aliases and ranks[name]
    ]
    if tied:
        report.notes.append(f"tied weights were factored once and stay tied: {'; '.join(tied)}")
    if not factored:
        report.warnings.append("no module was factored: none would become smaller at this budget")
    for row in rows:
        for climb in row["climbed"]:
            report.warnings.append(f"`{row['name']}`: {climb}; computed by {row['rung']} instead")
    return report


def _module(target: Target, rank: Rank | None, cut: Mapping[str, Any], why_dense: str) -> dict[str, Any]:
    reason = None if rank is not None else why_dense
    return {
        "name": target.name, "form": target.form, "shape": list(target.shape), "aliases": list(target.aliases),
        "rank": list(rank) if isinstance(rank, tuple) else rank, "reason": reason,
        "parameters_before": target.entries, "parameters_after": target.cost(rank, "entries"),
        "error": cut.get("error", 0.0 if rank is None else None), "excess": cut.get("excess"),
        "rung": cut.get("rung"), "climbed": cut.get("climbed", []),
    }  # fmt: skip


def _modules_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Group modules of one kind: a line each, with the span of their ranks and of their relative errors."""
    lines = []
    by_name = {row["name"]: row for row in rows if row["rank"] is not None}
    for kind, names in grouped(by_name).items():
        some = [by_name[name] for name in names]
        kept = sum(row["parameters_after"] for row in some) / sum(row["parameters_before"] for row in some)
        shapes = {"x".join(map(str, row["shape"])) for row in some}
        errors = [row["error"] for row in some if row["error"] is not None]
        error = "" if not errors else span([f"{e:.3f}" for e in sorted(errors)])
        ranks = span([_rank_text(rank) for rank in sorted((row["rank"] for row in some), key=_rank_order)])
        lines.append(
            [
                kind,
                len(some),
                " ".join(sorted(shapes)) if len(shapes) < 3 else f"{len(shapes)} shapes",
                some[0]["form"],
                ranks,
                percent(kept),
                error,
            ]
        )
    return Table("factored modules", ["module", "count", "shape", "form", "rank", "kept", "relative error"], lines)


def _rank_order(rank: Any) -> list[int]:
    return rank if isinstance(rank, list) else [rank]


def _rank_text(rank: Any) -> str:
    return "x".join(map(str, rank)) if isinstance(rank, list) else str(rank)


def _dense_table(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> Table:
    dense = {row["name"]: row["reason"] for row in rows if row["rank"] is None} | dict(reasons)
    lines = []
    for kind, names in grouped(dense).items():
        for reason in dict.fromkeys(dense[name] for name in names):
            lines.append([kind, sum(dense[name] == reason for name in names), reason])
    return Table("modules left dense", ["module", "count", "why"], lines)


def _size_table(sizes: Mapping[str, Mapping[str, Any]]) -> Table:
    lines = []
    for name, write_number in (("parameters", count), ("macs", short), ("bytes", bytes_text)):
        before, after = sizes["before"][name], sizes["after"][name]
        share = percent(after / before) if before and after is not None else ""
        texts = ["" if value is None else write_number(value) for value in (before, after)]
        lines.append(["multiply-adds" if name == "macs" else name, *texts, share])
    return Table("size", ["", "before", "after", "kept"], lines)


def _check_size(report: Report, record: Manifest, model: Model, budget: Budget | None) -> None:
    """Complete the sizes with what was written and measured; refuse to report a count that the folder does not have."""
    after = report.data["size"]["after"]
    if record.parameters != after["parameters"]:
        raise ArtifactError(
            f"the artifact holds {record.parameters:,} parameters, the plan said {after['parameters']:,}",
            hint="this is a bug in peftc: please report it",
        )
    if after["macs"] is not None:
        after["macs"] = measure.work(write.one_dtype(model)).macs
        if budget is not None and budget.kind == "target-macs" and after["macs"] > budget.amount:
            report.warnings.append(f"the result takes {after['macs']:,} multiply-adds, not {budget.amount:,} as asked")
    after["bytes"] = record.weight_bytes
    report.tables[-1] = _size_table(report.data["size"])
