"""What reports hold, as charts: of the page that `report` writes and of the pictures that `--plot` draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftc.pages import charts
from peftc.pages.charts import Chart, Place
from peftc.pages.plot import Part
from peftc.report import grouped, short
from peftc.store.maps import Maps

LEAST = 1e-4  # of the largest singular value: what lies below is not drawn
FRAME = ((0.0, LEAST), (1.0, 1.0))  # of all spectra, so that they can be compared
LARGER = "factors hold more than the weight"
DENSE = 300  # points of a map: of more than these the marks are drawn smaller


def spectra(rows: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[float]] | None = None) -> list[Chart]:
    """Draw the spectra of modules of one kind together.

    Args:
        rows: figures per module, as `analyze` reports them.
        values: module -> all its singular values, descending; those that the rows hold when None.
    """
    known = {row["name"]: row for row in rows}
    found = []
    for kind, names in grouped(known).items():
        curves, dots = [], list[tuple[str, str, Place]]()
        for name in names:
            row, every = known[name], (values or {}).get(name)
            curve = [(rank / row["max_rank"], value) for rank, value in row["spectrum"]]
            if every is not None:
                curve = [((at + 1) / len(every), value / (every[0] or 1.0)) for at, value in enumerate(every)]
            for level in (90, 99):
                share = row[f"rank_{level}"] / row["max_rank"]
                place = min(curve, key=lambda place: abs(place[0] - share))
                look = "energy small" if level == 90 else "energy small square"
                dots += [("", look, place)] if place[1] >= LEAST else []
            curves.append(curve)
        if not any(value > LEAST for curve in curves for _, value in curve):
            continue
        row = known[names[0]]
        shape, share = "x".join(map(str, row["shape"])), row["break_even_rank"] / row["max_rank"]
        text = "Singular values in shares of the largest, over the share of the full rank."
        limit = (f"break-even, rank {row['break_even_rank']}: above it {LARGER}", share) if share < 1 else None
        keys = [("line", "line", "first" if len(names) > 1 else "its values")]
        keys += [("line", "line last", "last, the later the fainter")] if len(names) > 1 else []
        keys += [("round", "energy small", "90 % of the energy"), ("square", "energy small square", "99 %")]
        keys += [("", "", f"stays dense: {why}") for why in _reasons(known, names)]
        title = f"{kind}, {len(names)} of {shape}"
        about: dict[str, Any] = {"text": text, "log": True, "dots": dots, "limit": limit, "frame": FRAME, "keys": keys}
        found.append(charts.lines(title, curves, "share of the full rank", "of the largest", **about))
    return found


def _reasons(known: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Return why some of the modules stay dense, each reason once."""
    return [why for why in dict.fromkeys(known[name].get("reason") for name in names) if why]


def losses(curve: Mapping[str, Any], plan: Mapping[str, Any] | None) -> list[Chart]:
    """Draw predicted loss, on a logarithmic scale, against both sizes, and a plan; what loses nothing is left out."""
    points = [one for one in curve["points"] if one["predicted"] > 0]
    found = []
    for key, label in (("parameters", "parameters of the model"), ("macs", "multiply-adds of one sample")):
        if not points or points[0][key] is None:
            continue
        places = [(one[key], one["predicted"]) for one in points]
        dots = [(f"{one['ratio']:g}", "dot small", place) for one, place in zip(points, places, strict=True)]
        if plan is not None and key == "parameters" and plan.get("predicted"):
            dots.append(("plan", "plan", (plan["parameters"], plan["predicted"])))
        limit, text = ("the dense model", curve["points"][-1][key]), "At each point the ratio of eligible weights kept."
        about: dict[str, Any] = {"text": text, "log": True, "x_text": short, "dots": dots, "limit": limit}
        found.append(charts.lines(f"against {label}", [places], label, curve["unit"], **about))
    return found


