"""What a step that factors modules is asked, and what it says: shared by decompose and truncate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftc.factors import joint as joining
from peftc.factors.factoring import Factoring
from peftc.nn.surgery import tensor_bytes
from peftc.plans.plan import Target
from peftc.report import Report, Table, grouped, percent, rank_span, size_table, span


def report_on(
    command: str,
    work: Factoring,
    ranks: Mapping[str, int | None],
    cuts: Mapping[str, Mapping[str, Any]],
    reasons: Mapping[str, str],
    asked: str,
    why_dense: str,
) -> Report:
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


def module(target: Target, rank: int | None, cut: Mapping[str, Any], why_dense: str) -> dict[str, Any]:
    """Return the figures of one module."""
    reason = None if rank is not None else why_dense
    return {
        "name": target.name,
        "form": target.form,
        "shape": list(target.shape),
        "aliases": list(target.aliases),
        **({"members": list(target.members)} if target.members else {}),
        "rank": rank,
        "reason": reason,
        "parameters_before": target.entries,
        "parameters_after": target.cost(rank, "entries"),
        "error": cut.get("error", 0.0 if rank is None else None),
        "loss": cut.get("loss"),
        "excess": cut.get("excess"),
        "rung": cut.get("rung"),
        "climbed": cut.get("climbed", []),
    }


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
        ranks = rank_span(row["rank"] for row in some)
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


def dense_table(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> Table:
    """Group the modules that keep their weight, by kind and by reason."""
    dense = {row["name"]: row["reason"] for row in rows if row["rank"] is None} | dict(reasons)
    lines = []
    for kind, names in grouped(dense).items():
        for reason in dict.fromkeys(dense[name] for name in names):
            lines.append([kind, sum(dense[name] == reason for name in names), reason])
    return Table("modules left dense", ["module", "count", "why"], lines)
