"""What a step that factors modules says: shared by decompose and truncate."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftc.factors import joint
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import Ranks
from peftc.nn.surgery import tensor_bytes
from peftc.pages import brief
from peftc.plans.plan import Target
from peftc.report import Report, Table, grouped, percent, rank_text, size_table, span

Row = Mapping[str, Any]
DEEP = 0.1  # of the weights of an embedding: a plan that keeps less of it is worth a look


def report_on(
    command: str, work: Factoring, ranks: Ranks, cuts: Mapping[str, Mapping[str, Any]], words: tuple[str, str]
) -> Report:
    """Say what is done with every module, and what becomes of the whole.

    Args:
        command: the step.
        work, ranks, cuts: the eligible modules, their ranks, and figures of their factors.
        words: what was asked, and why a module stays dense under it.
    """
    targets, (asked, why_dense) = work.targets, words
    ranks = {name: ranks.get(name) for name in targets}
    rows = [module(targets[name], rank, cuts.get(name, {}), why_dense) for name, rank in ranks.items()]
    kept, dense = (sum(row[f"parameters_{when}"] for row in rows) for when in ("after", "before"))
    factored = sum(rank is not None for rank in ranks.values())
    change = {
        "parameters": kept - dense,
        "macs": sum(t.cost(ranks[name], "macs") - t.cost(None, "macs") for name, t in targets.items()),
        "bytes": sum(
            (t.cost(ranks[name], "entries") - t.entries) * entry_bytes(work, name) for name, t in targets.items()
        ),
    }
    achieved = {"asked": asked, "eligible": round(kept / dense, 6)}
    shown = [_modules_table(rows), dense_table(rows, work.reasons)]
    report = base_report(command, work, rows, shown, change, achieved)
    report.notes.insert(
        0,
        f"{factored} of {len(targets)} eligible modules factored ({asked}); kept {percent(achieved['eligible'])} of "
        f"their weights, {percent(achieved['model'])} of the model's parameters",
    )
    tied = [
        f"`{name}` with {', '.join(f'`{a}`' for a in t.aliases)}"
        for name, t in targets.items()
        if t.aliases and ranks[name]
    ]
    if tied:
        report.notes.append(f"tied weights were factored once and stay tied: {'; '.join(tied)}")
    report.notes += joint.said(targets, ranks)
    if not work.factorize.needs:
        report.warnings += _cut_deep(rows)
    if not factored:
        report.warnings.insert(0, "no module was factored: none would become smaller at this budget")
    return report


def _cut_deep(rows: Sequence[Row]) -> list[str]:
    """Say which embeddings keep so little, by a plan made without data, that tokens may look alike."""
    found = []
    for row in rows:
        kept = row["parameters_after"] / row["parameters_before"]
        if row["form"] == "embedding" and kept < DEEP:
            what = f"`{row['name']}` keeps {percent(kept)} of its weights, at rank {rank_text(row['rank'])}"
            how = "calibrate with `--data DATA`, or cut modules alike with `--allocation uniform`"
            found.append(f"{what}: without data nothing says what that costs; {how}")
    return found


def base_report(
    command: str, work: Factoring, rows: list[dict[str, Any]], shown: list[Table], change: Row, ratio: dict[str, Any]
) -> Report:
    """Return a report with sizes, modules, and what models and statistics had to say.

    Args:
        command: the step.
        work, rows, shown: the eligible modules, their figures, and tables of them.
        change: of parameters, multiply-adds and bytes.
        ratio: what was asked, and the share of the eligible weights that is kept.
    """
    stored = sum(path.stat().st_size for path in work.model.files) or tensor_bytes(work.model.module)
    before = {"parameters": work.whole.parameters, "macs": work.whole.macs, "bytes": stored}
    size = {
        "before": before,
        "after": {name: None if value is None else value + change[name] for name, value in before.items()},
    }
    ratio["model"] = round(size["after"]["parameters"] / work.whole.parameters, 6)  # type: ignore[operator]
    others = [{"name": name, "reason": reason} for name, reason in work.reasons.items()]
    report = Report(command, {"size": size, "ratio": ratio, "modules": rows, "dense": others})
    report.tables += [*shown, size_table(size)]
    report.notes += work.model.notes
    report.warnings += [
        f"`{row['name']}`: {climb}; computed by {row['rung']} instead" for row in rows for climb in row["climbed"]
    ]
    if work.factorize.statistics:
        report.notes += work.factorize.statistics.notes
        report.warnings += work.factorize.statistics.warnings
    return report


def entry_bytes(work: Factoring, name: str) -> int:
    """Return the bytes of an entry of a module's weight as stored."""
    weight: Any = work.model.module.get_submodule(name).weight
    return int(weight.element_size())