def scores(data: Mapping[str, Any]) -> Chart | None:
    """Draw the score of every layer, as `prune-layers` reports them; None where no layer has one."""
    values = []
    for row in data["layers"]:
        looks = [] if row["kept"] else ["gone"]
        looks += ["close"] if row.get("close") else []
        values += [(row["name"], row["score"], " ".join(looks))] if row["score"] is not None else []
    if not values:
        return None
    limit = _threshold(data)
    label, looks = str(data.get("score") or "score"), " ".join(kind for _, _, kind in values).split()
    keys = [("bar", "bar", "kept")] if any(not kind or kind == "close" for _, _, kind in values) else []
    keys += [("bar", "bar gone", "dropped")] if "gone" in looks else []
    keys += [("bar", "bar close", "so near that noise may have decided")] if "close" in looks else []
    about: dict[str, Any] = {"text": dropped(data), "limit": limit, "keys": keys}
    return charts.bars("score of each layer", values, f"{label} (linear)", **about)


def _threshold(data: Mapping[str, Any]) -> charts.Limit | None:
    """Return the score that decided, with why a layer stays."""
    value, alpha = data.get("threshold"), data.get("alpha")
    if value is None:
        return None
    share = f", {alpha:g} of the last layer's score" if alpha is not None else ""
    if (data.get("measured") or {}).get("within_drop") is not None:
        return f"threshold {value:.3g}{share}: layers beyond the first from which on all reach it may go", value
    return f"threshold {value:.3g}{share}: kept are the layers up to the first from which on all reach it", value


def dropped(data: Mapping[str, Any]) -> str:
    """Write by what score which layers were dropped."""
    gone = ", ".join(row["name"] for row in data["layers"] if not row["kept"])
    close = ", ".join(row["name"] for row in data["layers"] if row.get("close"))
    noise = f"; within the noise (dashed): {close}" if close else ""
    return f"{data.get('score') or 'no score'}; dropped: {gone or 'none'}{noise}."


def maps(rows: Sequence[Mapping[str, Any]], known: Maps) -> list[Chart]:
    """Draw the t-SNE map after each layer, each sample as the mark of its class; ``rows`` as `prune-layers` reports."""
    side = round(charts.SIDE * max(1.0, math.sqrt(len(known.labels) / DENSE)))
    about = f"{samples_of(known)} of {len(known.classes)} classes; score"
    found = []
    for row in rows:
        title, text = f"t-SNE map after {row['name']}", f"{about} {state_of(row)}."
        frame = "frame" if row["kept"] else "gone"
        found.append(charts.cloud(title, text, known.points[row["name"]], known.labels, side, frame))
    return found


def samples_of(known: Maps) -> str:
    """Write how many samples maps show."""
    number = len(known.labels)
    return f"{number:,} of {known.samples:,} samples" if number < known.samples else f"{number:,} samples"


def state_of(row: Mapping[str, Any]) -> str:
    """Write the score of a layer and what became of it."""
    score = "no score" if row["score"] is None else f"{row['score']:.2f}"
    return f"{score}, {'kept' if row['kept'] else 'dropped'}"


def of_analysis(name: str, data: Mapping[str, Any], values: Mapping[str, Sequence[float]]) -> list[Part]:
    """Return the picture of what `analyze` reports of a model; ``values`` as for `spectra`."""
    drawn = spectra(data["modules"], values)
    told = f"{name}: singular values by kind of module"
    parts: list[Part] = [(told, drawn, min(4, max(3, len(drawn))))]
    if curve := data.get("curve"):
        how = f"{curve['method']}, {curve['allocation']}; at each point the ratio of eligible weights kept"
        parts.append((f"predicted loss against size ({how})", losses(curve, data.get("plan")), 3))
    return parts


def of_layers(name: str, data: Mapping[str, Any], known: Maps | None) -> list[Part]:
    """Return the picture of what `prune-layers` reports of a model, with the maps that scores are taken of."""
    drawn = scores(data)
    parts: list[Part] = [(f"{name}: {drawn.caption if drawn else 'no layer was scored'}", [drawn] if drawn else [], 3)]
    if known is not None:
        titles = [f"{row['number']}: {state_of(row)}" for row in data["layers"]]
        each = [replace(one, title=title) for one, title in zip(maps(data["layers"], known), titles, strict=True)]
        what = f"t-SNE maps of {samples_of(known)} after each layer, marked by class; above each its score"
        parts.append((what, each, 6))
        parts += [("classes", [charts.key(known.classes)], 1)] if len(known.classes) <= charts.MARKS else []
    return parts
