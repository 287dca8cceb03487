"""Charts: what is painted, in pixels, as SVG inside a page or, several together, as the picture of a file."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftc.pages.html import Html, joined, prose, tag
from peftc.pages.labels import width_of

WIDTH, HEIGHT = 360, 264
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 36, 40  # margins: what is said of axes and limits stands off the curves
LINE = 16  # from one line of a key to the next
WORDS = 50  # characters of a line of a key
MOST = 240  # points of a line: more than a phone shows
SMOOTH = 20  # parts of a curve that it is averaged over, each
MARKS = 32  # classes that marks tell apart: eight colours by four shapes
SIDE, INSET = 320, 12  # of a map, and the room around its points
# a path of no length has round or square ends; the others are drawn
SHAPES = {"round": "h0", "filled": "m-6 5h12l-6-11z", "square": "h0", "cross": "m-5-5l10 10m-10 0l10-10"}

Text = Callable[[float], str]
Place = tuple[float, float]
Limit = tuple[str, float]  # its name, and where it is
Bar = tuple[str, float, str]  # its name, its height, and its class
Key = tuple[str, str, str]  # what is explained: its kind, its class, and what it is


@dataclass(frozen=True)
class Shape:
    """Something painted.

    Attributes:
        kind: a ``line`` through places, a ``bar`` between two corners, a ``text`` at one place, or at each place a mark
            of `SHAPES`.
        look: classes of `LOOKS`.
        places: in pixels, y from the top.
        text: of a text; of a bar or a mark what is said on hovering.
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
        said = tag("title", self.text) if self.text else None
        return tag("path", said, d=marks, class_=f"{self.look} {self.kind}", opacity=self.opacity)


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
        """Return the values that figures stand at, on a long axis more of them."""
        if not self.log:
            return ticks(self.low, self.high, 8 if abs(self.stop - self.start) > 600 else 4)
        powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 2, 5)):
            every = (step * 10.0**power for power in powers for step in steps)
            found = [value for value in every if self.low <= value <= self.high]
            if len(found) > 1:
                return found[:: math.ceil(len(found) / 4)]
        return [self.low, self.high]


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Return about so many round values in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def padded(values: Sequence[float], start: float, stop: float) -> Scale:
    """Return a scale with some room on both sides of what there is."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room, start, stop)


def axes(
    x: Scale, y: Scale, labels: tuple[str, str], texts: tuple[Text, Text], size: tuple[int, int] = (WIDTH, HEIGHT)
) -> list[Shape]:
    """Return the axes of a chart with their figures; ``labels`` and ``texts`` are of x and of y."""
    bottom, right = size[1] - BOTTOM, size[0] - RIGHT
    parts = [Shape("line", "axis", [(LEFT, TOP), (LEFT, bottom), (right, bottom)])]
    for value in y.ticks():
        parts.append(Shape("line", "grid", [(LEFT, y(value)), (right, y(value))]))
        parts.append(Shape("text", "", [(LEFT - 5, y(value) + 4)], texts[1](value), "end"))
    for value in x.ticks():
        anchor = "end" if x(value) > right - 12 else "middle"
        parts.append(Shape("text", "", [(x(value), bottom + 15)], texts[0](value), anchor))
    parts.append(Shape("text", "label", [(right, bottom + 32)], labels[0], "end"))
    return [*parts, Shape("text", "label", [(4, 12)], labels[1])]


def key_of(keys: Sequence[Key], top: int) -> tuple[list[Shape], int]:
    """Return what a chart explains beneath itself, and how high that is: as many in a line as there is room for.

    One of no kind is said without a mark.
    """
    shapes, left, y = list[Shape](), 4.0, top + LINE // 2
    for kind, look, text in keys:
        told = textwrap.wrap(text, WORDS)
        needed = 26 + max(width_of(line, 11) for line in told)
        if left > 4 and (left + needed > WIDTH or told[1:]):
            left, y = 4.0, y + LINE
        x = round(left, 2)
        places = {"line": [(x, y), (x + 18, y)], "bar": [(x + 4, y - 5), (x + 14, y + 5)]}.get(kind, [(x + 9, y)])
        shapes += [Shape(kind, look, places)] if kind else []
        shapes += [
            Shape("text", "", [(x + (24 if kind else 0), y + 4 + LINE * at)], line) for at, line in enumerate(told)
        ]
        y += LINE * (len(told) - 1)
        left += needed + 10 if not told[1:] else WIDTH
    return shapes, (y + LINE // 2 - top + 4 if keys else 0)


def bars(
    title: str,
    values: Sequence[Bar],
    y_label: str,
    *,
    text: str,
    limit: Limit | None = None,
    top: float | None = None,
    keys: Sequence[Key] = (),
) -> Chart:
    """Draw bars, and a line with its name at a limit; names are said on hovering."""
    height = 190
    numbers = [value for _, value, _ in values] + ([limit[1]] if limit else [])
    y = Scale(min(0.0, *numbers), top or max(*numbers, 1e-12), height - BOTTOM, TOP + 4)
    x = Scale(-0.5, len(values) - 0.5, LEFT + 2, WIDTH - RIGHT)
    half = max(1.5, (x(1) - x(0)) * 0.72) / 2

    def numbered(value: float) -> str:
        return f"{value:.0f}" if value == int(value) and value >= 0 else ""

    parts = axes(x, y, ("number, from the input", y_label), (numbered, "{:.3g}".format), (WIDTH, height))
    for at, (name, value, kind) in enumerate(values):
        start, stop = sorted((y(value), y(0.0)))
        corners = [(round(x(at) - half, 2), start), (round(x(at) + half, 2), max(stop, start + 0.8))]
        parts.append(Shape("bar", f"bar {kind}".strip(), corners, f"{name}: {value:.4g}"))
    if limit:
        parts.append(Shape("line", "limit", [(LEFT, y(limit[1])), (WIDTH - RIGHT, y(limit[1]))]))
        keys = [*keys, ("line", "limit", limit[0])]
    told, more = key_of(keys, height)
    said = "; ".join(f"{name}: {value:.3g}{f' ({kind})' if kind else ''}" for name, value, kind in values)
    return Chart(title, said, [*parts, *told], height=height + more, caption=text)


def smoothed(curve: Sequence[Place]) -> tuple[list[Place], int]:
    """Return a curve averaged over the steps on both sides of each, as far as there are some, and over how many."""
    reach = len(curve) // SMOOTH // 2
    sums = [0.0]
    for _, value in curve:
        sums.append(sums[-1] + value)
    found = []
    for at, (x, _) in enumerate(curve):
        first, last = max(0, at - reach), min(len(curve), at + reach + 1)
        found.append((x, (sums[last] - sums[first]) / (last - first)))
    return found, 2 * reach + 1


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
    raw: Sequence[Place] = (),
    keys: Sequence[Key] = (),
) -> Chart:
    """Draw curves over a common axis, the later the fainter.

    Args:
        curves: (x, y) from left to right; on a logarithmic scale what is not above 0 is left out.
        log: of y.
        frame: the least and the largest place that are shown; None shows all.
        x_text: how x is written.
        dots: label, class and place of each.
        limit: a line with its name, across at an x.
        raw: points beneath the curves, which those are means of.
        keys: what is explained beneath.
    """
    least = frame[0][1] if frame else 0.0
    kept = [_shown(curve, least if log else -math.inf) for curve in curves]
    kept, beneath = [curve for curve in kept if curve], _shown(raw, 0.0 if log else -math.inf)
    every = frame or [*(place for curve in (*kept, beneath) for place in curve), *(place for _, _, place in dots)]
    xs, ys = [a for a, _ in every] + ([limit[1]] if limit else []), [b for _, b in every]
    named, stop = any(name for name, _, _ in dots), WIDTH - RIGHT
    x = padded(xs, LEFT, stop) if named else Scale(min(xs), max(xs), LEFT, stop)
    ends = (HEIGHT - BOTTOM, TOP + (18 if named else 4))
    y = Scale(min(ys), max(ys), *ends, log) if log and max(ys) > min(ys) else padded(ys, *ends)
    scaled = (f"{x_label} (linear)", f"{y_label} ({'logarithmic' if y.log else 'linear'} scale)")
    parts = axes(x, y, scaled, (x_text, "{:.2g}".format if log else "{:.4g}".format))
    if beneath:
        parts.append(Shape("round", "raw", [(x(a), y(b)) for a, b in beneath]))
    for at, curve in enumerate(kept):
        fade = round(1 - 0.75 * at / len(kept), 2) if len(kept) > 1 else None
        look = "line many" if len(kept) > 2 else "line"
        parts.append(Shape("line", look, [(x(a), y(b)) for a, b in curve], opacity=fade))
    if limit:
        across = x(limit[1])
        parts.append(Shape("line", "limit", [(across, HEIGHT - BOTTOM), (across, TOP)]))
        keys = [*keys, ("line", "limit", limit[0])]
    for label, look, (a, b) in dots:
        parts.append(Shape("square" if "square" in look else "round", look, [(x(a), y(b))]))
        if label:
            beneath_it = look == "plan"  # which lies on a curve of named dots
            place = (x(a) - 6, y(b) + 13) if beneath_it else (x(a) + 5, y(b) - 5)
            parts.append(Shape("text", "", [place], label, "end" if beneath_it else None))
    told, more = key_of(keys, HEIGHT)
    said = f"{text} From {kept[0][0][1]:.4g} to {kept[0][-1][1]:.4g}."
    return Chart(title, said, [*parts, *told], height=HEIGHT + more, caption=text)


def _shown(curve: Sequence[Place], least: float) -> list[Place]:
    """Return the points of a curve that are above ``least``, no more of them than a phone shows."""
    kept = [(a, b) for a, b in curve if math.isfinite(b) and b > least]
    return [*kept[:: max(1, len(kept) // MOST)], *kept[-1:]]


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
