"""What a step that factors modules is asked, and what it says: shared by decompose and truncate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc import processes
from peftc.errors import ArtifactError, PlanError, UsageError
from peftc.factors import joint as joining
from peftc.factors.factoring import Factoring, Kept
from peftc.measure import costs
from peftc.models import write
from peftc.models.model import Model
from peftc.models.place import one_dtype
from peftc.nn.surgery import tensor_bytes
from peftc.plans import plan as plans
from peftc.plans.allocate import Rank
from peftc.plans.plan import Budget, Plan, Target
from peftc.report import Report, Table, grouped, percent, size_table, span
from peftc.store.manifest import Manifest


def asked_budget(plan: str | Path | Plan | None, *, keep_all_ranks: bool = False, **asked: Any) -> Budget | None:
    """Return the budget, or None where a plan says the ranks or all of them are kept; refuse two of these at once.

    Raises:
        UsageError: there is none, or more than one.
    """
    if plan is None and not keep_all_ranks:
        return plans.budget(**asked)
    given = [f"`--{name.replace('_', '-')}`" for name, value in asked.items() if value is not None]
    if keep_all_ranks and (given or plan is not None):
        other = given[0] if given else "`--plan`"
        raise UsageError(
            f"`--keep-all-ranks` takes no budget, but {other} is given",
            why="every rank is kept; the budget comes when they are cut",
            hint=f"leave {other} out here, and give it to `peftc truncate`",
        )
    if given:
        raise UsageError(
            f"`--plan` and {given[0]} contradict each other",
            why="a plan already says the ranks",
            hint="give one of them",
        )
    return None


def asked_plan(
    plan: str | Path | Plan | None, targets: dict[str, Target], model: Model | None = None, *, joint: bool = False
) -> Plan | None:
    """Return the plan that was asked for, checked against the eligible modules.

    Args:
        plan: as it was asked for.
        targets: those that share a down factor by the plan, or are ``joint``, become one.
        model: whose they are; None where factors cannot be shared.
        joint: whether modules that read one input are to share a down factor.
    """
    given = plans.read(Path(plan)) if isinstance(plan, str | Path) else plan
    if model is not None:
        joining.arrange(model, targets, given, joint)
    elif given is not None and given.joint:
        raise PlanError(
            "the plan lets modules share a down factor, and ordered factors are kept apart",
            hint="decompose the dense model by this plan: `peftc decompose MODEL --plan FILE`",
        )
    if given is not None:
        plans.check(joining.gathered(given), targets)
    return given


def words(budget: Budget | None, allocation: str, plan: object) -> tuple[str, str]:
    """Return what was asked, and why a module stays dense under it."""
    if budget is None:
        return f"--plan {plan}", "the plan keeps it"
    if budget.kind in ("rank", "energy"):  # these two leave nothing to allocate
        return str(budget), "its factors would not be smaller"
    greedy = "the budget keeps it, or its factors would not shrink"
    return f"{budget}, {allocation}", "its factors would not be smaller" if allocation == "uniform" else greedy


def report_on(
    command: str, work: Factoring, ranks: Mapping[str, Rank | None], cuts: Mapping[str, Mapping[str, Any]],
    reasons: Mapping[str, str], asked: str, why_dense: str,
) -> Report:  # fmt: skip
    """Say what is done with every module, and what becomes of the whole."""
    targets, whole = work.targets, work.whole
    ranks = {name: ranks.get(name) for name in work.targets}
    rows = [module(targets[name], rank, cuts.get(name, {}), why_dense) for name, rank in ranks.items()]
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
    before_bytes = sum(path.stat().st_size for path in work.model.files) or tensor_bytes(work.model.module)
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
    report = Report(command, {"size": size, "ratio": achieved, "modules": rows, "dense": others})
    report.tables += [_modules_table(rows), dense_table(rows, reasons), size_table(size)]
    report.notes += [
        f"{factored} of {len(targets)} eligible modules factored ({asked}); kept {percent(achieved['eligible'])} of "
        f"their weights, {percent(achieved['model'])} of the model's parameters",
        *work.model.notes,
        *(work.factorize.statistics.notes if work.factorize.statistics else []),
    ]
    tied = [
        f"`{name}` with {', '.join(f'`{a}`' for a in t.aliases)}"
        for name, t in targets.items()
        if t.aliases and ranks[name]
    ]
    if tied:
        report.notes.append(f"tied weights were factored once and stay tied: {'; '.join(tied)}")
    report.notes += joining.said(targets, ranks)
    if not factored:
        report.warnings.append("no module was factored: none would become smaller at this budget")
    report.warnings += climbs(rows)
    report.warnings += work.factorize.statistics.warnings if work.factorize.statistics else []
    return report


def climbs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a warning for each way of computing a module's factors that failed."""
    return [f"`{row['name']}`: {climb}; computed by {row['rung']} instead" for row in rows for climb in row["climbed"]]


