"""From a budget to ranks: predicted, corrected by what was measured, or timed; and what to say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from peftc import processes
from peftc.calibration import memory
from peftc.calibration.prepared import Prepared
from peftc.calibration.statistics import Statistics
from peftc.factors import estimate, factoring, ordered, prediction, tables
from peftc.factors import joint as joining
from peftc.factors import sensitivity as measuring
from peftc.factors import sequential as in_order
from peftc.factors.decision import Decision, Input
from peftc.factors.factoring import Factoring
from peftc.factors.prediction import Held
from peftc.factors.ranks import Losses, needs_spectra
from peftc.factors.speedup import Aim, timed
from peftc.plans.plan import Budget, Plan
from peftc.report import Report
from peftc.store import artifact
from peftc.store.job import Job

KEPT = "speedup.json"


def decide(
    work: Factoring,
    budget: Budget,
    allocation: str,
    multiple: int,
    given: Input,
    known: Mapping[str, Losses] | None = None,
) -> Decision:
    """Decide the ranks under a budget; those for a speed-up are kept with the job, so that a resume measures nothing.

    Args:
        work: the eligible modules.
        budget, allocation, multiple: as the options say.
        given: what a speed-up is timed on.
        known: spectra that need not be computed again.

    Raises:
        PlanError: the budget is out of reach, or the model cannot be timed.
    """
    if budget.kind != "speedup":
        return Decision(work.decide(budget, allocation, known, multiple))
    kept = None if work.job is None else work.job.work / KEPT
    if kept is not None and kept.is_file():
        there = json.loads(kept.read_text(encoding="utf-8"))
        return Decision(there["ranks"], there["slow"], there["figures"])
    found = timed(work, Aim(budget, allocation, multiple, given), known or {})
    if kept is not None:
        unfinished = kept.with_suffix(".tmp")
        artifact.write_bytes(unfinished, json.dumps(asdict(found)).encode())
        unfinished.replace(kept)
    return found


@dataclass(frozen=True)
class Question:
    """What is to be decided: the ranks of the eligible modules, and what to say of them."""

    work: Factoring
    reasons: dict[str, str]
    budget: Budget | None
    allocation: str
    multiple: int
    plan: Plan | None
    keep_all_ranks: bool
    source: Prepared | Statistics | None
    timed: Input
    words: tuple[str, str]
    sensitivity: int
    sequential: bool

    def decide(self, folder: Path) -> Decision:
        """Collect statistics where they are needed, in ``folder``, and decide the ranks."""
        if self.source is not None:
            work, needs = self.work, self.work.factorize.needs
            planned = self.plan is not None
            known = joining.calibrated(work.model, work.targets, self.source, needs, folder, planned=planned)
            work.use(known, self.reasons)
            if work.model.max_memory is not None:
                memory.return_freed()
        if self.budget is not None and needs_spectra(self.budget, self.allocation):
            self.work.share_spectra()
        return processes.agreed(lambda: self._tried(self._decide(folder), folder))

    def _decide(self, folder: Path) -> Decision:
        budget = self.budget
        if budget is None:
            return Decision(joining.gathered(self.plan).ranks if self.plan else {})
        if (
            self.sensitivity
            and isinstance(self.source, Prepared)
            and measuring.is_of_use(self.work, budget, self.allocation)
        ):
            return self._measured(self.source, budget, folder)
        return self._found(budget, self.work.losses)

    def _found(self, budget: Budget, losses: Mapping[str, Tensor]) -> Decision:
        known = {name: Held(each) for name, each in losses.items()}
        return decide(self.work, budget, self.allocation, self.multiple, self.timed, known)

    def _measured(self, source: Prepared, budget: Budget, folder: Path) -> Decision:
        """Decide by the predicted losses, by the measured ones, and in between; take what loses least as a whole."""
        each = measuring.measured(self.work, source, self.sensitivity, folder)
        found: list[tuple[dict[str, Tensor], Decision]] = []
        several = budget.kind != "speedup" and measuring.fits(self.work)  # a speed-up would be timed again
        for share in measuring.SHARES if several else (1.0,):
            losses = {name: loss * scale**share for name, (loss, scale) in each.items()}
            decision = self._found(budget, losses)
            found.append((losses, self._tried(decision, folder) if several else decision))
        losses, decision = min(found, key=lambda one: one[1].lost.value if one[1].lost else 0.0)
        self.work.losses |= losses
        return decision

    def _tried(self, found: Decision, folder: Path) -> Decision:
        """Measure what ranks lose as a whole, on a few samples kept apart, where that was not done yet."""
        source, work = self.source, self.work
        known = found.lost is not None or not any(found.ranks.values())
        if known or not (self.sensitivity and isinstance(source, Prepared) and measuring.is_in_nats(work)):
            return found
        if not measuring.fits(work):
            return found
        return replace(found, lost=measuring.whole(work, source, found.ranks, self._tried_on, folder))

    @property
    def _tried_on(self) -> int:
        """How many samples a plan is tried on."""
        many = measuring.WHOLE * self.sensitivity
        return measuring.number(self.source, many) if isinstance(self.source, Prepared) else 0

    def factor(self, found: Decision) -> dict[str, dict[str, Any]]:
        """Compute and keep the factors at the decided ranks."""
        source = self.source
        if self.sequential and isinstance(source, Prepared):
            return processes.agreed(lambda: in_order.factor(self.work, source, found.ranks))
        return self.work.factor(found.ranks)

    def carry_out(self, job: Job, base: dict[str, Any], request: dict[str, Any], shard_bytes: int) -> Report:
        """Decide, factor, write and verify."""
        work, found = self.work, self.decide(job.work)
        if self.keep_all_ranks:
            return ordered.keep_all(work, base, request, self.reasons, max_shard_bytes=shard_bytes)
        plan = work.plan(found.ranks, self.reasons | found.slow, work.factorize.name, str(self.budget))
        request = found.settle(job, work.model, base, request, plan)
        report = self.report(found, self.factor(found))
        factoring.carry_out(report, work, found.ranks, base, request, self.budget, max_shard_bytes=shard_bytes)
        return report

    def rehearse(self, folder: Path) -> Report:
        """Say what would become of every module, and about what that would take."""
        if self.sensitivity and isinstance(self.source, Prepared):
            self.work.keep_bases(folder)
        report = self.report(self.decide(folder), {})
        estimate.add(report, self.work, self.source)
        return report

    def report(self, found: Decision, cuts: Mapping[str, Any]) -> Report:
        """Say what becomes of every module."""
        if self.keep_all_ranks:
            return ordered.report_on(self.work, cuts, self.reasons)
        reasons = self.reasons | found.slow
        report = tables.report_on("decompose", self.work, found.ranks, cuts, reasons, *self.words)
        known = {} if self.work.losses else cuts
        prediction.add(report, self.work, found.ranks, known, found.lost, self._tried_on)
        return found.say(report)
