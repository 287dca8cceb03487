"""What was asked of a pruning: layers, samples and score, and what does not fit."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftc.errors import ClassesError, DataError, PlanError, UsageError
from peftc.models import layers
from peftc.models.model import Model
from peftc.options import Reading
from peftc.plans.depth import Asked
from peftc.pruning import scores
from peftc.pruning.scores import Score
from peftc.tasks.table import task_of
from peftc.training import samples
from peftc.training.samples import Samples

HELD_OUT = 0.2  # of the train split, to measure quality on where there is no validation split


@dataclass
class Work:
    """What there is to decide on: a model as stored and ready to run, its layers, and what to score them by, on what.

    The batch size is that of the task when None; ``stability`` repeats the score, with ``seed``. Gaps are closed where
    ``repair`` is True, and as far as they can be where it is None.
    """

    stored: Model
    runs: Model
    names: list[str]
    score: Score | None
    given: Samples | None
    asked: Asked
    batch_size: int | None = None
    stability: bool = False
    seed: int = 0
    repair: bool | None = False

    @property
    def samples_at_once(self) -> int:
        """The batch size."""
        return self.batch_size or (self.given.task.batch_size if self.given and self.given.task else 16)


def layers_of(stored: Model, runs: Model, asked: Asked) -> list[str]:
    """Return the names of the layers; PlanError where there are none, or several stacks that no score compares."""
    names = layers.layers(runs)
    if len(names) < 2:
        why = "no two of its modules run one after the other, each reading what the one before it gave"
        raise PlanError(f"`{stored.name}` has no stack of layers to prune", why=why)
    several = runs.kind == "image-text" or getattr(getattr(runs.module, "config", None), "is_encoder_decoder", False)
    if several and not asked.drop:
        why = "a score of one says nothing about the other"
        hint = "name the layers to drop by number: `--drop 2,5`"
        raise PlanError(f"`{stored.name}` has more than one stack of layers", why=why, hint=hint)
    return names


def samples_of(
    model: Model, data: str | None, reading: Reading, wanted: Score | None, asked: Asked, *, trains: bool
) -> Samples | None:
    """Open the samples, with labels where a loss is taken, or the model's task is to tell classes apart or tokens.

    Samples of other classes than the model's do without, where no label is needed; DataError where they do not fit.
    """
    if data is None:
        return None
    row = task_of(model, reading.task)
    is_measured = asked.within_drop is not None or (wanted is not None and wanted.is_measured)
    of_loss = is_measured or (wanted is not None and "gradient_products" in wanted.needs)
    labels = row is not None and (row.has_classes or row.is_language or (of_loss and row.objective is not None))
    read = functools.partial(
        samples.read,
        model,
        data,
        reading,
        held_out=HELD_OUT if is_measured else 0.0,
        otherwise="take data without labels",
    )
    try:
        return read(labels=labels)
    except ClassesError as error:
        of_depth = (wanted is None and not asked.drop) or (wanted is not None and wanted.is_of_depth)
        if trains or of_loss or of_depth:
            hint = "tune the model for these classes first: `peftc finetune`"
            other = ", or rank layers without labels: `--score block-influence --keep N`"
            raise ClassesError(error.what, why=error.why, hint=hint + ("" if trains else other)) from None
    given = read(labels=False)
    given.notes.append("classes: not those of the model, so these samples are taken without labels")
    return given


def score_of(
    wanted: Score | None, settings: Mapping[str, Any], given: Samples | None, asked: Asked, data: str | None
) -> Score | None:
    """Return the score to take, or None where none is needed; UsageError or DataError where it cannot be taken."""
    has_classes = given is not None and bool(given.outputs)
    if wanted is None:
        if given is None and asked.drop:
            return None
        usual = "tsne_silhouette" if has_classes or given is None else "block_influence"
        measures = asked.within_drop is not None and asked.alpha is None
        wanted = scores.named("drop" if measures else usual, settings)
    if wanted.reads_data and given is None:
        hint = "name some of the task: `--data DATA`"
        raise UsageError(f"`--score {wanted.word}` looks at what layers do with samples", hint=hint)
    if asked.usual and not _in_points(given):
        loss = "the figure of its task is no share" if given is not None and given.labelled else "there are no labels"
        raise UsageError(
            f"`{wanted.word}` ranks layers, but does not say how many to keep",
            why=f"a loss of quality is measured in points, and {loss}",
            hint="say how many: `--keep N`, or what they may cost: `--within-drop X`",
        )
    if wanted.is_of_depth and not has_classes:
        why = f"`{data}` has none that the model tells apart"
        hint = "score layers without labels: `--score block-influence --keep N`"
        raise DataError(f"`--score {wanted.word}` needs classes", why=why, hint=hint)
    if asked.within_drop is not None and (given is None or not given.labelled):
        why = "no samples are named" if given is None else f"`{data}` has none for this model's task"
        hint = "name some with `--data DATA`, or say how many layers stay: `--keep N`"
        raise UsageError("`--within-drop` measures quality, which needs samples with labels", why=why, hint=hint)
    if asked.alpha is not None and not asked.usual and not wanted.is_of_depth:
        raise UsageError(
            f"`{wanted.word}` ranks layers, but does not say how many to keep",
            why="a share of the last layer's score means something for silhouettes only, which need labels",
            hint="say how many: `--keep N`",
        )
    return wanted


def _in_points(given: Samples | None) -> bool:
    """Return whether the first metric of the samples is a share, as top1, of which a point is a hundredth."""
    return given is not None and given.labelled and given.task is not None and given.task.metrics[0].higher_is_better
