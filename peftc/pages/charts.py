"""Charts: what is painted, in pixels, as SVG inside a page or, several together, as the picture of a file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftc.pages.html import Html, joined, prose, tag

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38  # margins, for the figures on the axes
MOST = 240  # points of a line: more than a phone shows
MARKS = 32  # classes that marks tell apart: eight colours by four shapes
SIDE, INSET = 320, 12  # of a map, and the room around its points
# a path of no length has round or square ends; the others are drawn
SHAPES = {"round": "h0", "filled": "m-6 5h12l-6-11z", "square": "h0", "cross": "m-5-5l10 10m-10 0l10-10"}

Text = Callable[[float], str]
Place = tuple[float, float]
Limit = tuple[str, float]  # its name, and where it is
Bar = tuple[str, float, str]  # its name, its height, and its class


@dataclass(frozen=True)
class Shape:
    """Something painted.

    Attributes:
        kind: a ``line`` through places, a ``bar`` between two corners, a ``text`` at one place, or at each place a mark
            of `SHAPES`.
        look: classes of `LOOKS`.
        places: in pixels, y from the top.
        text: of a text; of a bar what is said on hovering.
        anchor: what of a text is at its place, ``start``, ``middle`` or ``end``.
        opacity: in (0, 1].
    """

    kind: str
    look: str
    places: Sequence[Place]
    text: str = ""
    anchor: str | None = None
    opacity: float | None = None

    def svg(self) -> Html:
        """Return it as an element."""
        look = self.look or None
        (x, y), (right, bottom) = self.places[0], self.places[-1]
        if self.kind == "line":
            points = " ".join(f"{x},{y}" for x, y in self.places)
            return tag("polyline", points=points, class_=look, opacity=self.opacity)
        if self.kind == "text":
            return tag("text", self.text, x=x, y=y, text_anchor=self.anchor, class_=look)
        if self.kind == "bar":
            hover, width, height = tag("title", self.text), round(right - x, 2), round(bottom - y, 2)
            return tag("rect", hover if self.text else None, x=x, y=y, width=width, height=height, class_=look)
        marks = "".join(f"M{x:g} {y:g}{SHAPES[self.kind]}" for x, y in self.places)
        return tag("path", d=marks, class_=f"{self.look} {self.kind}", opacity=self.opacity)


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: what it is of.
        text: what it shows, for those who do not see it.
        shapes: the first painted lies beneath the others.
        width, height: in pixels.
        caption: what is to be said of it; ``text`` where it is empty.
        look: class of the whole.
    """

    title: str
    text: str
    shapes: Sequence[Shape]
    width: int = WIDTH
    height: int = HEIGHT
    caption: str = ""
    look: str | None = None

    def svg(self) -> Html:
        """Return it for a page."""
        said, box = f"{self.title}. {self.text}".replace("`", ""), f"0 0 {self.width} {self.height}"
        inside = (shape.svg() for shape in self.shapes)
        return tag("svg", *inside, viewBox=box, role="img", class_=self.look, aria_label=said)

    def figure(self) -> Html:
        """Return it for a page, under its title and with what is to be said of it."""
        said = tag("figcaption", tag("strong", self.title), " ", prose(self.caption or self.text))
        return tag("figure", self.svg(), said)


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

    def ticks(self) -> list[float]:
        """Return the values that figures stand at."""
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 2, 5)):
            every = (step * 10.0**power for power in powers for step in steps)
            found = [value for value in every if self.low <= value <= self.high]
            if len(found) > 1:
                return found[:: math.ceil(len(found) / 4)]
        return [self.low, self.high]


