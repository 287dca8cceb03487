"""What was decided, and for which inputs it was timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftc.measure.intervals import Interval
from peftc.models import write
from peftc.models.model import Model
from peftc.plans.plan import Plan
from peftc.report import Report, Table, rank_text
from peftc.store.job import Job

NOISY = 1.05  # a noise band that reaches further leaves the last digits open


CLOCK = ("timed", "rank_multiple")  # of a request, what only says how its ranks were found


@dataclass(frozen=True)
class Input:
    """What the model is timed on.

    Attributes:
        batch_size: samples at once; 16 when None.
        image_size, max_length: of a sample, in pixels and tokens; the model's own when None.
        device: where, as `--device` says it.
        seed: of the random sample.
    """

    batch_size: int | None
    image_size: int | None
    max_length: int | None
    device: str
    seed: int


@dataclass(frozen=True)
class Decision:
    """The rank of every eligible module, and what was measured of them.

    Attributes:
        ranks: None is dense.
        slow: module -> why it stays dense, for those whose factors are not faster.
        figures: for a speed-up what was measured, JSON-ready; empty where nothing was.
        lost: divergence from the dense model in nats, with all modules at these ranks; None where it was
            not measured.
    """

    ranks: dict[str, int | None]
    slow: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    lost: Interval | None = None

    def settle(
        self, job: Job, model: Model, base: Mapping[str, Any], request: dict[str, Any], plan: Plan
    ) -> dict[str, Any]:
        """Return the request to be recorded: for a plan, where ranks were measured, else ``request`` itself.

        So the same command line may end in other ranks on another day, but what an artifact records always ends in it.
        """
        if not self.figures:
            return request
        kept = {key: value for key, value in request.items() if key not in CLOCK}
        return write.settle(job, model, base, {**kept, "budget": None, "allocation": None, "plan": plan.to_json()})

    def say(self, report: Report) -> Report:
        """Add what was measured to a report."""
        if not self.figures:
            return report
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
        return report


def _table(shapes: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for row in shapes:
        kinds, some = row["modules"], list(zip(row["ranks"], row["seconds"], strict=True))
        others = f" and {len(kinds) - 1} like it" if len(kinds) > 1 else ""
        lines.append(
            [
                kinds[0] + others,
                row["count"],
                "x".join(map(str, row["input"])),
                f"{1000 * row['dense_seconds']:.3g}",
                ", ".join(
                    f"{1000 * seconds:.3g} at {rank_text(rank)}" for rank, seconds in some[:: len(some) // 4 or 1]
                ),
                "none" if row["faster_to_rank"] is None else rank_text(row["faster_to_rank"]),
            ]
        )
    return Table("timed shapes", ["module", "calls", "input", "dense, ms", "ms at rank", "faster to rank"], lines)
