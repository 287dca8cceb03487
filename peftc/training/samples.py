"""Data > samples to learn from and samples held out, read early: what does not fit is refused before any work."""

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from peftc.data import Dataset, open_data, parts_of, split_names
from peftc.data.augment import Augmented, Seeds
from peftc.data.classes import match
from peftc.data.dataset import split_word
from peftc.errors import DataError, UsageError
from peftc.models import inputs
from peftc.models.model import Model
from peftc.models.place import moved
from peftc.options import Augment, Reading
from peftc.tasks import seen, unlabelled
from peftc.tasks.table import task_of
from peftc.tasks.task import Batch, Encoded, Task

PLAIN = Augment()
ALONE = "leave the labels alone: `--loss features=1`"
HELD_OUT = 500  # at most


@dataclass(frozen=True)
class Held:
    """Samples of one encoded data set; ``changed`` reads rows as they are learnt from, where not as they are."""

    encoded: Encoded
    rows: Sequence[int]
    changed: Callable[[Sequence[int], Seeds], Batch] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the batch of some of these samples, counted among them."""
        return self.encoded.batch([self.rows[index] for index in indices])

    def drawn(self, indices: Sequence[int], seeds: Seeds) -> Batch:
        """Return the batch of some of these samples to learn from, changed at random where that was asked for."""
        return self.batch(indices) if self.changed is None else self.changed([self.rows[at] for at in indices], seeds)

    def batches(self, size: int) -> Generator[Batch, None, None]:
        """Yield all of these samples in order, at most ``size`` at once, read ahead."""
        return self.encoded.batches([self.rows[start : start + size] for start in range(0, len(self), size)])


@dataclass(frozen=True)
class Samples:
    """What a training reads.

    Attributes:
        task: of the model; None where nothing tells it.
        labelled: whether the targets mean anything.
        train: what the model learns from.
        held: what only measures; None where nothing is held out.
        about: what identifies the samples, for the request.
        outputs: the output of each class of the data, where classes are told apart.
        notes: what people should know about them.
    """

    task: Task | None
    labelled: bool
    train: Held
    held: Held | None
    about: dict[str, Any]
    outputs: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mapped(self, batch: Batch) -> Batch:
        """Return a batch whose classes are the model's outputs; shares of classes already are."""
        if not self.outputs or batch.targets.is_floating_point():
            return batch
        return replace(batch, targets=torch.tensor(self.outputs)[batch.targets])


def read(
    model: Model,
    data: str,
    reading: Reading,
    *,
    labels: bool,
    held_out: float,
    augment: Augment = PLAIN,
    otherwise: str = ALONE,
) -> Samples:
    """Open the samples of a training: those of the train split, and held out ones of the validation split or of it.

    Args:
        model: that reads them, runnable.
        data: a `--data` spec.
        reading: how; the task is guessed where it names none.
        labels: whether they are wanted; without, nothing looks at them.
        held_out: share of the train split to hold out where there is no validation split, in [0, 1).
        augment: what happens to images that are learnt from.
        otherwise: what to do, said to those whose labels do not fit.

    Raises:
        DataError: the data cannot be read, is empty, or has one class only.
    """
    row, seed = task_of(model, reading.task), reading.seed
    name = row.name if row else None
    dataset = open_data(data, num_samples=reading.num_samples, seed=seed, task=name, role="training")
    has_labels = dataset.labels is not None or dataset.pairs is not None
    labelled = labels and row is not None and dataset.kind in row.reads and (row.is_language or has_labels)
    encoded = _encode(model, dataset, row, reading, labelled=labelled, otherwise=otherwise)
    notes = [*dataset.notes, *encoded.notes]
    outputs: list[int] = []
    if labelled and row is not None and row.has_classes:
        outputs, note = _outputs(model, dataset, encoded, otherwise)
        notes.append(note)
    train, held = Held(encoded, range(encoded.size)), None
    splits = split_names(data) if held_out else []
    beside = [each for each in splits if split_word(each) == "validation" and each != dataset.split]
    if len(beside) == 1:
        other = open_data(f"{parts_of(data)[0]}@{beside[0]}", num_samples=HELD_OUT, seed=seed, task=name)
        if other.classes != dataset.classes:
            raise DataError(f"the splits `{dataset.split}` and `{other.split}` of `{data}` hold different classes")
        whole = _encode(model, other, row, replace(reading, num_samples=None), labelled=labelled)
        held = Held(whole, range(whole.size))
        notes.append(f"held out: {whole.size} samples of split `{other.split}`")
    elif held_out:
        train, held = _cut(encoded, held_out, seed)
        notes.append(f"held out: {len(held)} samples of split `{dataset.split}`, and none of them is learnt from")
    if augment:
        train = replace(train, changed=_augmented(model, dataset, encoded, reading, augment, outputs))
    about = {**seen.kept(data, row if labelled else None, dataset, encoded), "samples": len(train)}
    return Samples(row, labelled, train, held, about, outputs, notes)


