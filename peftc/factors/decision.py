"""What was decided, and what was measured of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftc.measure.intervals import Interval
from peftc.report import Report, Table

NOISY = 1.05  # a noise band that reaches further leaves the last digits open


@dataclass(frozen=True)
class Decision:
    """The rank of every eligible module, and what was measured of them.

    Attributes:
        ranks: None is dense.
        slow: module -> why it stays dense, for those whose factors are not faster.
        figures: for a speed-up what was measured, JSON-ready; empty where nothing was.
        lost: divergence from the dense model in nats, with all modules at these ranks; None where it was
            not measured.
        samples: kept apart from calibration, on which it was.
    """

    ranks: dict[str, int | None]
    slow: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    lost: Interval | None = None
    samples: int = 0

    def say(self, report: Report) -> None:
        """Add what was timed to a report."""
        if not self.figures:
            return
        found = report.data["speedup"] = self.figures
        for row in report.data["modules"]:
            row["reason"] = self.slow.get(row["name"], row["reason"])
        report.tables.insert(0, _table(found["shapes"]))
        noise = f"noise {found['noise_low']:.3f} to {found['noise_high']:.3f}"
        report.notes.append(
            f"measured {found['value']:.3f}x ({found['low']:.3f} to {found['high']:.3f}; {noise}) where "
            f"{found['asked']:g}x was asked: batches of {found['batch_size']}, {found['rounds']} rounds on "
            f"{found['device']}, threads: {found['threads']}; {found['tries']} plans were measured"
        )
        if found["noise_high"] > NOISY:
            report.warnings.append(f"this machine is busy ({noise}): measure again with `peftc bench`")


def _table(shapes: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for row in shapes:
        kinds, some = row["modules"], list(zip(row["ranks"], row["seconds"], strict=True))
        others = f" and {len(kinds) - 1} like it" if len(kinds) > 1 else ""
        timed = ", ".join(f"{1000 * seconds:.3g} at {rank}" for rank, seconds in some[:: len(some) // 4 or 1])
        dense, largest = f"{1000 * row['dense_seconds']:.3g}", row["faster_to_rank"]
        last = "none" if largest is None else str(largest)
        lines.append([kinds[0] + others, row["count"], "x".join(map(str, row["input"])), dense, timed, last])
    return Table("timed shapes", ["module", "calls", "input", "dense, ms", "ms at rank", "faster to rank"], lines)
