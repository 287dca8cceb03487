"""Rows of a comparison > quality against what it costs: one chart, with a switch between four costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from peftc.pages.charts import BOTTOM, LEFT, RIGHT, TOP, Chart, Place, Shape, Text, axes, padded
from peftc.pages.html import Html, joined, prose, tag
from peftc.pages.labels import Box, cut, nearest, placed
from peftc.pages.records import Row
from peftc.pages.tables import labels_of, quoted
from peftc.report import short, size

WIDE, NARROW = (1120, 400), (360, 360)  # pixels of a desk's chart and of a phone's
SHORT = 14  # characters of a name on a phone


@dataclass(frozen=True)
class Point:
    """A model in the chart.

    Attributes:
        label: what it is called.
        x, y: its cost and its quality.
        low, high: the interval of its quality.
        left, right: the range of its cost, where that was measured.
        base: whether it is the dense model.
        run: what was measured together has the same.
    """

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None
    base: bool = False
    run: str = ""


@dataclass(frozen=True)
class View:
    """A cost that quality is drawn against."""

    word: str
    label: str
    text: Text
    of: Callable[[Row], float | None]
    less_is_better: bool = True


def _times(value: float) -> str:
    return f"{value:.3g}x"


def _speed(row: Row) -> float | None:
    if row.base is None:
        return 1.0
    return None if row.speedup is None else float(row.speedup["value"])


SPEED = "speed"
VIEWS = (
    View("parameters", "parameters", short, lambda row: row.parameters),
    View("bytes", "bytes on disk", size, lambda row: row.bytes),
    View("multiply-adds", "multiply-adds of one sample", short, lambda row: row.macs),
    View(SPEED, "times the dense model's speed", _times, _speed, less_is_better=False),
)


def trade_of(rows: Sequence[Row]) -> Html | None:
    """Return the chart of models whose quality is known; None where there are not two that differ."""
    measured = [row for row in rows if row.quality]
    if len(measured) < 2:
        return None
    drawn = []
    for view in VIEWS:
        points = points_of(measured, view)
        apart = [point for point in points if view.word != SPEED or not point.base]
        if apart and len({point.x for point in points}) > 1:
            lacks = [row.name for row in measured if view.of(row) is None]
            drawn.append((view, _figure(points, view, measured[0], lacks)))
    if not drawn:
        return None
    inputs = [
        tag("input", type="radio", name="cost", id=f"cost-{at}", checked="" if at == 0 else None)
        for at in range(len(drawn))
    ]
    names = [tag("label", view.word, for_=f"cost-{at}") for at, (view, _) in enumerate(drawn)]
    switch = tag("div", tag("span", "against"), *names, class_="tabs")
    return tag("div", *inputs, switch, *(figure for _, figure in drawn), class_="switch", role="group")


def points_of(rows: Sequence[Row], view: View) -> list[Point]:
    """Return the models that have such a cost, each with what it was measured together with."""
    names, found = labels_of(rows)[0], []
    for row in rows:
        assert row.quality is not None
        value, x = row.quality["metrics"][row.quality["metric"]], view.of(row)
        if x is None:
            continue
        point = Point(names[row.name], x, value["value"], value["low"], value["high"], base=row.base is None)
        if view.word == SPEED and row.speedup is not None:
            point = replace(point, left=row.speedup["low"], right=row.speedup["high"], run=row.name)
        found.append(point)
    runs = {point.run for point in found if not point.base}
    if len(runs) == 1:  # the dense model was in it, too
        found = [replace(point, run=next(iter(runs))) for point in found]
    return found


def front_of(points: Sequence[Point], *, less_is_better: bool, higher_is_better: bool) -> list[Point]:
    """Return the points that no other beats in both, from left to right; none where they are of several runs."""
    if len({point.run for point in points}) > 1:
        return []

    def cost(point: Point) -> tuple[float, float]:
        return point.x if less_is_better else -point.x, -point.y if higher_is_better else point.y

    front: list[Point] = []
    for point in sorted(points, key=cost):
        if not front or cost(point)[1] < cost(front[-1])[1]:
            front.append(point)
    return sorted(front, key=lambda point: point.x)


def _figure(points: Sequence[Point], view: View, row: Row, lacks: Sequence[str]) -> Html:
    """Return the chart in two sizes, of which the reader's screen shows one, with what is to be said of it."""
    assert row.quality is not None
    metric, higher = str(row.quality["metric"]), bool(row.quality.get("higher_is_better", True))
    front = front_of(points, less_is_better=view.less_is_better, higher_is_better=higher)
    told = [f"Bars are 95 % intervals{', of speed the range in its run' if view.word == SPEED else ''}."]
    if len(front) > 1:
        told.append(f"The dashed line is the front: by these figures no model beats {_listed(front)} in both.")
    elif front:
        told.append(_of_one(points, front[0], view.word, metric))
    else:
        told.append("No front is drawn: each speed-up was measured in a run of its own, beside the dense model.")
    if lacks:
        told.append(f"Not here, as it was not measured: {', '.join(map(quoted, lacks))}.")
    charts = []
    for look, box in (("wide", WIDE), ("narrow", NARROW)):
        chart, unnamed = scatter(points, front, (view, metric, higher), box, look)
        number = len(unnamed)
        without = (
            f"{number} {'name finds' if number == 1 else 'names find'} no room here; the table has all."
            if unnamed
            else ""
        )
        charts.append(joined([chart.svg(), tag("p", without, class_=f"{look} soft") if without else None]))
    said = tag("figcaption", prose(" ".join(told)))
    return tag("figure", *charts, said, aria_label=f"{metric} against {view.word}")


