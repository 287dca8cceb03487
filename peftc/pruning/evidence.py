"""What speaks for and against a decision: how far it is from another, whether it stands repeats, and other scores.

The cheap scores come from the forward pass that was made anyway. Repeats cost further t-SNE maps: they are asked for.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.errors import DataError, UsageError
from peftc.plans import depth
from peftc.plans.depth import NOISE, Decision
from peftc.pruning.asked import Work
from peftc.pruning.losses import Removal
from peftc.pruning.scores import OF_FEATURES, Score, Seen, named, scored
from peftc.report import Table
from peftc.tasks.sentences import spearman

SEEDS = (1, 2, 3)  # of t-SNE, beside the one that decides
CHEAP = ("silhouette", "block_influence", "angular", "cka", "magnitude")  # from the same forward pass, or from none

Decide = Callable[[Sequence[float], Score], Decision]


@dataclass
class Choice:
    """Which layers stay, why, and what was found beside the scores.

    Attributes:
        decision: which.
        fixed: layers that stay whatever their score.
        scores: one per layer; empty without a score.
        seen: of the forward pass; None where there was none.
        gone: layers in the order in which they were left out, where that was measured.
        measured: what quality was measured, and on what.
        agreement: per other score: rank correlation over layers, share of the dropped layers that it would drop, and
            how many layers it would keep by the same rule.
        repeats: per repeat: what it is, scores, margins to its threshold, and how many layers stay; or why there is
            none.
        unsure: layers whose side of the threshold is within the noise, or differs between repeats.
    """

    decision: Decision
    fixed: list[int]
    scores: list[float] = field(default_factory=list)
    seen: Seen | None = None
    gone: list[Removal] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    agreement: list[dict[str, Any]] = field(default_factory=list)
    repeats: list[dict[str, Any]] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)


def refuse_unrepeatable(score: Score | None) -> None:
    """Refuse, as UsageError, repeats of a score that is the same each time, or takes too long."""
    if score is None or not set(score.needs) <= set(OF_FEATURES):
        what = "`--stability` repeats scores of features" + ("" if score is None else f", and `{score.word}` is none")
        raise UsageError(what, hint="leave it out, or take another `--score`, as block-influence")


def gather(work: Work, choice: Choice, score: Score, decide: Decide) -> None:
    """Add to a choice what other scores would decide, and repeat it where that was asked for.

    ``score`` is that it was made by, and ``decide`` says what would come of other scores, by a score.
    """
    choice.agreement = list(_agreement(work, choice, score, decide))
    choice.unsure = choice.decision.close(choice.scores)
    if work.stability and choice.seen is not None:
        choice.repeats = list(_repeats(work, choice.seen, score, decide))
        choice.unsure = sorted({*choice.unsure, *_flipping(choice)})


def _agreement(work: Work, choice: Choice, score: Score, decide: Decide) -> Iterator[dict[str, Any]]:
    """Yield how other scores order the layers, and which they would drop at the same number."""
    dropped = set(range(len(work.names))) - set(choice.decision.kept)
    for name in CHEAP:
        other = named(name, {})
        lacking = other.reads_data and (choice.seen is None or ("labels" in other.needs and not choice.seen.labels))
        if name == score.name or lacking:
            continue
        try:
            theirs = scored(work.runs, work.names, other, choice.seen)
        except DataError:
            continue
        order = depth.worst_first(theirs, choice.fixed, of_depth=other.is_of_depth)
        same = dropped & set(order[: len(dropped)])
        kept = None
        if choice.decision.threshold is not None and other.is_of_depth:  # by the same share of its last
            with contextlib.suppress(DataError):
                kept = len(decide(theirs, other).kept)
        yield {
            "score": other.word,
            "spearman": _spearman(choice.scores, theirs),
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


def _repeats(work: Work, seen: Seen, score: Score, decide: Decide) -> Iterator[dict[str, Any]]:
    """Yield what other seeds and halves of the samples decide."""
    parts = halves(seen, work.seed)
    everything = torch.cat(parts).sort().values  # seen apart, so that the maps of the first stay
    seeded = {seed: replace(score, settings={**score.settings, "seed": seed}) for seed in SEEDS if score.has_map}
    tries = [(f"seed {seed}", by, everything) for seed, by in seeded.items()]
    tries += [(f"half {number} of the samples", score, rows) for number, rows in enumerate(parts, start=1)]
    for what, by, rows in tries:
        try:
            scores = scored(work.runs, work.names, by, seen.part(rows))
            decision = decide(scores, by)
        except DataError as error:
            yield {"what": what, "kept": None, "why": error.what}
            continue
        margins = None if decision.threshold is None else [each - decision.threshold for each in scores]
        kept, found = list(decision.kept), [_number(each) for each in scores]
        yield {"what": what, "kept": kept, "scores": found, "margins": margins}


def halves(seen: Seen, seed: int) -> tuple[Tensor, Tensor]:
    """Return the samples in two halves, each class in both."""
    number = sum(len(part) for part in next(iter(seen.figures.values())))
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    if seen.labels:
        order = order[torch.argsort(torch.cat(seen.labels).cpu()[order], stable=True)]
    return order[::2].sort().values, order[1::2].sort().values


def _flipping(choice: Choice) -> set[int]:
    """Return the layers, but the last, that some repeat puts on the other side of its threshold."""
    threshold = choice.decision.threshold
    if threshold is None:
        return set()
    return {
        at
        for repeat in choice.repeats
        for at, margin in enumerate((repeat.get("margins") or [])[:-1])
        if (margin >= 0) != (choice.scores[at] >= threshold)
    }


def tables(choice: Choice, number: int) -> list[Table]:
    """Return what people see of it."""
    found, others, repeats = [], [], []
    for row in choice.agreement:
        correlation = "" if row["spearman"] is None else f"{row['spearman']:+.2f}"
        overlap = "" if row["same"] is None else f"{row['same']:.0%}"
        others.append([row["score"], correlation, overlap, "" if row["kept"] is None else row["kept"]])
    if others:
        found.append(Table("other scores", ["", "Spearman", "of the dropped", "would keep"], others))
    for row in choice.repeats:
        if row["kept"] is None:
            repeats.append([row["what"], row["why"], ""])
        else:
            same = row["kept"] == list(choice.decision.kept)
            repeats.append([row["what"], len(row["kept"]), "the same" if same else "others"])
    if repeats:
        title = f"repeats, where {len(choice.decision.kept)} of {number} layers stay"
        found.append(Table(title, ["", "kept", ""], repeats))
    return found


def doubt(choice: Choice, names: Sequence[str]) -> str | None:
    """Return a warning that names the layers on which another seed may decide otherwise; None where all are clear."""
    if not choice.unsure:
        return None
    which = ", ".join(f"`{names[at]}`" for at in choice.unsure)
    how = "or on its other side in a repeat" if choice.repeats else "where another seed may decide otherwise"
    return f"within {NOISE} of the threshold, {how}: {which}"
