"""The models that are compared, how each reads the data, and what each gives."""

from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import cycle

import numpy as np
import torch

from peftc import progress
from peftc.data import Dataset
from peftc.data.classes import match
from peftc.data.loading import ahead
from peftc.errors import DataError, WeightError
from peftc.models.model import Model
from peftc.nn.vocabulary import Logits, Unread, is_finite
from peftc.options import Reading
from peftc.report import Report
from peftc.tasks.task import Batch, Columns, Encoded, Task, batches, concatenated

NOT_COMPARED = "neither agreement nor divergence is measured"


@dataclass
class Side:
    """One of the models compared: how it reads the data, and what it gave."""

    model: Model
    encoded: Encoded
    outputs: list[int] = field(default_factory=list)  # the output of each class of the data
    columns: Columns = field(default_factory=dict)


def sides_of(row: Task, models: list[Model], dataset: Dataset, settings: Reading, report: Report) -> list[Side]:
    """Encode the data for each model, and refuse two that read other tokens, or whose classes do not match.

    The output of each class is found by running one sample, so that a mismatch is refused before the rest.
    """
    encoded = [replace(row.encode(model, dataset, settings), workers=settings.workers) for model in models]
    sides = [Side(model, each) for model, each in zip(models, encoded, strict=True)]
    report.notes += sides[0].encoded.notes
    if len(sides) == 2 and row.is_language and sides[0].encoded.key != sides[1].encoded.key:
        what = f"`{models[0].name}` and `{models[1].name}` read `{dataset.name}` as different tokens"
        why = "perplexities over different tokens cannot be compared"
        hint = "compare with a model of the same tokenizer, in windows that both take: `--max-length N`"
        raise DataError(what, why=why, hint=hint)
    for side in sides if row.has_classes else ():
        logits = _forward(side.model, side.encoded.batch([0]), row)
        if logits.ndim != 2 or logits.shape[1] < 2:
            why = f"for one sample it gives outputs of shape {list(logits.shape)}, not one score per class"
            hint = "choose another `--task`, or a model with a classifier"
            raise DataError(f"`{side.model.name}` does not classify", why=why, hint=hint)
        side.outputs, note = match(dataset.classes or [], side.model.labels, logits.shape[1])
        if note not in report.notes:
            report.notes.append(note)
    return sides


def run(row: Task, sides: list[Side], dataset: Dataset, batch_size: int, report: Report) -> Columns | None:
    """Run every sample through both models, batch by batch, and keep figures per sample; return how they compare."""
    encoded = sides[0].encoded
    seen: list[list[Columns]] = [[] for _ in sides]
    compare, compared = row.compare if len(sides) == 2 else None, list[Columns]()
    if compare is not None and sides[0].outputs != sides[1].outputs:
        compare = None
        report.notes.append(f"the two models order their classes differently, so {NOT_COMPARED}")
    same = all(side.encoded.key == encoded.key for side in sides)
    readers, runs = sides[:1] if same else sides, batches(encoded.lengths, encoded.size, batch_size)

    def read(rows: list[int]) -> list[Batch]:
        return [each.encoded.batch(rows) for each in readers]

    with (
        progress.track(f"evaluating on {dataset.name}", encoded.size) as advance,
        closing(ahead(read, runs, encoded.workers)) as arriving,
    ):
        for indices, arrived in zip(runs, arriving, strict=True):
            given: list[tuple[Logits, Batch]] = []
            batch: Batch
            for side, columns, batch in zip(sides, seen, cycle(arrived), strict=False):
                given.append((_forward(side.model, batch, row), batch))
                known = replace(batch, targets=torch.tensor(side.outputs)[batch.targets]) if side.outputs else batch
                columns.append(row.observe(given[-1][0], known))
                if isinstance(given[-1][0], Unread) and not all(
                    np.isfinite(each).all() for each in columns[-1].values()
                ):
                    raise _not_finite(side.model, given[-1][0])
            if compare is not None:
                one, other = (list(logits.shape) for logits, _ in given)
                if one == other:
                    compared.append(compare(given[1][0], *given[0]))
                else:
                    compare, compared = None, []
                    report.notes.append(f"outputs of shapes {one} and {other}: {NOT_COMPARED}")
            for _ in indices:
                advance("")
    for side, columns in zip(sides, seen, strict=True):
        side.columns = row.over(columns)
    return concatenated(compared) if compared else None


def _forward(model: Model, batch: Batch, row: Task) -> Logits:
    """Return the outputs for a batch (WeightError: they are not finite)."""
    logits: Logits = row.outputs(model, batch)
    if not is_finite(logits):
        raise _not_finite(model, logits)
    return logits


def _not_finite(model: Model, logits: Logits) -> WeightError:
    why = f"it ran in {str(logits.dtype).removeprefix('torch.')}; no figure over them would mean anything"
    hint = "run in a wider type, `--dtype float32`, or look for NaN in its weights with `peftc analyze`"
    return WeightError(f"`{model.name}` gives NaN or infinite outputs", why=why, hint=hint)
