"""Data > samples to learn from and samples held out, read early: what does not fit is refused before any work."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from peftc.data import Dataset, open_data, split_names
from peftc.data.augment import Augmented, Seeds
from peftc.data.classes import match
from peftc.data.dataset import split_word
from peftc.data.given import other_split
from peftc.errors import DataError, UsageError
from peftc.models import inputs
from peftc.models.model import Model
from peftc.models.place import moved
from peftc.options import Augment, Reading
from peftc.pages.brief import NO_TEST
from peftc.tasks import seen, unlabelled
from peftc.tasks.table import task_of
from peftc.tasks.task import Batch, Columns, Encoded, Task
from peftc.training.endless import Endless, rows_of
from peftc.training.held import Held

PLAIN = Augment()
ALONE = "leave the labels alone: `--loss features=1`"
HELD_OUT = 500  # at most


@dataclass(frozen=True)
class Samples:
    """What a training reads.

    Attributes:
        task: of the model; None where nothing tells it.
        labelled: whether the targets mean anything.
        train: what the model learns from; of a stream its first ones.
        held: what only measures; None where nothing is held out.
        about: what identifies the samples, for the request.
        outputs: the output of each class of the data, where classes are told apart.
        notes: what people should know about them.
        stream: what the model learns from, where that is read as it comes.
    """

    task: Task | None
    labelled: bool
    train: Held
    held: Held | None
    about: dict[str, Any]
    outputs: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stream: Endless | None = None

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
    step: int | None = None,
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
        step: samples of a step of training. With it a stream is read on; without, its head is all that there is.

    Raises:
        DataError: the data cannot be read, is empty, or has one class only.
    """
    row, seed = task_of(model, reading.task), reading.seed
    name = row.name if row else None
    how: dict[str, Any] = {"seed": seed, "task": name, "streaming": reading.streaming}
    dataset = open_data(data, num_samples=reading.num_samples, role="training", **how)
    has_labels = dataset.labels is not None or dataset.pairs is not None
    labelled = labels and row is not None and dataset.kind in row.reads and (row.is_language or has_labels)
    of_classes = labelled and row is not None and row.has_classes
    if of_classes:
        refuse_one_class(dataset, otherwise)
    encoded = _encode(model, dataset, row, reading, labelled=labelled)
    notes = [*dataset.notes, *encoded.notes]
    outputs: list[int] = []
    if of_classes:
        outputs, note = _outputs(model, dataset, encoded, otherwise)
        notes.append(note)
    train, held = Held(encoded, range(encoded.size)), None
    if held_out:
        held = _beside(model, data, dataset, row, reading, labelled, notes)
    streams = step is not None and dataset.stream is not None
    if held is None and held_out:
        train, held = (train, train) if streams else _cut(encoded, held_out, seed)
        notes.append(f"held out: {len(held)} samples of split `{dataset.split}`, and none of them is learnt from")
        notes += _without_test(data, len(train), len(held)) if of_classes else []
    about = seen.kept(data, row if labelled else None, dataset, encoded)
    found = Samples(row, labelled, train, held, {**about, "samples": len(train)}, outputs, notes)

    def changed(some: Dataset, plain: Encoded) -> Held:
        change = _augmented(model, some, plain, reading, augment, outputs) if augment else None
        return Held(plain, train.rows if plain is encoded else range(plain.size), change)

    def block(some: Dataset, seed: int) -> Held:
        return changed(some, _encode(model, some, row, replace(reading, seed=seed), labelled=labelled))

    found = replace(found, train=changed(dataset, encoded))
    return found if step is None else _streamed(found, data, dataset, block, step, seed)


def _without_test(data: str, learnt: int, kept: int) -> list[str]:
    """Return a note where data have no test split: what the figure of a training on them is of."""
    if any(split_word(each) == "test" for each in split_names(data)):
        return []
    both = f"{learnt} samples are learnt from, and {kept} kept apart to choose the best weights"
    split = "put a part of each class into a folder `test` beside `train`, as `examples/split.sh` does"
    return [f"{NO_TEST} in `{data}`: {both}; to measure on others, {split} (peftc/docs/data.md)"]


def _beside(
    model: Model, data: str, dataset: Dataset, row: Task | None, reading: Reading, labelled: bool, notes: list[str]
) -> Held | None:
    """Return samples of the one validation split beside the data, and say so; None where there is none."""
    beside = [each for each in split_names(data) if split_word(each) == "validation" and each != dataset.split]
    if len(beside) != 1:
        return None
    how: dict[str, Any] = {"seed": reading.seed, "task": row.name if row else None, "streaming": reading.streaming}
    other = open_data(other_split(data, beside[0]), num_samples=HELD_OUT, **how)
    if other.classes != dataset.classes:
        raise DataError(f"the splits `{dataset.split}` and `{other.split}` of `{data}` hold different classes")
    if labelled and row is not None and row.has_classes:
        refuse_one_class(other)
    whole = _encode(model, other, row, replace(reading, num_samples=None), labelled=labelled)
    notes.append(f"held out: {whole.size} samples of split `{other.split}`")
    return Held(whole, range(whole.size))


def _streamed(
    found: Samples, data: str, head: Dataset, block: Callable[[Dataset, int], Held], step: int, seed: int
) -> Samples:
    """Return samples that are read on behind their head, where they come as a stream: all of it, or what is behind."""
    if head.stream is None:
        return found
    skip = len(head) if found.held is not None and found.held.encoded is found.train.encoded else 0
    rows = rows_of(head, found.train.encoded.size, step)
    stream = Endless(head.name, head.stream, block, rows, skip, step, seed)
    notes = [*found.notes, f"learnt from: the stream, in blocks of {rows:,} rows, each of them shuffled"]
    about = {"spec": str(data), "split": head.split, "digest": head.stream.key}
    return replace(found, about=about, notes=notes, stream=stream)


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


def _encode(model: Model, dataset: Dataset, row: Task | None, reading: Reading, *, labelled: bool) -> Encoded:
    if not len(dataset):
        raise DataError(f"`{dataset.name}` holds no samples", why=f"its split `{dataset.split}` is empty")
    if not labelled or row is None:
        return replace(unlabelled.encode(model, dataset, row, reading), workers=reading.workers)
    return replace(row.encode(model, dataset, reading), workers=reading.workers)


def refuse_one_class(dataset: Dataset, otherwise: str = ALONE) -> None:
    """Refuse samples with labels that are all the same: a `DataError`."""
    if dataset.labels is None:
        return
    there = dataset.classes if dataset.stream else None  # the head of a stream has not all of them
    if len(there or {dataset.labels[index] for index in dataset.rows}) < 2:
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


def observed(model: Model, samples: Samples, held: Held, batch_size: int) -> Columns:
    """Return what the task's metrics read, of a model on each of some samples."""
    row = samples.task
    assert row is not None
    return row.over([row.observe(row.outputs(model, one), samples.mapped(one)) for one in held.batches(batch_size)])


def figures(model: Model, samples: Samples, held: Held, batch_size: int) -> float:
    """Return the task's first metric of a model on samples, larger is better."""
    assert samples.task is not None
    metric = samples.task.metrics[0]
    value = float(np.mean(metric.of(observed(model, samples, held, batch_size))))
    return value if metric.higher_is_better else -value
