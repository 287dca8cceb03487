"""Rows of a comparison > the table that `compare`, `demo`, `report` and cards show, and what stands behind `-v`."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.pages.records import DENSE, Row
from peftc.report import Table, count, duration, percent, ranged, short, size, speedup_text

MISSING = "not measured"
NOISE = "within noise"
SAME_BYTES = 1.1  # bytes of a parameter in one model's files, of those in another's: what is nearer says nothing new


def table_of(rows: Sequence[Row], title: str = "models") -> Table:
    """Set models side by side: what made each last, its size, and what became of quality and speed."""
    metric = metric_of(rows)
    timed = any(row.speed for row in rows)
    columns = ["name", "last stage", "parameters", "share"]
    columns += [metric, "change against dense"] if metric else []
    columns += ["speed-up"] if timed else []
    names, parent = labels_of(rows)
    tells_bytes = bytes_differ(rows)
    lines = []
    for row in rows:
        stage = row.stages[-1] if row.stages else "dense"
        line = [names[row.name], stage, "-" if row.parameters is None else count(row.parameters)]
        stored = size(row.bytes) if tells_bytes and row.bytes is not None else ""
        line.append(", ".join(filter(None, [share_text(row), stored])))
        line += [quality_text(row), change_text(row)] if metric else []
        lines.append([*line, *([faster_text(row)] if timed else [])])
    return Table(f"{title} in {parent}" if parent else title, columns, lines)


def metric_of(rows: Sequence[Row]) -> str | None:
    """Return the name of the metric that models were measured by; None where none was."""
    return next((str(row.quality["metric"]) for row in rows if row.quality), None)


def labels_of(rows: Sequence[Row]) -> tuple[dict[str, str], str | None]:
    """Return what each model is called in a table, and the folder that all artifacts lie in, which is left out."""
    whole = {row.name: row.name for row in rows}
    made = [Path(row.name) for row in rows if row.stages]
    parents, short_names = {path.parent for path in made}, {path.name for path in made}
    taken = {row.name for row in rows if not row.stages} | {""}
    if len(parents) != 1 or Path() in parents or len(short_names) < len(made) or short_names & taken:
        return whole, None
    return whole | {str(path): path.name for path in made}, str(parents.pop())


def quoted(name: str) -> str:
    """Return a name between backticks, of which it has none of its own."""
    return "`{}`".format(name.replace("`", "'"))


def measured_by(row: Row, command: str) -> str:
    """Say which command measures a model beside its dense one: ``evaluate --data DATA``, for one."""
    word, *options = command.split()
    line = f"`{' '.join(['peftc', word, shlex.quote(row.name), *options, '--against', shlex.quote(row.against)])}`"
    where = ", where DENSE is the dense model, of which its chain does not say where it lies now"
    return f"{line} measures it{where if row.against == DENSE else ''}"


def share_text(row: Row) -> str:
    """Write what share of its base's parameters a model has."""
    return "" if row.base is None else "-" if row.share is None else percent(row.share)


def bytes_differ(rows: Sequence[Row]) -> bool:
    """Return whether files say something else than parameters do, as of 8 bits, half precision, or a delta."""
    each = [row.bytes / row.parameters for row in rows if row.bytes and row.parameters]
    return bool(each) and max(each) > SAME_BYTES * min(each)


def quality_text(row: Row) -> str:
    """Write the first metric with its interval: ``0.978 [0.957, 0.989]``."""
    if row.quality is None:
        return MISSING
    value = row.quality["metrics"][row.quality["metric"]]
    known = " on samples it knows" if row.quality.get("seen") else ""
    return f"{ranged(value['value'], value['low'], value['high'])}{known}"


def change_text(row: Row) -> str:
    """Write how much more of the first metric a model has than its base, with the interval of the paired difference."""
    if row.change is None:
        return MISSING if row.base else ""
    return ranged(row.change["value"], row.change["low"], row.change["high"], sign=True)


def faster_text(row: Row) -> str:
    """Write how much faster a model is than its base, with the range, where both were timed in one run."""
    if row.speedup is None:
        return MISSING if row.base else ""
    return speedup_text(row.speedup, NOISE)


def speeds_of(rows: Sequence[Row]) -> Table | None:
    """List each speed-up with the noise of its run, of single samples and of batches; None where there is none."""
    names, lines = labels_of(rows)[0], []
    for row in rows:
        lines += [
            [names[row.name], str(batch), speedup_text(change, NOISE), noise_text(change) or MISSING]
            for batch, change in speedups(row).items()
        ]
    return Table("speed", ["name", "batch", "speed-up", "noise"], lines) if lines else None


def speedups(row: Row) -> dict[int, Mapping[str, Any]]:
    """Return batch -> speed-up of a model beside its base: of single samples first, where that was timed."""
    if row.speed is None or row.speedup is None:
        return {}
    single, batch = row.speed["speedup"].get("batch_1"), int(row.speed["model"]["saturating"]["batch"])
    return ({1: single} if single else {}) | {batch: row.speedup}


def noise_text(change: Mapping[str, Any]) -> str:
    """Write how much the dense model differs from itself in the run of a speed-up; nothing where nobody kept that."""
    if "noise_low" not in change or "noise_high" not in change:
        return ""
    return f"{change['noise_low']:.2f}x to {change['noise_high']:.2f}x"


def details_of(rows: Sequence[Row]) -> Table:
    """Set raw sizes and times side by side, each time beside that of the baseline in the same run."""
    batch = next((row.speed["model"]["saturating"]["batch"] for row in rows if row.speed), None)
    columns = ["name", "bytes", "MACs"]
    columns += ["latency", "baseline's", f"per second, batch {batch}", "baseline's"] if batch else []
    names, _ = labels_of(rows)
    lines = []
    for row in rows:
        stored, macs = "-" if row.bytes is None else size(row.bytes), "-" if row.macs is None else short(row.macs)
        lines.append([names[row.name], stored, macs, *(_times(row) if batch else [])])
    return Table("sizes and raw times: those of two rows are of two runs, and no measure of each other", columns, lines)


def _times(row: Row) -> list[str]:
    """Write latency and throughput of a model and of what it was timed beside; of a base alone there is no run."""
    if row.speed is None or row.base is None:
        return [""] * 4
    sides = [row.speed["model"], row.speed.get("against")]
    latencies = ["" if side is None else duration(side["batch_1"]["median_seconds"]) for side in sides]
    return latencies + ["" if side is None else f"{side['saturating']['samples_per_second']:,.0f}/s" for side in sides]
