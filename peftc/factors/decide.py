"""From a question to ranks, predicted, corrected by what was measured, or timed; and from ranks to what is written."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftc import processes
from peftc.calibration.collection import Statistics
from peftc.calibration.prepared import Prepared
from peftc.errors import PlanError
from peftc.factors import estimate, joint, ordered, prediction, search, sensitivity, sequential, tables
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import Decision
from peftc.factors.speedup import tell_timed, timed
from peftc.factors.trial import Trial, trial_of
from peftc.models import write
from peftc.models.targets import spared
from peftc.plans.plan import Aim, Plan
from peftc.report import Report
from peftc.store import artifact

KEPT = "speedup.json"
CLOCK = ("timed", "rank_multiple")  # of a request, what only says how its ranks were found


@dataclass(frozen=True)
class Question:
    """What was asked of a decomposition."""

    aim: Aim | None  # the budget; None where a plan says the ranks, or all are kept
    plan: Plan | None  # ranks decided before
    source: Prepared | Statistics | None  # of statistics
    words: tuple[str, str]  # what was asked, and why a module stays dense under it
    sensitivity: int = 0  # samples for each measurement of what modules lose; 0 trusts the prediction
    is_sequential: bool = False  # fit each module on what those before it, already factored, produce
    keeps_all: bool = False  # store the factors of every rank


def decide(work: Factoring, asked: Question, folder: Path) -> Decision:
    """Collect statistics in ``folder``, where they are needed, and decide the ranks; PlanError where none would do."""
    if asked.source is not None:
        work.calibrate(asked.source, folder, planned=asked.plan is not None)
    if asked.aim is not None and asked.aim.needs_spectra:
        work.share_spectra()
    trial = trial_of(work, asked.source, asked.sensitivity, folder)
    return processes.agreed(lambda: _tried(_decided(work, asked, trial), trial))


@contextmanager
def _naming_more(work: Factoring, aim: Aim) -> Iterator[None]:
    """Add to the refusal of a number of parameters which modules could be factored as well."""
    try:
        yield
    except PlanError as error:
        more = spared(work.model, work.reasons) if aim.budget.kind == "target-params" else []
        if more:
            listed = " ".join(f"--include {name}" for name in more)
            these = f"the largest that were not eligible: `{listed}`; `--data DATA` measures what that costs"
            error.hint = "; ".join(filter(None, (error.hint, these)))
        raise


def _decided(work: Factoring, asked: Question, trial: Trial | None) -> Decision:
    aim = asked.aim
    if aim is None:
        return Decision(joint.gathered(asked.plan).ranks if asked.plan else {})
    if trial is None or not aim.needs_spectra or aim.budget.kind == "energy":
        return ranked(work, aim)
    if aim.budget.kind != "speedup" and trial.fits:  # a speed-up would be timed again for every plan
        with _naming_more(work, aim):
            return search.best(trial, aim)
    work.losses = dict(search.corrected(sensitivity.alone(trial), 1.0))
    return ranked(work, aim)


def _tried(found: Decision, trial: Trial | None) -> Decision:
    """Measure what ranks lose as a whole, on a few samples kept apart, where that was not done yet."""
    if trial is None or found.lost is not None or not any(found.ranks.values()) or not trial.fits:
        return found
    tried = trial.on(trial.samples, trial.folder / f"whole-{trial.samples}")
    return replace(found, lost=search.interval(trial.lost(found.ranks, tried), trial), samples=trial.samples)


def ranked(work: Factoring, aim: Aim) -> Decision:
    """Return the ranks under a budget, those for a speed-up kept for a resume; PlanError where it is out of reach."""
    if aim.budget.kind != "speedup":
        with _naming_more(work, aim):
            return Decision(work.decide(aim))
    kept = None if work.job is None else work.job.work / KEPT
    if kept is not None and kept.is_file():
        found = Decision(**json.loads(kept.read_text(encoding="utf-8")))
    else:
        found = timed(work, aim)
        if kept is not None:
            artifact.write_bytes(kept, json.dumps(asdict(found)).encode())
    work.reasons |= found.slow
    return found


def carry_out(work: Factoring, asked: Question, base: dict[str, Any], request: dict[str, Any]) -> Report:
    """Decide, factor with the job of ``work``, write and verify; the manifest records ``base`` and ``request``."""
    job = work.job
    assert job is not None
    found = decide(work, asked, job.work)
    if asked.keeps_all:
        return ordered.keep_all(work, base, request)
    if found.figures and asked.aim is not None:
        # the same command line may end in other ranks on another day, but what an artifact records always ends in it
        plan = work.plan(found.ranks, str(asked.aim.budget)).to_json()
        kept = {key: value for key, value in request.items() if key not in CLOCK}
        request = write.settle(job, work.model, base, {**kept, "budget": None, "allocation": None, "plan": plan})
    source = asked.source
    if asked.is_sequential and isinstance(source, Prepared):
        cuts = processes.agreed(lambda: sequential.factor(work, source, found.ranks))
    else:
        cuts = work.factor(found.ranks)
    report = _report(work, asked, found, cuts)
    work.write(report, found.ranks, base, request)
    return report


def rehearse(work: Factoring, asked: Question) -> Report:
    """Say what would become of every module, and about what that would take; nothing stays on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        place, start = Path(processes.agreed(lambda: folder)), time.monotonic()
        if asked.sensitivity and isinstance(asked.source, Prepared):
            work.keep_bases(place)
        found = decide(work, asked, place)
        decided = time.monotonic() - start
        report = _report(work, asked, found, {})
    estimate.add(report, work, asked.source, decided)
    report.notes.append("dry run: nothing was written")
    return report


def _report(work: Factoring, asked: Question, found: Decision, cuts: Mapping[str, Any]) -> Report:
    if asked.keeps_all:
        return ordered.report_on(work, cuts)
    report = tables.report_on("decompose", work, found.ranks, cuts, asked.words)
    prediction.add(report, work, found, {} if work.losses else cuts)
    tell_timed(report, found)
    return report