def ticks(low: float, high: float) -> list[float]:
    """Return about four round values in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def _padded(values: Sequence[float], start: float, stop: float) -> Scale:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room, start, stop)


def axes(x: Scale, y: Scale, labels: tuple[str, str], texts: tuple[Text, Text], height: int = HEIGHT) -> list[Shape]:
    """Return the axes of a chart with their figures; ``labels`` and ``texts`` are of x and of y."""
    bottom, right = height - BOTTOM, WIDTH - RIGHT
    parts = [Shape("line", "axis", [(LEFT, TOP), (LEFT, bottom), (right, bottom)])]
    for value in y.ticks():
        parts.append(Shape("line", "grid", [(LEFT, y(value)), (right, y(value))]))
        parts.append(Shape("text", "", [(LEFT - 5, y(value) + 4)], texts[1](value), "end"))
    for value in x.ticks():
        anchor = "end" if x(value) > right - 12 else "middle"
        parts.append(Shape("text", "", [(x(value), bottom + 15)], texts[0](value), anchor))
    parts.append(Shape("text", "label", [(right, bottom + 31)], labels[0], "end"))
    return [*parts, Shape("text", "label", [(LEFT + 4, TOP + 2)], labels[1])]


def scatter(
    points: Sequence[Point], x_label: str, y_label: str, x_text: Text, *, less_is_better: bool, higher_is_better: bool
) -> Chart:
    """Draw models by what they cost and how good they are, with the front that no other model beats in both."""
    every = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    x = _padded([point.x for point in points], LEFT, WIDTH - RIGHT)
    y = _padded(every, HEIGHT - BOTTOM, TOP + 10)
    parts = axes(x, y, (x_label, y_label), (x_text, lambda value: f"{value:.4g}"))
    front = pareto(points, less_is_better=less_is_better, higher_is_better=higher_is_better)
    if len(front) > 1:
        parts.append(Shape("line", "front", [(x(point.x), y(point.y)) for point in front]))
    groups: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        groups.setdefault((round(x(point.x) / 6), round(y(point.y) / 6)), []).append(point)
    for together in groups.values():
        for point in together:
            if point.low is not None and point.high is not None:
                parts.append(Shape("line", "range", [(x(point.x), y(point.low)), (x(point.x), y(point.high))]))
            parts.append(Shape("round", "base" if point.base else "dot", [(x(point.x), y(point.y))]))
        label, left, top = ", ".join(point.label for point in together), x(together[0].x), y(together[0].y) - 6
        is_last = left > WIDTH - 60
        parts.append(Shape("text", "", [(left + (-8 if is_last else 8), top)], label, "end" if is_last else None))
    said = "; ".join(f"{point.label}: {x_text(point.x)}, {y_label} {point.y:.4g}" for point in points)
    best = ", ".join(point.label for point in front) + (" (dashed)" if len(front) > 1 else "")
    caption = f"No other model is better in both than {best}."
    return Chart(f"{y_label} against {x_label}", said, parts, caption=caption)


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
    title: str, values: Sequence[Bar], y_label: str, *, text: str, limit: Limit | None = None, top: float | None = None
) -> Chart:
    """Draw bars, and a line with its name at a limit; names are said on hovering."""
    height = 170
    numbers = [value for _, value, _ in values] + ([limit[1]] if limit else [])
    y = Scale(min(0.0, *numbers), top or max(*numbers, 1e-12), height - BOTTOM, TOP + 8)
    x = Scale(-0.5, len(values) - 0.5, LEFT + 2, WIDTH - RIGHT)
    half = max(1.5, (x(1) - x(0)) * 0.72) / 2

    def numbered(value: float) -> str:
        return f"{value:.0f}" if value == int(value) and value >= 0 else ""

    parts = axes(x, y, ("number, from the input", y_label), (numbered, "{:.3g}".format), height)
    for at, (name, value, kind) in enumerate(values):
        start, stop = sorted((y(value), y(0.0)))
        corners = [(round(x(at) - half, 2), start), (round(x(at) + half, 2), max(stop, start + 0.8))]
        parts.append(Shape("bar", f"bar {kind}".strip(), corners, f"{name}: {value:.4g}"))
    if limit:
        parts.append(Shape("line", "limit", [(LEFT, y(limit[1])), (WIDTH - RIGHT, y(limit[1]))]))
        parts.append(Shape("text", "label", [(WIDTH - RIGHT, y(limit[1]) - 3)], limit[0], "end"))
    said = "; ".join(f"{name}: {value:.3g}{f' ({kind})' if kind else ''}" for name, value, kind in values)
    return Chart(title, said, parts, height=height, caption=text)


def lines(
    title: str,
    curves: Sequence[Sequence[Place]],
    x_label: str,
    y_label: str,
    *,
    text: str,
    log: bool = False,
    frame: tuple[Place, Place] | None = None,
    x_text: Text = "{:g}".format,
    dots: Sequence[tuple[str, str, Place]] = (),
    limit: Limit | None = None,
) -> Chart:
    """Draw curves over a common axis, the later the fainter.

    Args:
        curves: (x, y) from left to right; on a logarithmic scale what is not above 0 is left out.
        log: of y.
        frame: the least and the largest place that are shown; None shows all.
        x_text: how x is written.
        dots: label, class and place of each.
        limit: a line with its name, across at an x.
    """
    least = frame[0][1] if frame else 0.0
    kept = [[(a, b) for a, b in curve if math.isfinite(b) and (b > least or not log)] for curve in curves]
    kept = [curve[:: max(1, len(curve) // MOST)] + curve[-1:] for curve in kept if curve]
    every = frame or [*(place for curve in kept for place in curve), *(place for _, _, place in dots)]
    xs, ys = [a for a, _ in every] + ([limit[1]] if limit else []), [b for _, b in every]
    named, stop = any(name for name, _, _ in dots), WIDTH - RIGHT
    x = _padded(xs, LEFT, stop) if named else Scale(min(xs), max(xs), LEFT, stop)
    ends = (HEIGHT - BOTTOM, TOP + (24 if named else 10))
    y = Scale(min(ys), max(ys), *ends, log) if log and max(ys) > min(ys) else _padded(ys, *ends)
    parts = axes(x, y, (x_label, y_label), (x_text, "{:.2g}".format if log else "{:.4g}".format))
    for at, curve in enumerate(kept):
        fade = round(1 - 0.75 * at / len(kept), 2) if len(kept) > 1 else None
        look = "line many" if len(kept) > 2 else "line"
        parts.append(Shape("line", look, [(x(a), y(b)) for a, b in curve], opacity=fade))
    if limit:
        across, below = x(limit[1]), TOP + 9 if named else HEIGHT - BOTTOM - 5
        parts.append(Shape("line", "limit", [(across, HEIGHT - BOTTOM), (across, TOP)]))
        parts.append(Shape("text", "label", [(across - 3, below)], limit[0], "end"))
    for label, look, (a, b) in dots:
        parts.append(Shape("round", look, [(x(a), y(b))]))
        if label:
            beneath = look == "plan"  # which lies on a curve of named dots
            place = (x(a) - 6, y(b) + 13) if beneath else (x(a) + 5, y(b) - 5)
            parts.append(Shape("text", "", [place], label, "end" if beneath else None))
    return Chart(title, f"{text} From {kept[0][0][1]:.4g} to {kept[0][-1][1]:.4g}.", parts, caption=text)


def cloud(
    title: str, text: str, points: Sequence[Place], labels: Sequence[int], side: int = SIDE, frame: str = "frame"
) -> Chart:
    """Draw a map of samples, (x, y) in [0, 1], each as the mark of its class; axes of t-SNE say nothing."""

    def at(share: float) -> int:
        return round(INSET + (side - 2 * INSET) * share)

    parts = [Shape("bar", frame, [(1, 1), (side - 1, side - 1)])]
    for each in sorted(set(labels)):
        where = [point for point, label in zip(points, labels, strict=True) if label == each]
        parts.append(marks(each, [(at(x), at(1 - y)) for x, y in where]))
    return Chart(title, text, parts, side, side, look="map")


def marks(number: int, places: Sequence[Place]) -> Shape:
    """Return the marks of a class: eight colours, and a shape that differs from those beside it."""
    return Shape([*SHAPES][(number + number // 8) % len(SHAPES)], f"c{number % 8}", places)


def legend(names: Sequence[str]) -> Html:
    """Return the mark of each class with its name."""
    keys = (
        joined([tag("svg", marks(at, [(10, 10)]).svg(), viewBox="0 0 20 20", aria_hidden="true"), name])
        for at, name in enumerate(names)
    )
    return tag("ul", *(tag("li", key) for key in keys), class_="keys")


def key(names: Sequence[str]) -> Chart:
    """Draw the mark of each class with its name, eight in a row."""
    shapes = []
    for at, name in enumerate(names):
        x, y = 10 + 180 * (at % 8), 12 + 22 * (at // 8)
        text = name if len(name) <= 24 else f"{name[:21]}..."
        shapes += [marks(at, [(x, y)]), Shape("text", "", [(x + 12, y + 4)], text)]
    return Chart("", "", shapes, 1440, 22 * math.ceil(len(names) / 8))
