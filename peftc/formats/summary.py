"""What is said of an export: how near it is to the model, how quick beside it, and how large."""

from collections.abc import Mapping
from typing import Any

from peftc.formats.exported import Exported
from peftc.measure.costs import Speedup
from peftc.pages import brief
from peftc.report import UNCHANGED, Report, Table, duration, percent, size

BESIDE = "the same model in PyTorch"


def tell(report: Report, name: str) -> None:
    """Say what was written, how far it agrees with the model, and how much faster it runs."""
    data = report.data
    came = {"written": f"{size(data['bytes'])} in {len(data['files'])} files"}
    what = "the same prediction for" if data["is_share"] else "a cosine of"
    same = f"{_agreement(data)} ({_inputs(data)})"
    came["checked"] = f"in {data['runtime']}: outputs differ by {data['deviation']:.2g} of the largest, {what} {same}"
    batch, timed = list(data["times"].items())[-1]
    both = f"{duration(timed['export_seconds'])} for a batch of {batch}, against {duration(timed['torch_seconds'])}"
    came["speed"] = f"{_faster(timed)}: {both}"
    brief.tell(report, f"`{name}` as {data['format']}", came)


def of_rounding(written: Exported, *, is_gated: bool) -> list[str]:
    """Return a warning on an export that computes something else by design, and what to do where nothing judges it."""
    if written.tolerance is not None:
        return []
    told = "what is rounded to 8 bits computes something else by design"
    told += ", and its answer for a sample depends on what else is in the batch" if written.mixes else ""
    return [told if is_gated else f"{told}: gate it with `--data` and `--max-drop`"]


def table_of(data: Mapping[str, Any]) -> Table:
    """Return the figures of an export as a table for people."""
    kept = f"{data['factors']} factors in {data['products']} products" if data["products"] is not None else "-"
    limit = f", at most {data['tolerance']:g}" if data["tolerance"] is not None else ""
    rows = [
        ("files", f"{size(data['bytes'])} in {len(data['files'])}"),
        ("largest deviation", f"{data['deviation']:.2g} of the largest output{limit}"),
        ("same prediction" if data["is_share"] else "cosine", f"{_agreement(data)}, {_inputs(data)}"),
        ("products with weights", kept),
    ]
    for batch, run in data["times"].items():
        both = f"{duration(run['export_seconds'])} against {duration(run['torch_seconds'])}"
        rows.append((f"latency, batch {batch}", f"{both}: {_faster(run)}"))
    return Table(f"{data['format']}, run by {data['runtime']}", ("figure", "value"), rows)


def _agreement(data: Mapping[str, Any]) -> str:
    return percent(data["agreement"]) if data["is_share"] else f"{data['agreement']:.6f}"


def _inputs(data: Mapping[str, Any]) -> str:
    """Say on what outputs were compared; exports of before count random inputs among the samples."""
    drawn = data.get("random_inputs", 0)
    own = data["samples"] - drawn
    parts = [f"{own} samples" if own else "", f"{drawn} random inputs" if drawn else ""]
    return " and ".join(filter(None, parts))


def _faster(timed: Mapping[str, Any]) -> str:
    """Say how much faster an export is, and than what."""
    verdict = Speedup(**timed["speedup"]).verdict
    return f"{verdict} {'beside' if verdict == UNCHANGED else 'than'} {BESIDE}"