def _of_one(points: Sequence[Point], best: Point, word: str, metric: str) -> str:
    """Say of a model that none beats in either that it is the best, and which are level with it, in what."""
    others = [point for point in points if point is not best]
    same = [point for point in others if (point.x, point.y) == (best.x, best.y)]
    if not any(point.x == best.x or point.y == best.y for point in others):
        return f"By these figures {quoted(best.label)} is the best in both."
    level = [
        f"{_listed(some)} in {name}"
        for name, some in (
            (word, [point for point in others if point.x == best.x and point not in same]),
            (metric, [point for point in others if point.y == best.y and point not in same]),
        )
        if some
    ]
    told = f"By these figures no model is better in either than {_listed([best, *same])}"
    return f"{told}; level with that: {', '.join(level)}." if level else f"{told}, which are level."


def _listed(points: Sequence[Point]) -> str:
    names = [quoted(point.label) for point in points]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def scatter(
    points: Sequence[Point], front: Sequence[Point], about: tuple[View, str, bool], box: tuple[int, int], look: str
) -> tuple[Chart, list[str]]:
    """Draw models by what they cost and how good they are; return also the names that there is no room for."""
    view, metric, higher = about
    width, height = box
    every = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    across = [value for point in points for value in (point.x, point.left, point.right) if value is not None]
    x, y = padded(across, LEFT, width - RIGHT), padded(every, height - BOTTOM, TOP)
    better = "less" if view.less_is_better else "more"
    names = (
        f"{view.label} (linear; {better} is better)",
        f"{metric} (linear; {'more' if higher else 'less'} is better)",
    )
    parts = axes(x, y, names, (view.text, "{:.4g}".format), box)
    steps = _steps(front, view, x, y) if len(front) > 1 else []
    parts += [Shape("line", "front", steps)] if steps else []
    lines = [(_around(*ends), 30) for ends in pairwise(steps)]
    for point in points:
        at, up = x(point.x), y(point.y)
        if point.low is not None and point.high is not None:
            parts.append(Shape("line", "range", [(at, y(point.low)), (at, y(point.high))]))
            lines.append((_around((at, y(point.low)), (at, y(point.high))), 8))
        if point.left is not None and point.right is not None:
            parts.append(Shape("line", "range", [(x(point.left), up), (x(point.right), up)]))
            lines.append((_around((x(point.left), up), (x(point.right), up)), 8))
    longest = {"longest": SHORT} if look == "narrow" else {}
    named = [((x(point.x), y(point.y)), cut(point.label, **longest)) for point in points]
    labels = placed(named, Box(LEFT + 2, TOP, width - 2, height - BOTTOM), lines)
    for label in labels:
        if not label.is_near:
            parts.append(Shape("line", "leader", [label.point, nearest(label.point, label.box)]))
    for point in points:
        told = f"{point.label}: {view.text(point.x)}, {metric} {point.y:.4g}"
        parts.append(Shape("round", "base" if point.base else "dot", [(x(point.x), y(point.y))], told))
    parts += [Shape("text", "name", [label.place], label.text) for label in labels]
    left = [text for _, text in named]
    for label in labels:
        left.remove(label.text)
    said = "; ".join(f"{point.label}: {view.text(point.x)}, {metric} {point.y:.4g}" for point in points)
    return Chart(f"{metric} against {view.word}", said, parts, width, height, look=look), left


def _around(start: Place, end: Place) -> Box:
    (left, right), (top, bottom) = sorted((start[0], end[0])), sorted((start[1], end[1]))
    return Box(left - 1, top - 1, right + 1, bottom + 1)


def _steps(front: Sequence[Point], view: View, x: Callable[[float], float], y: Callable[[float], float]) -> list[Place]:
    """Return the front as steps: what can be had at each cost by one of these models."""
    places = [(x(front[0].x), y(front[0].y))]
    for before, after in pairwise(front):
        places.append((x(after.x), y(before.y)) if view.less_is_better else (x(before.x), y(after.y)))
        places.append((x(after.x), y(after.y)))
    return places
