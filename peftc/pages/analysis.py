"""What `peftc analyze --json` printed, read again: for `compare` and `report`, without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftc.errors import UsageError
from peftc.report import count
from peftc.store import documents
from peftc.store.source import read_json

ANALYSIS = {  # of what `analyze --json` prints, what is read again
    "modules": [
        {"name": str, "shape": [int], "spectrum": [[float]], "reason?": (str, None)}
        | dict.fromkeys(("max_rank", "break_even_rank", "rank_90", "rank_95", "rank_99"), int)
    ],
    "plan?": ({"budget": str, "allocation": str, "parameters": int, "predicted?": float}, None),
}


def read_analysis(file: Path) -> dict[str, Any]:
    """Return what `analyze` printed: ``modules`` with their spectra, under a budget a ``plan``, and the ``file``."""
    found = read_json(file)
    if found.get("command") != "analyze" or documents.misfit(found, ANALYSIS):
        hint = "`peftc analyze MODEL --json >analysis.json` writes one"
        raise UsageError(f"`{file}` holds no report of `peftc analyze`", hint=hint)
    return {**found, "file": str(file)}


def plan_text(analysis: Mapping[str, Any]) -> str:
    """Say what was planned, and what that was predicted to lose."""
    plan = analysis.get("plan")
    if not plan:
        return f"`{analysis['file']}` planned nothing: give `peftc analyze` a budget, as `--ratio 0.5`"
    lost = f"; predicted loss {plan['predicted']:g}" if "predicted" in plan else ""
    return (
        f"`{analysis['file']}` is a plan, no model: {plan['budget']}, {plan['allocation']}, to keep "
        f"{count(plan['parameters'])} parameters{lost}"
    )
