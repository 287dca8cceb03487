"""Samples > a score per layer > Decision, and the evidence beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftc.errors import PlanError
from peftc.measure.intervals import Interval
from peftc.models import layers
from peftc.models.inputs import outputs, probe
from peftc.models.model import Model
from peftc.plans import depth
from peftc.plans.depth import Decision
from peftc.pruning import closing, evidence, losses
from peftc.pruning.asked import Work
from peftc.pruning.evidence import Choice
from peftc.pruning.losses import Removal, Trial
from peftc.pruning.scores import Score, Seen, scored, see
from peftc.pruning.shorter import shorter_of
from peftc.report import Cell, Report, Table


def choose(work: Work, report: Report) -> Choice:
    """Score the layers and decide which stay."""
    number, asked = len(work.names), work.asked
    if asked.keep is not None and asked.keep > number:
        raise PlanError(f"`--keep` is {asked.keep}", why=f"`{work.stored.name}` has {number} layers")
    fixed = _changing(work.runs, work.names)
    if work.score is None:
        return Choice(_with_fixed(work, depth.without(asked.drop, number), fixed, report), fixed)
    seen = _seen(work, report)
    trial, within = _trial(work, report), asked.within_drop
    found: list[float]
    gone: list[Removal] = []
    if work.score.is_measured:
        assert trial is not None
        keep = 1 if within is not None else asked.keep or number
        found, gone = losses.greedy(trial, work.names, fixed, keep=keep, within=within)
    else:
        found = scored(work.runs, work.names, work.score, seen)
        if within is not None and trial is not None:
            order = depth.worst_first(found, fixed, of_depth=work.score.is_of_depth)
            stay = _proposed(work, found, work.score)
            gone = losses.in_order(trial, work.names, [at for at in order if at not in stay.kept], within)
    decision = _with_fixed(work, _decision(work, found, work.score, fixed, gone), fixed, report)
    choice = Choice(decision, fixed, found, seen, gone)
    if trial is not None:
        choice.measured = _measured(work, trial, gone)

    def decide(scores: Sequence[float], score: Score) -> Decision:
        return _decision(work, scores, score, fixed, gone).with_(fixed)

    if not asked.drop:
        evidence.gather(work, choice, work.score, decide)
    return choice


def _seen(work: Work, report: Report) -> Seen | None:
    """Run the samples through the model once, where they are asked for."""
    if work.given is None or work.score is None or not work.score.reads_data:
        return None
    number, size = len(work.given.train), work.samples_at_once
    seen = see(work.runs, work.given, work.names, size)
    report.data |= {"samples": number, "pooling": seen.pooling}
    if not work.score.is_measured:
        report.notes.append(f"scored by {work.score.word} on {number} samples, {seen.pooling}")
    if "gradient_products" in work.score.needs:
        for name, products in losses.gradient_products(work.runs, work.given, work.names, size).items():
            seen.add(name, gradient_products=products)
    return seen


def _trial(work: Work, report: Report) -> Trial | None:
    """Return what quality is measured on, where that decides."""
    decides = work.asked.within_drop is not None
    if work.given is None or work.score is None or not (work.score.is_measured or decides):
        return None
    closes = decides and work.repair is not False
    held, about = losses.measured_on(work.given, scored_on_the_rest=closes or not work.score.is_measured)
    if held.encoded is work.given.train.encoded and len(held) > len(work.given.held or ()):
        report.notes = [note for note in report.notes if not note.startswith("held out:")]
    report.notes.append(f"measured without layers on {about}")

    def repaired(dropped: Sequence[str]) -> Model:
        kept = [name for name in work.names if name not in dropped]
        unseen = Report("prune-layers")  # what there is to say is said of those that go in the end
        return closing.close_gaps(work, shorter_of(work, kept, unseen), unseen)

    return Trial(work.runs, work.given, held, work.samples_at_once, repaired if closes else None, work.seed)


def _measured(work: Work, trial: Trial, gone: Sequence[Removal]) -> dict[str, Any]:
    """Return what was measured: of the metric before and after, of each layer that went, and of the one too many."""
    task, allowed = trial.given.task, work.asked.within_drop
    metric = task.metrics[0] if task else None
    whole = trial.quality if allowed is not None else None

    def told(each: Removal) -> dict[str, Any]:
        cost = each.cost
        row: dict[str, Any] = {"name": work.names[each.layer], "rise": each.rise, "quality": None, "cost": None}
        if cost is not None and math.isfinite(cost.value) and whole is not None and metric is not None:
            row["quality"] = whole - cost.value if metric.higher_is_better else whole + cost.value
            row["cost"] = cost._asdict()
        return row

    removals = [told(each) for each in gone]
    found: dict[str, Any] = {"samples": len(trial.held), "passes": trial.tried, "removals": removals}
    if allowed is not None and metric is not None:
        stopped = None if trial.stopped is None else told(trial.stopped)
        found |= {"metric": metric.name, "within_drop": allowed, "before": whole, "stopped": stopped}
        found |= {"after": removals[-1]["quality"] if removals else whole, "repaired": trial.repaired is not None}
    return found


def _decision(
    work: Work, found: Sequence[float], score: Score, fixed: Sequence[int], gone: Sequence[Removal]
) -> Decision:
    number, asked = len(work.names), work.asked
    if asked.drop:
        return depth.without(asked.drop, number)
    proposed = _proposed(work, found, score)
    if asked.within_drop is not None:  # of those that may go, some cost too much
        went = {each.layer for each in gone}
        return replace(proposed, kept=tuple(at for at in range(number) if at in proposed.kept or at not in went))
    if asked.alpha is not None:
        return proposed
    if score.is_of_depth:
        return Decision(tuple(range(asked.keep or number)))
    return depth.best(found, asked.keep or number, fixed)


def _proposed(work: Work, found: Sequence[float], score: Score) -> Decision:
    """Return the layers that have to stay by their scores alone: none where no threshold was asked for."""
    if work.asked.alpha is None or not score.is_of_depth:
        return Decision(())
    return depth.above_threshold(found, work.asked.alpha)


def _with_fixed(work: Work, decision: Decision, fixed: Sequence[int], report: Report) -> Decision:
    """Let layers stay that cannot go; PlanError where one of them was named to go."""
    lost = [work.names[at] for at in fixed if at not in decision.kept]
    if lost and work.asked.drop:
        why = "what it gives has another shape than what it reads"
        raise PlanError(f"`{lost[0]}` cannot be dropped", why=why, hint="drop other layers, which keep the shape")
    if lost:
        report.notes.append(f"stays, as it changes the shape: {', '.join(f'`{name}`' for name in lost)}")
    return decision.with_(fixed)


def _changing(model: Model, names: Sequence[str]) -> list[int]:
    """Return the layers whose output has another shape than their input."""
    found: set[str] = set()

    def saw(name: str, before: Any, after: Any) -> None:
        if before.shape != after.shape:
            found.add(name)

    with layers.tapped(model.module, names, saw):
        outputs(model, probe(model))
    return [at for at, name in enumerate(names) if name in found]


def tell(report: Report, work: Work, choice: Choice) -> None:
    """Say which layers stay and why."""
    decision, scores, number = choice.decision, choice.scores, len(work.names)
    threshold = decision.threshold
    went = {each.layer: place for place, each in enumerate(choice.gone, start=1)}
    rows: list[dict[str, Any]] = []
    shown: list[list[Cell]] = []
    for at, name in enumerate(work.names):
        score = scores[at] if scores and math.isfinite(scores[at]) else None
        margin = scores[at] - threshold if scores and threshold is not None else None
        kept, close = at in decision.kept, at in choice.unsure
        rows.append({"number": at, "name": name, "score": score, "margin": margin, "kept": kept, "close": close})
        fate = "kept" if kept else f"dropped as number {went[at]}" if at in went else "dropped"
        distance = "" if margin is None else f"{margin:+.3f}" + (" close" if close else "")
        shown.append([at, name, "" if score is None else f"{score:.4g}", distance, fate])
    report.data |= {
        "score": work.score.word if work.score else None,
        "alpha": work.asked.alpha,
        "threshold": threshold,
        "layers": rows,
        "agreement": choice.agreement,
        "stability": choice.repeats,
    }
    report.data |= {"measured": choice.measured} if choice.measured else {}
    columns = ["", "layer", work.score.word if work.score else "", "to threshold" if threshold is not None else "", ""]
    report.tables.append(Table("layers", columns, shown))
    report.tables += evidence.tables(choice, number)
    report.notes.append(f"{len(decision.kept)} of {number} layers kept")
    if threshold is not None:
        report.notes.append(
            f"threshold: {threshold:.3f}, alpha {work.asked.alpha:g} of the last layer's {scores[-1]:.3f}"
        )
    report.notes += _said(choice.measured) if "metric" in choice.measured else []
    doubt = evidence.doubt(choice, work.names)
    report.warnings += [doubt] if doubt and work.asked.within_drop is None else []


def _said(known: Mapping[str, Any]) -> list[str]:
    """Return what the layers that went cost, and the one that would have cost too much."""
    with_repair = ", its gaps closed" if known["repaired"] else ""
    lines = [
        f"{known['metric']} without any training{with_repair}: {known['before']:.4g} before, {known['after']:.4g} "
        f"after, on the {known['samples']} samples that decided"
    ]
    if known["stopped"] and known["stopped"]["cost"]:
        name, cost = known["stopped"]["name"], Interval(**known["stopped"]["cost"])
        lines.append(f"`{name}` stays: without it the loss is {cost}, and at most {known['within_drop']:g} is allowed")
    return lines
