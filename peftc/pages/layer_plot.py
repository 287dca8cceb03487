"""The picture of a pruning: scores against depth, and the map of every layer that they are taken of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.pages.plot import drawing

if TYPE_CHECKING:
    import numpy as np

NAMED = 20  # classes at most have names beside the maps
KEPT, DROPPED = "C0", "C3"


def draw_scores(
    data: Mapping[str, Any],
    path: Path,
    title: str,
    maps: Mapping[str, np.ndarray] | None = None,
    labels: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Draw the scores of layers against depth with the threshold, and below them the maps, coloured by class.

    Args:
        data: as `prune-layers` reports it.
        path: ``.png`` or ``.svg``.
        title: of the picture.
        maps: layer -> (n, 2), in running order; None or empty draws none.
        labels: (n,), the class of each sample.
        classes: their names, by number.

    Raises:
        UsageError: matplotlib is not installed.
    """
    rows = data["layers"]
    columns = _columns(len(rows))
    lines = math.ceil(len(rows) / columns) if maps else 0
    width = max(5.0, 1.45 * columns) if maps else max(5.0, 0.22 * len(rows) + 1.5)
    with drawing(path, width, [3.0, 1.62 * lines + 0.5] if maps else [3.0]) as parts:
        _draw_curve(parts[0].subplots(), data, title)
        if maps and labels is not None:
            _draw_maps(parts[1], rows, maps, labels, classes, lines, columns)


def _columns(layers: int) -> int:
    return layers if layers <= 6 else 6 if layers <= 18 else 8


def _draw_curve(axes: Any, data: Mapping[str, Any], title: str) -> None:
    rows = [row for row in data["layers"] if row["score"] is not None]
    axes.plot([row["number"] for row in rows], [row["score"] for row in rows], color="0.7", linewidth=1, zorder=1)
    for kept, color, word in ((True, KEPT, "kept"), (False, DROPPED, "dropped")):
        some = [row for row in rows if row["kept"] is kept]
        if some:
            axes.plot([r["number"] for r in some], [r["score"] for r in some], "o", color=color, label=word)
    doubtful = [row for row in rows if row["close"]]
    if doubtful:
        numbers, scores = [row["number"] for row in doubtful], [row["score"] for row in doubtful]
        axes.plot(numbers, scores, "o", markersize=10, markerfacecolor="none", color="0.2", label="within the noise")
    if data["threshold"] is not None:
        label = f"threshold (alpha {data['alpha']:g})"
        axes.axhline(data["threshold"], color="0.3", linewidth=0.8, linestyle=":", label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel(data["score"])
    axes.set_title(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend()


def _draw_maps(
    part: Any,
    rows: Sequence[Mapping[str, Any]],
    maps: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: Sequence[str] | None,
    lines: int,
    columns: int,
) -> None:
    """Draw one map per layer, its number and score above it; those of dropped layers in the colour of dropped ones."""
    import numpy as np

    there = np.unique(labels)
    colors = _colors(len(there))[np.searchsorted(there, labels)]
    order = np.random.default_rng(0).permutation(len(labels))  # so that no class hides the others
    grid: Any = part.subplots(lines, columns, squeeze=False)
    size = min(6.0, 1500 / len(labels))
    for axes, row in zip(grid.flat, rows, strict=False):
        points = maps[row["name"]]
        axes.scatter(*points[order].T, s=size, c=colors[order], linewidths=0, rasterized=True)
        word = "" if row["kept"] else " dropped"
        axes.set_title(
            f"{row['number']}: {row['score']:.2f}{word}", fontsize=7.5, color="k" if row["kept"] else DROPPED
        )
        axes.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        for side in axes.spines.values():
            side.set(color="0.7" if row["kept"] else DROPPED, linewidth=0.6)
    for axes in list(grid.flat)[len(rows) :]:
        axes.set_visible(False)
    part.suptitle(f"t-SNE maps of {len(labels):,} samples after each layer, coloured by class; above each its score")
    if len(there) <= NAMED:
        names = [str(classes[int(at)]) if classes and int(at) < len(classes) else str(int(at)) for at in there]
        dots = [part.axes[0].plot([], [], "o", color=tuple(c), markersize=4)[0] for c in _colors(len(there))]
        short = [name if len(name) <= 18 else f"{name[:15]}..." for name in names]
        part.legend(dots, short, loc="outside lower center", ncols=min(len(there), 10), fontsize=6.5, frameon=False)


def _colors(number: int) -> np.ndarray:
    """Return (number, 4): colours for classes, told apart as well as so many can be."""
    import numpy as np
    from matplotlib import colormaps

    if number <= NAMED:
        return np.asarray(colormaps["tab10" if number <= 10 else "tab20"](np.arange(number)))
    return np.asarray(colormaps["turbo"](np.linspace(0, 1, number)))
