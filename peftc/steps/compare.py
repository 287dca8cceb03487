"""Artifacts and exports > one table of what they are, what they cost, and what was measured of them: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.pages import records
from peftc.pages.records import Record, Row, cut_text
from peftc.report import Report, Table, count
from peftc.store import artifact
from peftc.store.commands import command_lines
from peftc.store.source import Source


def compare(
    models: Sequence[str | Path | Source], *, analysis: str | Path | None = None, commands: bool = False
) -> Report:
    """Return what artifacts are made of and what `evaluate` and `bench` measured of them, side by side.

    Of an export stand its stages and its size, its quality where `export` had gates on it, and in a note how it ran
    beside the model that it was made from.

    Args:
        models: folders of artifacts and exports.
        analysis: what `peftc analyze --json` printed of a plan; adds what was planned and predicted.
        commands: also the command lines that rebuild each.

    Raises:
        ArtifactError: one of them is no artifact.
        UsageError: none is named, or one of them twice, or ``analysis`` is no report of `analyze`.
    """
    found = records.read(models, exports=True)  # type: ignore[arg-type]
    analyzed = None if analysis is None else records.read_analysis(Path(analysis))
    rows = records.rows(found, analyzed)
    report = Report("compare", {"models": [{"artifact": None, **vars(row)} for row in rows]})
    for figures, record in zip(report.data["models"][-len(found) :], found, strict=True):
        figures |= {
            "artifact": figures["name"],
            "id": record.manifest.id,
            "base": record.base,
            "commands": command_lines(record.manifest),
        }
    report.warnings += [warning for each in found if (warning := artifact.damaged_result(each.folder))]
    report.tables.append(records.table_of(rows))
    _say_what_was_measured(report, rows, found)
    if analyzed:
        report.notes.append(_of_analysis(analyzed))
    report.notes += [_of_export(record) for record in found if record.about]
    if commands:
        for record in found:
            report.tables.append(
                Table(f"rebuilds {record.folder}", [""], [[line] for line in command_lines(record.manifest)])
            )
    return report


def _say_what_was_measured(report: Report, rows: Sequence[Row], found: Sequence[Record]) -> None:
    """Say on what quality and speed were measured, and how to measure what was not."""
    quality, speed = (
        next((getattr(row, kind) for row in rows if getattr(row, kind)), None) for kind in ("quality", "speed")
    )
    if quality:
        data = quality["data"]
        report.notes.append(
            f"quality: {quality['task']}, {data['samples']:,} samples of split `{data['split']}` of "
            f"`{data['spec']}`{cut_text(data)}, 95 % intervals"
        )
    if speed:
        where = speed["environment"]
        report.notes.append(
            f"speed: {where['device_name']}, {where['threads']} threads, {speed['model']['dtype']}; each speed-up is "
            "against the baseline in the same run of `peftc bench`"
        )
    batch = f"--batch-size {speed['model']['saturating']['batch']} " if speed else ""
    options = {"evaluate": "--data DATA ", "bench": batch}
    for word, kind in (("evaluate", "quality"), ("bench", "speed")):
        own = [row for row, record in zip(rows[-len(found) :], found, strict=True) if not record.about]
        names = [row.name for row in own if getattr(row, kind) is None]
        if names:
            same = " as the others" if len(names) < len(own) else ""
            report.notes.append(f"no {kind}{same}: `peftc {word} {names[0]} {options[word]}--against base` measures it")


def _of_analysis(analysis: Mapping[str, Any]) -> str:
    """Say what was planned, and what that was predicted to lose."""
    plan = analysis.get("plan")
    if not plan:
        return f"`{analysis['file']}` planned nothing: give `peftc analyze` a budget, as `--ratio 0.5`"
    return (
        f"`{analysis['file']}` planned {plan['budget']}, {plan['allocation']}, to keep {count(plan['parameters'])} "
        f"parameters; predicted loss {plan['predicted']:g}"
    )


def _of_export(record: Record) -> str:
    """Say how an export ran beside the model that it was made from, when it was written."""
    data = record.data
    if "runtime" not in data:
        return f"`{record.folder}`: its `{artifact.RESULT}` is gone, which says how it ran"
    batch, timed = max(data["times"].items(), key=lambda each: int(each[0]))
    return (
        f"`{record.folder}` in {data['runtime']}: {timed['speedup']['verdict']} beside PyTorch at batch {batch}, and "
        f"within {data['deviation']:.1e} of the largest output"
    )
