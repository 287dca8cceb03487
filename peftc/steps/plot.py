"""Pictures, drawn with matplotlib where it is installed (``pip install 'peftc[report]'``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.errors import UsageError
from peftc.report import grouped


def draw_spectra(
    values: Mapping[str, Sequence[float]], rows: Sequence[Mapping[str, Any]], path: Path, title: str
) -> None:
    """Draw one small multiple per module kind: normalised singular values against the share of the full rank.

    Args:
        values: module -> singular values, descending.
        rows: figures per module, as `analyze` reports them.
        path: ``.png`` or ``.svg``.
        title: of the picture.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib", hint="`pip install 'peftc[report]'`") from None
    figures = {row["name"]: row for row in rows}
    kinds = grouped(values)
    columns = min(4, len(kinds)) or 1
    lines = math.ceil(len(kinds) / columns)
    with matplotlib.rc_context({"svg.hashsalt": "peftc", "font.size": 8, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(3.1 * columns, 2.5 * lines + 0.6), layout="constrained")
        grid: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (kind, names) in zip(grid.flat, kinds.items(), strict=False):
            _draw_kind(axes, kind, names, values, figures)
        for axes in list(grid.flat)[len(kinds) :]:
            axes.set_visible(False)
        figure.suptitle(
            f"{title}: singular values by module kind (dark = early, bright = late; dots: 90 % and 99 % energy)"
        )
        figure.supxlabel("share of the full rank")
        figure.supylabel("singular value / largest")
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_kind(
    axes: Any,
    kind: str,
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    figures: Mapping[str, Mapping[str, Any]],
) -> None:
    from matplotlib import colormaps

    for at, name in enumerate(names):
        spectrum = values[name]
        if not spectrum or not spectrum[0]:
            continue
        shade = colormaps["viridis"](0.9 * at / max(len(names) - 1, 1))
        share = [(index + 1) / len(spectrum) for index in range(len(spectrum))]
        axes.plot(share, [value / spectrum[0] for value in spectrum], color=shade, linewidth=1)
        for level in (90, 99):
            rank = max(figures[name][f"rank_{level}"], 1)
            axes.plot(rank / len(spectrum), spectrum[rank - 1] / spectrum[0], ".", color=shade, markersize=4)
    row = figures[names[0]]
    limit = row["break_even_rank"] / row["max_rank"]
    if limit < 1:
        axes.axvline(limit, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            "break-even",
            (limit, 0.97),
            fontsize=6,
            color="0.4",
            ha="right",
            va="top",
            rotation=90,
            xycoords=("data", "axes fraction"),
        )
    short = kind if len(kind) <= 34 else f"...{kind[-31:]}"
    axes.set_title(f"{short}  ({len(names)}x, {'x'.join(map(str, row['shape']))})", fontsize=7.5)
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.3)
    axes.set_xlim(0, 1.02)
    axes.grid(alpha=0.25, linewidth=0.5)
