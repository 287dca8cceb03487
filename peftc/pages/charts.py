"""Charts as SVG inside a page: at most as wide as a phone, with a text for those who do not see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftc.pages.html import Html, joined, prose, tag

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38  # margins, for the figures on the axes
MOST = 240  # points of a line: more than a phone shows

Text = Callable[[float], str]


@dataclass(frozen=True)
class Point:
    """A model in a chart: its label, its place, and the interval of its height."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    base: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to pixels, in a line or on a logarithmic scale."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (self.stop - self.start) * (value - low) / ((high - low) or 1.0), 2)


def ticks(low: float, high: float) -> list[float]:
    """Return about four round values in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    found = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return found[:: max(1, math.ceil(len(found) / 4))] if len(found) > 1 else [low, high]


def picture(title: str, text: str, *inside: object, height: int = HEIGHT) -> Html:
    """Return a drawing, with what it shows in words for those who do not see it."""
    return tag(
        "svg", *inside, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=f"{title}. {text}".replace("`", "")
    )


def figure(title: str, text: str, drawing: Html, caption: str = "") -> Html:
    """Return a drawing under its title, with what is to be said of it."""
    said = tag("figcaption", tag("strong", title), " ", prose(caption or text))
    return tag("figure", drawing, said)


def axes(
    x: Scale, y: Scale, x_label: str, y_label: str, x_text: Text, y_text: Text, *, height: int = HEIGHT
) -> list[Html]:
    """Return the axes of a chart with their figures."""
    bottom, right = height - BOTTOM, WIDTH - RIGHT
    parts = [tag("path", d=f"M{LEFT} {TOP}V{bottom}H{right}", class_="axis")]
    for value in _decades(y.low, y.high) if y.log else ticks(y.low, y.high):
        at = y(value)
        parts.append(tag("path", d=f"M{LEFT} {at}H{right}", class_="grid"))
        parts.append(tag("text", y_text(value), x=LEFT - 5, y=at + 4, text_anchor="end"))
    shown = ticks(x.low, x.high)
    for value in shown:
        anchor = "end" if x(value) > right - 12 else "middle"
        parts.append(tag("text", x_text(value), x=x(value), y=bottom + 15, text_anchor=anchor))
    parts.append(tag("text", x_label, x=right, y=bottom + 31, text_anchor="end", class_="soft"))
    parts.append(tag("text", y_label, x=LEFT + 4, y=TOP + 2, class_="soft"))
    return parts


def scatter(
    title: str,
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    x_text: Text,
    *,
    less_is_better: bool,
    higher_is_better: bool,
) -> Html:
    """Draw models by what they cost and how good they are, with the front that no other model beats in both."""
    every = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    x = _padded([point.x for point in points], LEFT, WIDTH - RIGHT)
    y = _padded(every, HEIGHT - BOTTOM, TOP + 10)
    parts = axes(x, y, x_label, y_label, x_text, lambda value: f"{value:.4g}")
    front = pareto(points, less_is_better=less_is_better, higher_is_better=higher_is_better)
    if len(front) > 1:
        parts.append(tag("polyline", points=" ".join(f"{x(p.x)},{y(p.y)}" for p in front), class_="front"))
    groups: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        groups.setdefault((round(x(point.x) / 6), round(y(point.y) / 6)), []).append(point)
    for together in groups.values():
        for point in together:
            if point.low is not None and point.high is not None:
                parts.append(tag("path", d=f"M{x(point.x)} {y(point.low)}V{y(point.high)}", class_="range"))
            parts.append(
                tag("circle", cx=x(point.x), cy=y(point.y), r=4.5, class_=f"dot{' base' if point.base else ''}")
            )
        first = together[0]
        label = ", ".join(point.label for point in together)
        end = x(first.x) > WIDTH - 60
        at = x(first.x) - 8 if end else x(first.x) + 8
        parts.append(tag("text", label, x=at, y=y(first.y) - 6, text_anchor="end" if end else None))
    said = "; ".join(f"{point.label}: {x_text(point.x)}, {y_label} {point.y:.4g}" for point in points)
    best = ", ".join(point.label for point in front) + (" (dashed)" if len(front) > 1 else "")
    return figure(title, said, picture(title, said, *parts), f"No other model is better in both than {best}.")


def pareto(points: Sequence[Point], *, less_is_better: bool, higher_is_better: bool) -> list[Point]:
    """Return the points that no other beats in one axis without losing in the other, from left to right."""

    def cost(point: Point) -> tuple[float, float]:
        return point.x if less_is_better else -point.x, -point.y if higher_is_better else point.y

    front: list[Point] = []
    for point in sorted(points, key=cost):
        if not front or cost(point)[1] < cost(front[-1])[1]:
            front.append(point)
    return sorted(front, key=lambda point: point.x)


def bars(
    title: str,
    values: Sequence[tuple[str, float, str]],
    y_label: str,
    *,
    text: str,
    limit: float | None = None,
    top: float | None = None,
) -> Html:
    """Draw a bar for each (name, value, class); names are said on hovering, and in the text."""
    height = 170
    numbers = [value for _, value, _ in values] + ([limit] if limit is not None else [])
    y = Scale(min(0.0, *numbers), top or max(*numbers, 1e-12), height - BOTTOM, TOP + 8)
    x = Scale(-0.5, len(values) - 0.5, LEFT + 2, WIDTH - RIGHT)
    wide = max(1.5, (x(1) - x(0)) * 0.72)
    parts = axes(
        x,
        y,
        "number, from the input",
        y_label,
        lambda v: f"{v:.0f}" if v == int(v) and v >= 0 else "",
        lambda v: f"{v:.3g}",
        height=height,
    )
    for at, (name, value, kind) in enumerate(values):
        start, stop = sorted((y(value), y(0.0)))
        hover = tag("title", f"{name}: {value:.4g}")
        parts.append(
            tag(
                "rect",
                hover,
                x=round(x(at) - wide / 2, 2),
                y=start,
                width=round(wide, 2),
                height=round(max(0.8, stop - start), 2),
                class_=f"bar {kind}".strip(),
            )
        )
    if limit is not None:
        parts.append(tag("path", d=f"M{LEFT} {y(limit)}H{WIDTH - RIGHT}", class_="limit"))
    said = "; ".join(f"{name}: {value:.3g}{f' ({kind})' if kind else ''}" for name, value, kind in values)
    return figure(title, text, picture(title, said, *parts, height=height), text)


def lines(
    title: str,
    curves: Sequence[Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    text: str,
    log: bool = False,
) -> Html:
    """Draw curves over a common axis; on a logarithmic scale what is not above 0 is left out."""
    kept = [[(a, b) for a, b in curve if math.isfinite(b) and (b > 0 or not log)] for curve in curves]
    kept = [curve[:: max(1, len(curve) // MOST)] + curve[-1:] for curve in kept if curve]
    ys = [b for curve in kept for _, b in curve]
    x = Scale(
        min(a for curve in kept for a, _ in curve), max(a for curve in kept for a, _ in curve), LEFT, WIDTH - RIGHT
    )
    y = (
        Scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP + 10, log)
        if log and max(ys) > min(ys)
        else _padded(ys, HEIGHT - BOTTOM, TOP + 10)
    )
    parts = axes(x, y, x_label, y_label, lambda v: f"{v:g}", lambda v: f"{v:.2g}" if log else f"{v:.4g}")
    kind = "line many" if len(kept) > 2 else "line"
    parts += [tag("polyline", points=" ".join(f"{x(a)},{y(b)}" for a, b in curve), class_=kind) for curve in kept]
    said = f"{text} From {kept[0][0][1]:.4g} to {kept[0][-1][1]:.4g}."
    return figure(title, text, picture(title, said, *parts), text)


def _padded(values: Sequence[float], start: float, stop: float) -> Scale:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room, start, stop)


MARKS = 32  # classes that marks tell apart: eight colours by four shapes
SIDE, INSET = 320, 12  # of a map, and the room around its points


def cloud(title: str, text: str, points: Sequence[tuple[float, float]], labels: Sequence[int]) -> Html:
    """Draw a map of samples, (x, y) in [0, 1], each as the mark of its class; axes of t-SNE say nothing."""
    parts = [tag("rect", x=1, y=1, width=SIDE - 2, height=SIDE - 2, class_="frame")]
    for each in sorted(set(labels)):
        where = [point for point, label in zip(points, labels, strict=True) if label == each]
        parts.append(marks(each, [(_place(x), _place(1 - y)) for x, y in where]))
    said = f"{title}. {text}".replace("`", "")
    return tag("svg", *parts, viewBox=f"0 0 {SIDE} {SIDE}", role="img", class_="map", aria_label=said)


def marks(number: int, places: Sequence[tuple[float, float]]) -> Html:
    """Return the marks of a class, as one path: eight colours, and a shape that differs from those beside it."""
    shape = SHAPES[(number + number // 8) % len(SHAPES)]
    return tag("path", d="".join(f"M{x:g} {y:g}{shape[1]}" for x, y in places), class_=f"c{number % 8} {shape[0]}")


# a path of no length has round or square ends; the others are drawn
SHAPES = [("round", "h0"), ("filled", "m-6 5h12l-6-11z"), ("square", "h0"), ("cross", "m-5-5l10 10m-10 0l10-10")]


def legend(names: Sequence[str]) -> Html:
    """Return the mark of each class with its name."""
    keys = (
        joined([tag("svg", marks(at, [(10, 10)]), viewBox="0 0 20 20", aria_hidden="true"), name])
        for at, name in enumerate(names)
    )
    return tag("ul", *(tag("li", key) for key in keys), class_="keys")


def _place(share: float) -> int:
    return round(INSET + (SIDE - 2 * INSET) * share)
