"""Charts as the picture of a file: written as SVG, or painted by matplotlib, which the extra ``report`` installs."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from peftc.errors import UsageError
from peftc.pages.charts import Chart, Shape
from peftc.pages.html import LOOKS, PALETTE, Html, tag
from peftc.store import documents

ACROSS, GAP, HEADING, TITLE = 1480, 20, 40, 22  # pixels: the picture, between charts, and what stands above them
POINT = 0.72  # points of a pixel, at 100 pixels an inch
MARKERS = {"round": "o", "filled": "^", "square": "s", "cross": "x"}
COLORS = dict(re.findall(r"--(\w+): (#\w+)", PALETTE.partition("@media")[0]))
STYLE = re.sub(r"var\(--(\w+)\)", lambda found: COLORS[found[1]], LOOKS)  # not every viewer knows variables
RULES = [
    (name, dict(part.split(": ") for part in inside.split("; ")))
    for name, inside in re.findall(r"(\w+) \{ (.*?);? \}", STYLE)
]

Part = tuple[str, Sequence[Chart], int]  # a heading, what stands under it, and how many of those beside each other
Placed = tuple[Chart, float, float, float]  # a chart, its left and its top, and what a pixel of it becomes


def refuse_unwritable(option: str, path: str | Path | None) -> None:
    """Refuse a file that cannot be written, before any work."""
    if path is not None and not Path(path).parent.is_dir():
        raise UsageError(f"`{option} {path}` cannot be written", why=f"there is no folder `{Path(path).parent}`")
    if option != "--plot" or path is None:
        return
    if Path(path).suffix not in (".png", ".svg"):
        raise UsageError(f"`--plot {path}` has no known ending", why="a picture is drawn as `.png` or `.svg`")
    if Path(path).suffix == ".png" and find_spec("matplotlib") is None:
        hint = "`pip install 'peftc[report]'`, or draw it as `.svg`"
        raise UsageError("pictures need matplotlib to be drawn as `.png`", hint=hint)


def draw(path: Path, parts: Sequence[Part]) -> None:
    """Write charts as one picture, ``.png`` or ``.svg``."""
    placed: list[Placed] = []
    top: float = GAP
    for heading, charts, columns in parts:
        placed.append((_words("heading", heading), GAP, top, 1.0))
        top += HEADING
        wide = (ACROSS - GAP) / columns - GAP
        for start in range(0, len(charts), columns):
            row = charts[start : start + columns]
            above = TITLE if row[0].title else 0
            for at, chart in enumerate(row):
                left, title = GAP + at * (wide + GAP), chart.title
                placed.append((_words("title", title if len(title) < 50 else f"...{title[-46:]}"), left, top, 1.0))
                placed.append((chart, left, top + above, wide / chart.width))
            top += above + max(chart.height * wide / chart.width for chart in row) + GAP
    (_paint if path.suffix == ".png" else _write)(path, placed, round(top))


def _words(look: str, text: str) -> Chart:
    return Chart(text, "", [Shape("text", look, [(0, 16)], text)], ACROSS, TITLE)


def _write(path: Path, placed: Sequence[Placed], height: int) -> None:
    parts = [tag("style", Html(STYLE)), tag("rect", width=ACROSS, height=height, fill=COLORS["paper"])]
    for chart, left, top, factor in placed:
        place = {"x": round(left, 2), "y": round(top, 2), "width": round(chart.width * factor, 2)}
        box = f"0 0 {chart.width} {chart.height}"
        inside = [shape.svg() for shape in chart.shapes]
        parts.append(tag("svg", *inside, **place, height=round(chart.height * factor, 2), viewBox=box))
    size = {"viewBox": f"0 0 {ACROSS} {height}", "width": ACROSS, "height": height}
    documents.write_whole(path, tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size) + "\n")


def _paint(path: Path, placed: Sequence[Placed], height: int) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure((ACROSS / 100, height / 100), dpi=150, facecolor=COLORS["paper"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, ACROSS), ylim=(height, 0))
    axes.axis("off")
    for chart, left, top, factor in placed:
        for shape in chart.shapes:
            known = {*shape.look.split(), shape.kind if shape.kind in {*MARKERS, "text"} else ""}
            look = {key: value for name, rule in RULES if name in known for key, value in rule.items()}
            stroke, fill = look.get("stroke", "none"), look.get("fill", "none")
            width = float(look.get("stroke-width", 1)) * factor * POINT
            alpha = shape.opacity or float(look.get("opacity", 1))
            dashes = (0, [float(n) for n in look["stroke-dasharray"].split()]) if "stroke-dasharray" in look else "-"
            xs, ys = zip(*((left + x * factor, top + y * factor) for x, y in shape.places), strict=True)
            if shape.kind == "text":
                pixels = float(re.search(r"\d+", look.get("font-size", look["font"]))[0])  # type: ignore[index]
                anchor = {"middle": "center", "end": "right"}.get(shape.anchor or "", "left")
                weight = look.get("font-weight", "normal")
                size = pixels * factor * POINT
                axes.text(xs[0], ys[0], shape.text, size=size, color=fill, ha=anchor, weight=weight, parse_math=False)
            elif shape.kind == "line":
                axes.plot(xs, ys, color=stroke, linewidth=width, alpha=alpha, linestyle=dashes)
            elif shape.kind == "bar":
                box = Rectangle((xs[0], ys[0]), xs[1] - xs[0], ys[1] - ys[0], facecolor=fill, edgecolor=stroke)
                box.set(linewidth=width, linestyle=dashes, zorder=2)  # as lines have it
                axes.add_patch(box)
            elif shape.kind == "cross":
                axes.plot(xs, ys, "x", color=stroke, markersize=10 * factor * POINT, markeredgewidth=width)
            else:
                size = width if shape.kind != "filled" else 12 * factor * POINT
                axes.plot(xs, ys, MARKERS[shape.kind], color=stroke, markersize=size, markeredgewidth=0)
    figure.savefig(path)
