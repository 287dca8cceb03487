"""The t-SNE maps that layers were scored by, as an artifact keeps them for people to look at: no torch, no numpy.

A map may hold thousands of points. Kept are some of them, the same samples in every layer and rounded to a grid finer
than a picture shows, so that twelve layers take about 30 kB.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftc.store import artifact

FILE = "maps.json"
POINTS = 300  # of each layer
GRID = 999  # steps along each axis


@dataclass(frozen=True)
class Maps:
    """What is kept of the maps of all layers."""

    samples: int  # so many were scored
    classes: list[str]  # the names of those that the kept samples are of
    labels: list[int]  # of each kept sample, the place of its class in ``classes``
    points: dict[str, list[tuple[float, float]]]  # layer -> (x, y) of each kept sample, in [0, 1]


def write(folder: Path, maps: Mapping[str, Any], labels: Sequence[int], classes: Sequence[str] | None) -> None:
    """Write what is kept of maps.

    Args:
        folder: of the artifact to be.
        maps: layer -> (n, 2), in [0, 1].
        labels: (n,), the class of each sample.
        classes: their names, by number.
    """
    kept = list(range(len(labels)))
    random.Random(0).shuffle(kept)
    kept = kept[:POINTS]
    there = sorted({int(labels[at]) for at in kept})
    content = {
        "samples": len(labels),
        "classes": [str(classes[each]) if classes and each < len(classes) else str(each) for each in there],
        "labels": [there.index(int(labels[at])) for at in kept],
        "maps": {
            name: [[round(float(points[at][axis]) * GRID) for at in kept] for axis in (0, 1)]
            for name, points in maps.items()
        },
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    artifact.write_bytes(folder / FILE, f"{text}\n".encode())


def read(folder: Path) -> Maps | None:
    """Return the maps that an artifact keeps; None where it keeps none, or they are damaged."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        classes = [str(name) for name in found["classes"]]
        labels = [int(label) for label in found["labels"]]
        points = {  # as many of each axis as there are samples
            str(name): [(_share(x), _share(y)) for x, y, _ in zip(*axes, labels, strict=True)]
            for name, axes in found["maps"].items()
        }
        if not labels or not all(0 <= label < len(classes) for label in labels):
            return None
        return Maps(int(found["samples"]), classes, labels, points)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return None


def _share(value: Any) -> float:
    return min(max(int(value), 0), GRID) / GRID
