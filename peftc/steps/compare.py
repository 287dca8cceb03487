"""Artifacts and exports > one table of what they are, what they cost, and what was measured of them: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.pages import records
from peftc.pages.analysis import plan_text, read_analysis
from peftc.pages.records import Record, Row, cut_text
from peftc.pages.tables import MISSING, details_of, measured_by, table_of
from peftc.pages.verdict import verdict_of
from peftc.report import Report, Table, speedup_text
from peftc.store import artifact
from peftc.store.commands import command_lines
from peftc.store.source import Source

FORMED = (
    "both take turns, and it is the median of the ratios of their rounds, in brackets its range; "
    "it need not be the ratio of their median times"
)


def compare(
    models: Sequence[str | Path | Source], *, analysis: str | Path | None = None, commands: bool = False
) -> Report:
    """Return what artifacts are made of and what `evaluate` and `bench` measured of them, side by side.

    Of an export stand its stages and its size, its quality where `export` had labelled data, and in a note how it ran
    beside the model that it was made from.

    Args:
        models: folders of artifacts and exports.
        analysis: what `peftc analyze --json` printed of a plan; adds what was planned and predicted.
        commands: also the command lines that rebuild each.

    Raises:
        ArtifactError: one of them is no artifact.
        UsageError: none is named, or one of them twice, or ``analysis`` is no report of `analyze`.
    """
    found = records.read(models)  # type: ignore[arg-type]
    analyzed = None if analysis is None else read_analysis(Path(analysis))
    return compared(found, records.rows(found), analyzed, commands=commands)


def compared(
    found: Sequence[Record], rows: Sequence[Row], analyzed: Mapping[str, Any] | None, *, commands: bool = False
) -> Report:
    """Return the comparison of records whose rows are known."""
    report = Report("compare", {"models": [{"artifact": None, **vars(row)} for row in rows]})
    for figures, record in zip(report.data["models"][-len(found) :], found, strict=True):
        figures |= {
            "artifact": figures["name"],
            "id": record.manifest.id,
            "commands": command_lines(record.manifest),
        }
    report.data["plan"] = (analyzed or {}).get("plan")
    report.warnings += [warning for each in found if (warning := artifact.damaged_result(each.folder))]
    report.tables.append(table_of(rows))
    report.details.append(details_of(rows))
    report.notes.append(verdict_of(rows).sentence)
    _say_what_was_measured(report, rows, found)
    if analyzed:
        report.notes.append(plan_text(analyzed))
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
            f"speed: {where['device_name']}, threads: {where['threads']}, {speed['model']['dtype']}, batch "
            f"{speed['model']['saturating']['batch']}; each speed-up is against the dense model in the same run of "
            f"`peftc bench`: {FORMED}"
        )
    batch = f"--batch-size {speed['model']['saturating']['batch']} " if speed else ""
    for kind, known, word, line in (
        ("quality", "change", "evaluate", "evaluate --data DATA"),
        ("speed", "speedup", "bench", f"bench {batch}"),
    ):
        made = zip(rows[-len(found) :], found, strict=True)
        own = [(row, record) for row, record in made if row.base is not None and not record.about]
        asked = [(row, record) for row, record in own if kind == "speed" or not record.manifest.begins]
        lacks = [(row, record) for row, record in asked if getattr(row, known) is None]
        if lacks:
            row, more = lacks[0][0], f" and {len(lacks) - 1} more" if lacks[1:] else ""
            otherwise = " as the others were" if any(record.measured(word) for _, record in lacks) else ""
            missing = f"{MISSING} against the dense model{otherwise}: {kind} of `{row.name}`{more}"
            report.notes.append(f"{missing}; {measured_by(row, line)}")


def _of_export(record: Record) -> str:
    """Say how an export ran beside the model that it was made from, when it was written."""
    data = record.data
    if "runtime" not in data:
        return f"`{record.called}`: its `{artifact.RESULT}` is gone, which says how it ran"
    batch, timed = max(data["times"].items(), key=lambda each: int(each[0]))
    beside = f"{speedup_text(timed['speedup'])} beside the same model in PyTorch at batch {batch}"
    return f"`{record.called}` in {data['runtime']}: {beside}, and within {data['deviation']:.1e} of the largest output"