def _augmented(
    model: Model, dataset: Dataset, plain: Encoded, reading: Reading, augment: Augment, outputs: list[int]
) -> Callable[[Sequence[int], Seeds], Batch]:
    """Return what reads samples changed at random; classes are mixed as the model's outputs."""
    if dataset.kind not in ("image", "tensor") or model.kind != "image":
        raise UsageError(f"`{dataset.name}` holds no images to augment", hint="leave `--augment` and `--mixup` out")
    images = Augmented(dataset, model.preprocess, reading.image_size, augment, plain.batch)
    number = len(model.labels or []) or max(outputs, default=0) + 1

    def changed(indices: Sequence[int], seeds: Seeds) -> Batch:
        targets = torch.zeros(len(indices), dtype=torch.long)  # where no class is an output, nothing looks at them
        if outputs:
            assert dataset.labels is not None
            targets = torch.tensor(outputs)[[int(dataset.labels[dataset.rows[at]]) for at in indices]]
        inputs, shares = images.mixed(images.read(indices, seeds.samples), targets, number, seeds.step)
        one_hot = torch.nn.functional.one_hot(shares, number).float() if shares.ndim == 1 else shares
        return Batch(inputs, one_hot)

    return changed


def _encode(
    model: Model, dataset: Dataset, row: Task | None, reading: Reading, *, labelled: bool, otherwise: str = ALONE
) -> Encoded:
    if not len(dataset):
        raise DataError(f"`{dataset.name}` holds no samples", why=f"its split `{dataset.split}` is empty")
    if not labelled or row is None:
        return replace(unlabelled.encode(model, dataset, row, reading), workers=reading.workers)
    if row.has_classes:
        refuse_one_class(dataset, otherwise)
    return replace(row.encode(model, dataset, reading), workers=reading.workers)


def refuse_one_class(dataset: Dataset, otherwise: str = ALONE) -> None:
    """Refuse samples with labels that are all the same: a `DataError`."""
    if dataset.labels is not None and len({dataset.labels[index] for index in dataset.rows}) < 2:
        why = "nothing can be learnt from telling one class apart"
        hint = f"use data with two classes or more, or {otherwise}"
        raise DataError(f"the samples of `{dataset.name}` are all of one class", why=why, hint=hint)


def _outputs(model: Model, dataset: Dataset, encoded: Encoded, otherwise: str) -> tuple[list[int], str]:
    logits = inputs.outputs(model, moved(model, encoded.batch([0]).inputs))
    if logits.ndim != 2 or logits.shape[1] < 2:
        why = f"for one sample it gives outputs of shape {list(logits.shape)}"
        raise DataError(f"`{model.name}` does not classify", why=why, hint=f"choose another `--task`, or {otherwise}")
    return match(dataset.classes or [], model.labels, logits.shape[1])


def _cut(encoded: Encoded, share: float, seed: int) -> tuple[Held, Held]:
    """Hold out a seeded share of the samples, at least one and at most `HELD_OUT`."""
    if encoded.size < 2:
        hint = "use more samples, or hold none out: `--held-out 0`"
        raise DataError("one sample is too few to learn from and to hold out", hint=hint)
    number = min(HELD_OUT, max(1, round(encoded.size * share)))
    held = set(random.Random(seed).sample(range(encoded.size), number))
    return Held(encoded, [row for row in range(encoded.size) if row not in held]), Held(encoded, sorted(held))


def figures(model: Model, samples: Samples, held: Held, batch_size: int) -> float:
    """Return the task's first metric of a model on samples, larger is better."""
    row = samples.task
    assert row is not None
    seen = [row.observe(row.outputs(model, batch), samples.mapped(batch)) for batch in held.batches(batch_size)]
    metric = row.metrics[0]
    value = float(np.mean(metric.of(row.over(seen))))
    return value if metric.higher_is_better else -value
