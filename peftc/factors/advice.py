"""What to make of a report of `analyze`: what its ranks mean, which ratio is safe to try, and what to type."""

from collections.abc import Mapping
from typing import Any

from peftc.factors.prediction import PER_SAMPLE, PER_TOKEN
from peftc.pages import brief
from peftc.report import Report, figure

SAFE = {PER_SAMPLE: 0.05, PER_TOKEN: 0.05}  # of divergence: few answers change, or a perplexity grows by 5 %
SHOWN = (0.3, 0.5, 0.75, 0.9)  # ratios whose loss is said in a line
CAREFUL = 0.9  # the ratio to begin with where nothing measured a loss
RANKS = {
    "full": "the largest rank that a weight can have, its smaller side",
    "break-even": "the rank up to which two factors are smaller than the weight",
    "effective": "how many ranks the weight makes use of; far below full means slack",
    "stable": "the same by energy (squared singular values); near 1 means that one direction is most of it",
}


def add(report: Report, model: str, data: str | None, plan: str | None) -> None:
    """Add the advice to a report of `analyze`.

    Args:
        report: with the curve of predicted losses, where there is one.
        model, data, plan: as they were typed.
    """
    curve: Mapping[str, Any] = report.data.get("curve") or {"points": [], "unit": ""}
    limit = SAFE.get(curve["unit"])
    measured = [point["ratio"] for point in curve["points"] if "measured" in point]
    known = [point for point in curve["points"] if point["ratio"] >= min(measured, default=CAREFUL)]
    fits = [point for point in known if limit is not None and point["predicted"] <= limit]
    best = min(fits, key=lambda point: point["ratio"], default=None)
    report.summary = dict(RANKS) | _losses(curve)
    if data is None or limit is None:
        report.summary["safe"] = "not known from the weights alone: add `--data DATA`, and losses are measured"
    elif best is not None:
        lost = f"predicted to lose {best['predicted']:.2g} before any training"
        report.summary["safe"] = f"ratio {best['ratio']:g}: {lost}, and below {limit:g} few answers change"
    else:
        report.summary["safe"] = f"no ratio: all lose more than {limit:g} {curve['unit']} before any training"
    if plan is not None:
        how: list[str] = ["--plan", plan]
    else:
        how = ["--ratio", f"{best['ratio']:g}" if data is not None and best is not None else figure(CAREFUL)]
    words = [model, *how, *(["--data", data] if data is not None else []), "-o", "small"]
    report.summary["try"] = brief.command("decompose", *words)


def _losses(curve: Mapping[str, Any]) -> dict[str, str]:
    """Return the predicted losses at the ratios that tell most of the curve."""
    told = [f"{point['predicted']:.2g} at {point['ratio']:g}" for point in curve["points"] if point["ratio"] in SHOWN]
    return {"loss": f"{', '.join(told)} ({curve['unit']})"} if told else {}
