"""What speaks for and against a decision: how far it is from another, whether it stands repeats, and other scores.

The cheap scores come from the forward pass that was made anyway. Repeats cost further t-SNE maps: they are asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.errors import DataError, UsageError
from peftc.models.model import Model
from peftc.plans import depth
from peftc.plans.depth import NOISE, Decision
from peftc.pruning import scores as layer_scores
from peftc.pruning.scores import Score, Seen
from peftc.report import Table
from peftc.tasks.sentences import spearman

SEEDS = (1, 2, 3)  # of t-SNE, beside the one that decides
CHEAP = ("silhouette", "block_influence", "angular", "cka", "magnitude")  # from the same forward pass, or from none

Decide = Callable[[Sequence[float], Score], Decision]


@dataclass
class Evidence:
    """What was found beside the scores.

    Attributes:
        agreement: per other score: rank correlation over layers, share of the dropped layers that it would drop, and
            how many layers it would keep by the same rule.
        repeats: per repeat: what it is, scores, margins to its threshold, and how many layers stay; or why there is
            none.
        unsure: layers whose side of the threshold is within the noise, or differs between repeats.
    """

    agreement: list[dict[str, Any]] = field(default_factory=list)
    repeats: list[dict[str, Any]] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)


def refuse_unrepeatable(score: Score | None) -> None:
    """Refuse repeats of a score that is the same each time, or takes too long.

    Raises:
        UsageError: with what to do.
    """
    if score is None or not set(score.needs) <= set(layer_scores.OF_FEATURES):
        raise UsageError(
            "`--stability` repeats scores of features" + ("" if score is None else f", and `{score.word}` is none"),
            hint="leave it out, or take another `--score`, as block-influence",
        )


@dataclass(frozen=True)
class Decided:
    """A decision, and what it was made on.

    Attributes:
        model: runnable.
        names: its layers.
        fixed: those that stay whatever their score.
        score, scores: which, and one per layer.
        seen: of the forward pass; None where no sample was looked at.
        decision: what came of them.
        decide: (scores, score) -> what would come of others.
    """

    model: Model
    names: Sequence[str]
    fixed: Sequence[int]
    score: Score
    scores: Sequence[float]
    seen: Seen | None
    decision: Decision
    decide: Decide


def gather(case: Decided, *, stability: bool, seed: int) -> Evidence:
    """Compare a decision with what other scores would decide, and repeat it where that was asked for.

    Args:
        case: the decision.
        stability: repeat the score with other seeds and on halves of the samples.
        seed: of the halves.
    """
    found = Evidence(unsure=case.decision.close(case.scores), agreement=list(_agreement(case)))
    if stability and case.seen is not None:
        found.repeats = list(_repeats(case, case.seen, seed))
        found.unsure = sorted({*found.unsure, *_flipping(case, found.repeats)})
    return found


def _agreement(case: Decided) -> Iterator[dict[str, Any]]:
    """Yield how other scores order the layers, and which they would drop at the same number."""
    dropped = set(range(len(case.names))) - set(case.decision.kept)
    for name in CHEAP:
        other = layer_scores.named(name, {})
        lacking = other.reads_data and (case.seen is None or ("labels" in other.needs and not case.seen.labels))
        if name == case.score.name or lacking:
            continue
        try:
            theirs = layer_scores.scores(case.model, case.names, other, case.seen)
        except DataError:
            continue
        order = depth.worst_first(theirs, case.fixed, of_depth=other.is_of_depth)
        same = dropped & set(order[: len(dropped)])
        kept = None
        if case.decision.threshold is not None and other.is_of_depth:  # by the same share of its last
            with contextlib.suppress(DataError):
                kept = len(case.decide(theirs, other).kept)
        yield {
            "score": other.word,
            "spearman": _spearman(case.scores, theirs),
            "same": len(same) / len(dropped) if dropped else None,
            "kept": kept,
            "scores": [_number(each) for each in theirs],
        }


def _spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the rank correlation over the layers that both score; None where it has no value."""
    pairs = [pair for pair in zip(one, other, strict=True) if not any(map(math.isnan, pair))]
    if len(pairs) < 3:
        return None
    columns = {"cosine": np.array([a for a, _ in pairs]), "score": np.array([b for _, b in pairs])}
    return _number(spearman(columns))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _repeats(case: Decided, seen: Seen, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what other seeds and halves of the samples decide."""
    parts = halves(seen, seed)
    if case.score.has_map:
        everything = torch.cat(parts).sort().values  # seen apart, so that the maps of the first stay
        for other in SEEDS:
            yield _repeat(f"seed {other}", case, case.score.seeded(other), seen.part(everything))
    for number, rows in enumerate(parts, start=1):
        yield _repeat(f"half {number} of the samples", case, case.score, seen.part(rows))


def _repeat(what: str, case: Decided, score: Score, seen: Seen) -> dict[str, Any]:
    try:
        scores = layer_scores.scores(case.model, case.names, score, seen)
        decision = case.decide(scores, score)
    except DataError as error:
        return {"what": what, "kept": None, "why": error.what}
    margins = None if decision.threshold is None else [each - decision.threshold for each in scores]
    return {"what": what, "kept": list(decision.kept), "scores": [_number(each) for each in scores], "margins": margins}


def halves(seen: Seen, seed: int) -> tuple[Tensor, Tensor]:
    """Return the samples in two halves, each class in both."""
    number = sum(len(part) for part in next(iter(seen.figures.values())))
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    if seen.labels:
        order = order[torch.argsort(torch.cat(seen.labels).cpu()[order], stable=True)]
    return order[::2].sort().values, order[1::2].sort().values


def _flipping(case: Decided, repeats: Sequence[dict[str, Any]]) -> set[int]:
    """Return the layers, but the last, that some repeat puts on the other side of its threshold."""
    threshold = case.decision.threshold
    if threshold is None:
        return set()
    return {
        at
        for repeat in repeats
        for at, margin in enumerate((repeat.get("margins") or [])[:-1])
        if (margin >= 0) != (case.scores[at] >= threshold)
    }


def tables(evidence: Evidence, decision: Decision, number: int) -> list[Table]:
    """Return what people see of it."""
    found, others, repeats = [], [], []
    for row in evidence.agreement:
        correlation = "" if row["spearman"] is None else f"{row['spearman']:+.2f}"
        overlap = "" if row["same"] is None else f"{row['same']:.0%}"
        others.append([row["score"], correlation, overlap, "" if row["kept"] is None else row["kept"]])
    if others:
        found.append(Table("other scores", ["", "Spearman", "of the dropped", "would keep"], others))
    for row in evidence.repeats:
        if row["kept"] is None:
            repeats.append([row["what"], row["why"], ""])
        else:
            same = list(row["kept"]) == list(decision.kept)
            repeats.append([row["what"], len(row["kept"]), "the same" if same else "others"])
    if repeats:
        title = f"repeats, where {len(decision.kept)} of {number} layers stay"
        found.append(Table(title, ["", "kept", ""], repeats))
    return found


def doubt(evidence: Evidence, names: Sequence[str]) -> str | None:
    """Return a warning that names the layers on which another seed may decide otherwise; None where all are clear."""
    if not evidence.unsure:
        return None
    which = ", ".join(f"`{names[at]}`" for at in evidence.unsure)
    how = "or on its other side in a repeat" if evidence.repeats else "where another seed may decide otherwise"
    return f"within {NOISE} of the threshold, {how}: {which}"
