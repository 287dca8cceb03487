"""Names beside points: where each can stand without lying on another, on a point or outside the frame."""

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

SIZE = 12  # pixels of the letters
POINT = 7  # half a side of what a point keeps free
DISTANCES = (10, 22, 36, 52, 70, 90)  # pixels from a point to its name
DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
NEAR = 60  # pixels: points that have others so near are in a crowd
LONGEST = 26  # characters of a name

Place = tuple[float, float]


class Box(NamedTuple):
    """A rectangle in pixels, y from the top."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Return whether two have more than an edge in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, place: Place) -> bool:
        """Return whether a place lies in it."""
        return self.left <= place[0] <= self.right and self.top <= place[1] <= self.bottom


class Label(NamedTuple):
    """A name that has a place: its left end on the line of writing, its box, and the point that it is of."""

    text: str
    place: Place
    box: Box
    point: Place
    is_near: bool


def width_of(text: str, size: float = SIZE) -> float:
    """Return about how wide a text is, rather too wide than too narrow: nobody knows the reader's letters."""

    def em(letter: str) -> float:
        if unicodedata.east_asian_width(letter) in "WF":
            return 1.05
        return 0.8 if letter.isupper() or letter in "mwMW@%" else 0.34 if letter in "il.,:;'|! " else 0.63

    return size * sum(map(em, text))


def cut(text: str, longest: int = LONGEST) -> str:
    """Return a name that is not too long, its middle left out: its beginning and its end tell most."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2 - 2]}...{text[-(longest - longest // 2 - 1) :]}"


def placed(points: Sequence[tuple[Place, str]], frame: Box, lines: Sequence[tuple[Box, int]] = ()) -> list[Label]:
    """Return a place for the name of each point; of those there is no room for, none.

    Args:
        points: the place and the name of each; the first comes first, then those in a crowd.
        frame: what all names have to lie in.
        lines: what they had better not lie on, and how bad that were; a place a step further off is 40 worse.
    """
    taken: list[Box] = []
    kept = [Box(x - POINT, y - POINT, x + POINT, y + POINT) for (x, y), _ in points]
    found = []
    crowds = [sum(math.dist(place, other) < NEAR for other, _ in points) for place, _ in points]
    order = sorted(range(len(points)), key=lambda at: (at > 0, -crowds[at]))
    for point, text in (points[at] for at in order):
        best: tuple[float, Label] | None = None
        for far, distance in enumerate(DISTANCES):
            for near, direction in enumerate(DIRECTIONS):
                label = _at(point, text, direction, distance)
                box = label.box
                inside = frame.holds((box.left, box.top)) and frame.holds((box.right, box.bottom))
                if not inside or any(map(box.meets, taken)) or any(map(box.meets, kept)):
                    continue
                if far and _crosses(point, box, taken):
                    continue
                cost = 40 * far + near + sum(weight for line, weight in lines if box.meets(line))
                if best is None or cost < best[0]:
                    best = cost, label
            if best is not None and best[0] < 40 * (far + 1):
                break
        if best is not None:
            found.append(best[1])
            taken.append(best[1].box)
            kept += [] if best[1].is_near else [Box(x - 2, y - 2, x + 2, y + 2) for x, y in _along(point, best[1].box)]
    return found


def _at(point: Place, text: str, direction: tuple[int, int], distance: int) -> Label:
    """Return a name in a direction from its point."""
    wide, (x, y) = width_of(text), point
    across = distance if 0 in direction else distance * math.sqrt(0.5)
    middle_x, middle_y = x + direction[0] * across, y + direction[1] * across
    left = middle_x - wide / 2 if direction[0] == 0 else middle_x if direction[0] > 0 else middle_x - wide
    top = middle_y - SIZE * 0.65
    if direction[0] == 0:
        top += direction[1] * SIZE * 0.4
    box = Box(left - 2, top, left + wide + 2, top + SIZE * 1.3)
    place = (round(left, 2), round(top + SIZE, 2))
    return Label(text, place, box, point, distance == DISTANCES[0])


def _crosses(point: Place, box: Box, taken: Sequence[Box]) -> bool:
    """Return whether the line from a point to its name runs through another name."""
    return any(other.holds(place) for other in taken for place in _along(point, box))


def _along(point: Place, box: Box) -> list[Place]:
    """Return places on the line from a point to its name."""
    (x, y), (end_x, end_y) = point, nearest(point, box)
    return [(x + (end_x - x) * at / 8, y + (end_y - y) * at / 8) for at in range(1, 9)]


def nearest(point: Place, box: Box) -> Place:
    """Return the place of a box that is nearest to a point."""
    return (round(min(max(point[0], box.left), box.right), 2), round(min(max(point[1], box.top), box.bottom), 2))
