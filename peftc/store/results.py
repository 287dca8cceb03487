"""What ``result.json`` says, in shape: what a step found, and what was measured of its artifact since.

`show`, `compare`, `report` and cards read it again. A file that says it otherwise is damaged: nothing of it is used.
"""

from typing import Any

from peftc.store import documents

LARGEST = 1e300  # of a figure
NUMBER, TEXT, COUNT = (float, None), (str, None), (int, None)
CELL = (str, float, bool, None)
INTERVAL = {"value": float, "low": float, "high": float}
DIFFERENCE = dict.fromkeys(INTERVAL, NUMBER)
SIZE = {"parameters?": COUNT, "bytes?": COUNT, "macs?": COUNT}
CUT = {"protocol": TEXT, "length": int, "stride": int, "first_token": str}
DATA = {"spec": str, "split": str, "samples": int, "digest": str, "windows?": CUT}
EVALUATED = {
    "at?": int,
    "task": str,
    "metric": str,
    "metrics": {str: INTERVAL},
    "data": DATA,
    "higher_is_better?": bool,
    "seen?": bool,
    "against?": ({"name": str, "metrics": {str: INTERVAL}, "difference?": {str: DIFFERENCE}}, None),
}
TIMED = {
    "dtype": str,
    "parameters": int,
    "macs": COUNT,
    "bytes_on_disk": COUNT,
    "batch_1": {"median_seconds": float},
    "saturating": {"batch": int, "samples_per_second": float},
}
SPEEDUP = {"value": float, "low": float, "high": float, "verdict": str, "noise_low?": float, "noise_high?": float}
BENCHED = {
    "at": int,
    "model": TIMED,
    "against?": (TIMED | {"name": str}, None),
    "input": Any,
    "speedup?": ({"saturating": (SPEEDUP, None), "batch_1?": (SPEEDUP, None)}, None),
    "environment": {"device_name": str, "threads": int},
}
MODULE = {
    "name": str,
    "shape?": [int],
    "rank?": (int, [int], None),
    "reason?": TEXT,
    "error?": NUMBER,
    "parameters_before?": COUNT,
    "parameters_after?": COUNT,
}
LAYER = {"name": str, "score": NUMBER, "kept": bool}
REPORT = {
    "data?": {
        "size?": ({"before?": (SIZE, None), "after?": (SIZE, None)}, None),
        "modules?": ([MODULE], dict, None),
        "layers?": ([LAYER], None),
        "score?": TEXT,
        "threshold?": NUMBER,
        "alpha?": NUMBER,
        "quality?": (EVALUATED, None),
        "runtime?": str,
        "deviation?": float,
        "times?": {str: {"speedup": SPEEDUP}},
    },
    "tables?": [{"title": str, "columns": [str], "rows": [[CELL]]}],
    "notes?": [str],
    "warnings?": [str],
}
RESULT = {
    "id?": str,
    "report?": REPORT,
    "seconds?": NUMBER,
    "device?": TEXT,
    "platform?": TEXT,
    "threads?": COUNT,
    "versions?": {str: str},
    "measured?": {"evaluate?": [EVALUATED | {"at": int}], "bench?": [BENCHED]},
    "asked?": ({"id?": str, "request?": dict}, None),
    "places?": {str: {"spec": str, "revision?": str}},
}


def misfit(value: Any) -> str | None:
    """Return what in a result is not as it has to be; None where all is."""
    if why := documents.misfit(value, RESULT):
        return why
    measured = value.get("measured") or {}
    data = (value.get("report") or {}).get("data") or {}
    rated = [*measured.get("evaluate", []), *([data["quality"]] if data.get("quality") else [])]
    for entry in rated:
        if entry["metric"] not in entry["metrics"]:
            return f"it has no figure of the metric `{entry['metric']}`"
    times = data.get("times") or {}
    if not all(batch.isdecimal() for batch in times):
        return "one of its batch sizes is no number"
    known = all(map(_is_known, (*rated, *measured.get("bench", []), times)))
    return None if known else "one of its figures is not a finite number"


def _is_known(value: Any) -> bool:
    """Return whether every number in a value is one that can be computed with."""
    if isinstance(value, dict | list):
        return all(map(_is_known, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or -LARGEST < value < LARGEST