def module(target: Target, rank: int | None, cut: Row, why_dense: str) -> dict[str, Any]:
    """Return the figures of one module."""
    return {
        "name": target.name,
        "form": target.form,
        "shape": list(target.shape),
        "aliases": list(target.aliases),
        **({"members": list(target.members)} if target.members else {}),
        "rank": rank,
        "reason": None if rank is not None else why_dense,
        "parameters_before": target.entries,
        "parameters_after": target.cost(rank, "entries"),
        "error": cut.get("error", 0.0 if rank is None else None),
        "loss": cut.get("loss"),
        "excess": cut.get("excess"),
        "rung": cut.get("rung"),
        "climbed": cut.get("climbed", []),
    }


def by_kind(rows: Sequence[Row], rank: str) -> Iterator[tuple[list[Any], list[Row]]]:
    """Yield a kind of modules at a time: cells (kind, number, shapes, form, span of ranks), and their rows."""
    by_name = {row["name"]: row for row in rows}
    for kind, names in grouped(by_name).items():
        some = [by_name[name] for name in names]
        shapes = {"x".join(map(str, row["shape"])) for row in some}
        shape = " ".join(sorted(shapes)) if len(shapes) < 3 else f"{len(shapes)} shapes"
        ranks = span([str(each) for each in sorted(row[rank] for row in some)])
        yield [kind, len(some), shape, some[0]["form"], ranks], some


def _modules_table(rows: Sequence[Row]) -> Table:
    """Group modules of one kind: a line each, with the span of their ranks and of their relative errors."""
    lines = []
    for cells, some in by_kind([row for row in rows if row["rank"] is not None], "rank"):
        kept = sum(row["parameters_after"] for row in some) / sum(row["parameters_before"] for row in some)
        errors = sorted(row["error"] for row in some if row["error"] is not None)
        lines.append([*cells, percent(kept), span([f"{error:.3f}" for error in errors]) if errors else ""])
    return Table("factored modules", ["module", "count", "shape", "form", "rank", "kept", "relative error"], lines)


def dense_table(rows: Sequence[Row], reasons: Mapping[str, str]) -> Table:
    """Group the modules that keep their weight, by kind and by reason."""
    dense = {row["name"]: row["reason"] for row in rows if row["rank"] is None} | dict(reasons)
    lines = []
    for kind, names in grouped(dense).items():
        for reason in dict.fromkeys(dense[name] for name in names):
            lines.append([kind, sum(dense[name] == reason for name in names), reason])
    return Table("modules left dense", ["module", "count", "why"], lines)


def summarise(report: Report, asked: str, *, data: str | None) -> None:
    """Say in a few lines what was factored, and that what is left wants training."""
    came = {}
    if rows := report.data.get("modules"):  # not of a finished folder whose `result.json` is gone
        factored = sum(row["rank"] is not None for row in rows)
        kept = percent(report.data["ratio"]["eligible"])
        came["factored"] = f"{factored} of {len(rows)} modules, {kept} of their weights kept"
    brief.tell(report, brief.decimal(asked), came, then=brief.heal(report.artifact, data))
