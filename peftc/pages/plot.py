"""Pictures, drawn with matplotlib where it is installed (``pip install 'peftc[report]'``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftc.errors import UsageError
from peftc.report import grouped


def draw_spectra(
    values: Mapping[str, Sequence[float]],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    title: str,
    curve: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
) -> None:
    """Draw one small multiple per module kind: normalised singular values against the share of the full rank.

    Below them, predicted loss against parameters and against multiply-adds.

    Args:
        values: module -> singular values, descending.
        rows: figures per module, as `analyze` reports them.
        path: ``.png`` or ``.svg``.
        title: of the picture.
        curve: predicted losses, as `analyze` reports them; None draws none.
        plan: the plan to mark on the curve, if any.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figures = {row["name"]: row for row in rows}
    kinds = grouped(values)
    columns = min(4, len(kinds)) or 1
    lines = math.ceil(len(kinds) / columns)
    heights = [2.5 * lines + 0.6, *([3.4] if curve and curve["points"] else [])]
    with drawing(path, max(3.1 * columns, 7.0), heights) as parts:
        grid: Any = parts[0].subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (kind, names) in zip(grid.flat, kinds.items(), strict=False):
            _draw_kind(axes, kind, names, values, figures)
        for axes in list(grid.flat)[len(kinds) :]:
            axes.set_visible(False)
        parts[0].suptitle(
            f"{title}: singular values by module kind (dark = early, bright = late; dots: 90 % and 99 % energy)"
        )
        parts[0].supxlabel("share of the full rank")
        parts[0].supylabel("singular value / largest")
        if curve and curve["points"]:
            _draw_curve(parts[1], curve, plan)


@contextmanager
def drawing(path: Path, width: float, heights: Sequence[float]) -> Iterator[Any]:
    """Yield the parts of a picture, one below the other, and write it; sizes are inches.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib", hint="`pip install 'peftc[report]'`") from None
    with matplotlib.rc_context({"svg.hashsalt": "peftc", "font.size": 8, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        yield figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)


def refuse_unwritable(option: str, path: str | Path | None) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        UsageError: its folder is not there, or no picture ends like it.
    """
    if path is not None and not Path(path).parent.is_dir():
        raise UsageError(f"`{option} {path}` cannot be written", why=f"there is no folder `{Path(path).parent}`")
    if option == "--plot" and path is not None and Path(path).suffix not in (".png", ".svg"):
        raise UsageError(f"`--plot {path}` has no known ending", why="a picture is drawn as `.png` or `.svg`")


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


def _draw_curve(part: Any, curve: Mapping[str, Any], plan: Mapping[str, Any] | None) -> None:
    """Draw predicted loss, on a logarithmic scale, against both sizes; what loses nothing is left out."""
    points = [one for one in curve["points"] if one["predicted"] > 0]
    sizes = [("parameters", "parameters of the model"), ("macs", "multiply-adds of one sample")]
    sizes = [(key, label) for key, label in sizes if curve["points"][0][key] is not None]
    for axes, (key, label) in zip(part.subplots(1, len(sizes), squeeze=False, sharey=True).flat, sizes, strict=True):
        axes.plot([one[key] for one in points], [one["predicted"] for one in points], "o-", markersize=4, linewidth=1.2)
        for one in points:
            axes.annotate(
                f"{one['ratio']:g}", (one[key], one["predicted"]), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
        if plan is not None and key == "parameters" and plan.get("predicted"):
            axes.plot(plan["parameters"], plan["predicted"], "D", color="C3", markersize=6, zorder=0)
            axes.annotate(
                "plan",
                (plan["parameters"], plan["predicted"]),
                xytext=(-6, -10),
                textcoords="offset points",
                fontsize=7,
                color="C3",
                ha="right",
            )
        dense = curve["points"][-1][key]
        axes.axvline(dense, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            "dense",
            (dense, 0.97),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=6,
            color="0.4",
            ha="right",
            va="top",
        )
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.margins(0.08, 0.1)
        axes.xaxis.set_major_formatter(_scaled())
        axes.grid(alpha=0.25, linewidth=0.5, which="both")
    part.supylabel(curve["unit"])
    how = f"{curve['method']}, {curve['allocation']}"
    part.suptitle(f"predicted loss against size ({how}; at each point the ratio of eligible weights kept)")


def _scaled() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep=" ")
