"""One row of the task table, and what samples are to it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from peftc.data.dataset import Dataset
from peftc.data.loading import ahead, mapped
from peftc.models import inputs
from peftc.models.model import Model
from peftc.models.place import moved
from peftc.options import Reading

Columns = dict[str, np.ndarray]  # one figure per sample each


@dataclass(frozen=True)
class Batch:
    """Inputs as a model takes them, on the CPU.

    Attributes:
        inputs: of the samples.
        targets: class indices of the data, scores, tokens, or numbers of captions and images.
        others: of each pair another text, that does not belong to its image, where the model can tell.
    """

    inputs: Tensor | dict[str, Tensor]
    targets: Tensor
    others: dict[str, Tensor] | None = None

    def pin_memory(self) -> Batch:
        """Return it in memory from which a GPU copies while others compute; torch's loader asks for it by this name."""
        return mapped(self, Tensor.pin_memory)


@dataclass
class Encoded:
    """A data set of ``size`` samples as one model reads it; ``batch`` gives the batch of some of them."""

    size: int
    batch: Callable[[Sequence[int]], Batch]
    key: str  # two models with equal keys read the same batches
    lengths: Sequence[int] | None = None  # tokens per sample, so that a batch can hold equals
    notes: list[str] = field(default_factory=list)  # what people should know about how samples are read
    batch_size: int | None = None  # when the user gives none, and what is usual for the task is too many
    windows: dict[str, Any] = field(default_factory=dict)  # how a text was cut, where that was asked for
    workers: int | None = None  # processes that read batches ahead; as many as pay when None

    def batches(self, runs: Sequence[Sequence[int]]) -> Generator[Batch, None, None]:
        """Yield the batch of each of some runs of rows, read ahead."""
        return ahead(self.batch, runs, self.workers)

    def spread(self, number: int) -> list[int]:
        """Return so many rows, at most ``size``, spread over all."""
        return [at * self.size // number for at in range(number)]

    def some(self, rows: Sequence[int]) -> Encoded:
        """Return the samples of some rows, counted among them."""
        lengths = None if self.lengths is None else [self.lengths[row] for row in rows]
        return replace(self, size=len(rows), lengths=lengths, batch=lambda some: self.batch([rows[at] for at in some]))


@dataclass(frozen=True)
class Metric:
    """A figure over samples: a share of hits where ``proportion`` (``of`` gives them one by one), else any number.

    Where ``column`` names one that a model did not give, the figure is left out. ``to_one`` says of another number that
    it is at most 1, as a share is.
    """

    name: str
    of: Callable[[Columns], Any]
    proportion: bool = False
    higher_is_better: bool = True
    column: str | None = None
    to_one: bool = False


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        name: as typed for `--task`.
        reads: kinds of data.
        architectures: endings of the names of transformers classes made for it.
        encode: (model, data, reading) -> samples as the model reads them.
        observe: (outputs, batch) -> figures per sample.
        metrics: the first is the one that gates judge.
        batch_size: when the user gives none.
        compare: (outputs of the reference, outputs, batch) -> figures per sample; None without distributions.
        run: (model, batch) -> outputs, where an evaluation needs more than the model's main output, or less.
        over_all: figures of all samples -> what metrics read, where samples are compared with each other.
        objective: (outputs, batch, peers) -> what a training minimises, a mean over samples; None for none.
        is_language: its samples are windows of text, and their tokens the answers.
    """

    name: str
    reads: tuple[str, ...]
    architectures: tuple[str, ...]
    encode: Callable[[Model, Dataset, Reading], Encoded]
    observe: Callable[[Any, Batch], Columns]
    metrics: tuple[Metric, ...]
    batch_size: int
    compare: Callable[[Any, Any, Batch], Columns] | None = None
    run: Callable[[Model, Batch], Any] | None = None
    over_all: Callable[[Columns], Columns] | None = None
    objective: Callable[..., Tensor] | None = None
    is_language: bool = False

    def outputs(self, model: Model, batch: Batch) -> Any:
        """Return what an evaluation looks at: outputs of the model, to which the batch is moved."""
        return self.run(model, batch) if self.run else inputs.outputs(model, moved(model, batch.inputs))

    def over(self, parts: Sequence[Columns]) -> Columns:
        """Return figures of all samples, from those of each batch."""
        whole = concatenated(parts)
        return self.over_all(whole) if self.over_all else whole

    @property
    def has_classes(self) -> bool:
        """Whether classes of the data must be matched with outputs of the model."""
        return self.name.endswith("classification")


def concatenated(parts: Sequence[Columns]) -> Columns:
    """Return the figures of several batches as those of one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batches(lengths: Sequence[int] | None, size: int, batch_size: int) -> list[list[int]]:
    """Return the samples of each batch: in order, or shortest texts first, so that padding stays small."""
    order = list(range(size)) if lengths is None else sorted(range(size), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, size, batch_size)]
