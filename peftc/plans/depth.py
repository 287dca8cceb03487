"""Which layers to keep: what was asked, and what follows from one score per layer; torch-free."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from peftc.errors import DataError, PlanError, UsageError

ALPHA = 0.3  # of SLS
POINTS = 0.02  # that the task's first metric may fall where nothing was asked
NOISE = 0.03  # a silhouette so near to the threshold may fall on its other side for another seed (papers notes, 3.3)


@dataclass(frozen=True)
class Asked:
    """How many or which layers: by a threshold, a number, a list, or what their loss may cost.

    A threshold and a cost go together: the first says which layers may go, the second how many of them.
    """

    alpha: float | None = None  # share of the last score, in (0, 1]
    keep: int | None = None  # how many
    drop: tuple[int, ...] = ()  # which go, by number
    within_drop: float | None = None  # how much worse the task's first metric may get, by the end of its interval
    usual: bool = False  # nothing was asked

    def said(self, score: str | None) -> str:
        """Return it in words, with the score that layers were ranked by."""
        if self.drop:
            return f"drop layers {', '.join(map(str, self.drop))}"
        if self.within_drop is not None:
            return f"drop layers in the order of {score}, while quality loses at most {self.within_drop:g}"
        how = f"keep {self.keep} layers" if self.keep is not None else f"drop what alpha {self.alpha:g} lets go"
        return f"{how}, by {score}"

    def request(self) -> dict[str, Any]:
        """Return what a request says of it."""
        asked = {name: value for name, value in asdict(self).items() if name != "usual"}
        return {**asked, "drop": list(self.drop) or None}


def asked(
    alpha: float | None, keep: int | None, drop: str | Sequence[int] | None, within_drop: float | None = None
) -> Asked:
    """Return what was asked, or the usual; UsageError where it does not go together, or makes no sense."""
    if alpha is not None and not 0 < alpha <= 1:
        raise UsageError(f"`--alpha` is {alpha:g}", why="it is a share of the last layer's score, in (0, 1]")
    ways = {"--alpha": alpha, "--keep": keep, "--drop": drop, "--within-drop": within_drop}
    given = [f"`{option}`" for option, value in ways.items() if value is not None]
    if not given:
        return Asked(ALPHA, within_drop=POINTS, usual=True)
    if len(given) > 1 and given != ["`--alpha`", "`--within-drop`"]:
        raise UsageError(f"{' and '.join(given)} are both given", hint="leave one of them out")
    if keep is not None and keep < 1:
        raise UsageError(f"`--keep` is {keep}", why="one layer at least has to stay")
    if within_drop is not None and not 0 <= within_drop < float("inf"):
        raise UsageError(f"`--within-drop` is {within_drop:g}", why="it is how much worse the quality may get")
    if drop is None:
        return Asked(alpha, keep, within_drop=within_drop)
    try:
        numbers = tuple(sorted({int(part) for part in (drop.split(",") if isinstance(drop, str) else drop)}))
    except ValueError:
        raise UsageError(f"`--drop {drop}` is no list of numbers", hint="write it as `--drop 7,9,11`") from None
    if not numbers:
        raise UsageError("`--drop` names no layer", hint="write it as `--drop 7,9,11`")
    return Asked(drop=numbers)


@dataclass(frozen=True)
class Decision:
    """Which layers stay, by number in running order, and the threshold of their scores; None where they were ranked."""

    kept: tuple[int, ...]
    threshold: float | None = None

    def with_(self, fixed: Collection[int]) -> Decision:
        """Return the same with layers that stay whatever was decided."""
        return replace(self, kept=tuple(sorted({*self.kept, *fixed})))

    def close(self, scores: Sequence[float]) -> list[int]:
        """Return the layers, but the last that sets it, whose score lies within the noise of the threshold."""
        if self.threshold is None:
            return []
        return [at for at, score in enumerate(scores[:-1]) if abs(score - self.threshold) <= NOISE]


def above_threshold(scores: Sequence[float], alpha: float) -> Decision:
    """Keep the first layers, by the rule of SLS (arXiv 2407.14330; 2.2 of the papers notes).

    The threshold is ``alpha`` times the last score. From the top, the scores at or above it are an unbroken run; the
    layer that begins it is the last that is kept. A larger ``alpha`` never keeps fewer. DataError where the last score
    is 0 or less, so that the scores tell nothing about the task.

    Args:
        scores: one per layer, in running order: how good the features after it are.
        alpha: in (0, 1].
    """
    if not scores[-1] > 0:
        what = "the scores do not say which layers are needed, so nothing is dropped and nothing is written"
        why = f"even after the last layer the features do not cluster by class: the score is {scores[-1]:.3f}"
        hint = "fine-tune the model on the task first, use more samples per class, or say it: `--keep N`"
        raise DataError(what, why=why, hint=hint)
    threshold = alpha * scores[-1]
    number = len(scores)
    while number > 1 and scores[number - 2] >= threshold:
        number -= 1
    return Decision(tuple(range(number)), threshold)


def best(scores: Sequence[float], number: int, fixed: Collection[int] = ()) -> Decision:
    """Keep the layers with the largest scores, of equals the earlier; fixed ones, whose scores may be NaN, stay."""
    order = sorted(range(len(scores)), key=lambda at: (at not in fixed, -scores[at] if at not in fixed else 0.0, at))
    return Decision(tuple(sorted(order[:number])))


def worst_first(scores: Sequence[float], fixed: Collection[int], *, of_depth: bool) -> list[int]:
    """Return the layers that may go, those that should go first in front; fixed ones stay, and may have NaN.

    Scores ``of_depth`` say how good the features are up to a layer, so that layers go from the end.
    """
    free = [at for at in range(len(scores)) if at not in fixed]
    return free[::-1] if of_depth else sorted(free, key=lambda at: (scores[at], -at))


def without(dropped: Collection[int], number: int) -> Decision:
    """Keep all of ``number`` layers but some; PlanError where one of them is not there, or none would be left."""
    unknown = sorted(at for at in dropped if not 0 <= at < number)
    if unknown:
        why = f"the model has {number} layers, 0 to {number - 1}"
        hint = "`peftc prune-layers MODEL --score magnitude --keep 1 --dry-run` lists them"
        raise PlanError(f"`--drop` names layer {unknown[0]}", why=why, hint=hint)
    if len(set(dropped)) == number:
        raise PlanError(f"`--drop` names all {number} layers", hint="leave one at least")
    return Decision(tuple(at for at in range(number) if at not in set(dropped)))