def module(target: Target, rank: Rank | None, cut: Mapping[str, Any], why_dense: str) -> dict[str, Any]:
    """Return the figures of one module."""
    reason = None if rank is not None else why_dense
    return {
        "name": target.name, "form": target.form, "shape": list(target.shape), "aliases": list(target.aliases),
        **({"members": list(target.members)} if target.members else {}),
        "rank": list(rank) if isinstance(rank, tuple) else rank, "reason": reason,
        "parameters_before": target.entries, "parameters_after": target.cost(rank, "entries"),
        "error": cut.get("error", 0.0 if rank is None else None), "loss": cut.get("loss"), "excess": cut.get("excess"),
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


def dense_table(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> Table:
    """Group the modules that keep their weight, by kind and by reason."""
    dense = {row["name"]: row["reason"] for row in rows if row["rank"] is None} | dict(reasons)
    lines = []
    for kind, names in grouped(dense).items():
        for reason in dict.fromkeys(dense[name] for name in names):
            lines.append([kind, sum(dense[name] == reason for name in names), reason])
    return Table("modules left dense", ["module", "count", "why"], lines)


def carry_out(
    report: Report, work: Factoring, ranks: Mapping[str, Rank | None], base: dict[str, Any], request: dict[str, Any],
    budget: Budget | None, *, max_shard_bytes: int, kept: Callable[[str, Rank], Kept] | None = None,
) -> None:  # fmt: skip
    """Put factors into the network, write it, reload it, and complete the report: the first process does.

    Args:
        report: of the plan.
        work: with a job.
        ranks: of each module.
        base, request, budget: what the manifest records.
        max_shard_bytes: per weight file.
        kept: where the factors are; `Factoring.factor` made them when None.
    """
    if processes.rank():
        return
    assert work.job is not None
    pieces, modules = work.edit(ranks, kept)
    record = write.write_artifact(work.job, work.model, base, request, pieces, modules, max_shard_bytes=max_shard_bytes)
    report.warnings += write.verify(work.job.folder, work.model)
    _check_size(report, record, work.model, budget)
    write.finish(work.job, record, report, work.device)


def _check_size(report: Report, record: Manifest, model: Model, budget: Budget | None) -> None:
    """Complete the sizes with what was written and measured; refuse to report a count that the folder does not have."""
    after = report.data["size"]["after"]
    if record.parameters != after["parameters"]:
        raise ArtifactError(
            f"the artifact holds {record.parameters:,} parameters, the plan said {after['parameters']:,}",
            hint="this is a bug in peftc: please report it",
        )
    if after["macs"] is not None:
        after["macs"] = costs.work(one_dtype(model)).macs
        if budget is not None and budget.kind == "target-macs" and after["macs"] > budget.amount:
            report.warnings.append(f"the result takes {after['macs']:,} multiply-adds, not {budget.amount:,} as asked")
    after["bytes"] = record.weight_bytes
    report.tables[-1] = size_table(report.data["size"])
