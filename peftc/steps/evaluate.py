"""Source > Model > Data > Encoded > figures per sample > metrics with their intervals > Report."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from torch import nn

from peftc.data.given import Data, spec_of
from peftc.errors import UsageError
from peftc.models import load
from peftc.models.layerwise import layerwise
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.options import Gates, Reading, Windows
from peftc.pages import brief
from peftc.report import Report
from peftc.store.source import Source
from peftc.tasks import baseline
from peftc.tasks.evaluation import Exam, evaluated, keep


def evaluate(
    model: str | Path | Source | nn.Module | Model,
    *,
    data: Data,
    task: str | None = None,
    num_samples: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    protocol: str | None = None,
    first_token: str = "window",
    stride: int | None = None,
    against: str | Path | Source | nn.Module | Model | None = None,
    batch_size: int | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    seed: int = 0,
) -> Report:
    """Measure how good a model is on labelled data, or on text drawn from a language model, with 95 % intervals.

    Args:
        model: any form of MODEL.
        data: a `--data` spec, samples, or `generated:N`: N sequences drawn from ``against`` (else the base, else the
            model).
        task: a name of the task table; guessed from the model when None.
        num_samples: evaluate on a seeded subset; all samples when None.
        image_size: side in pixels instead of the model's.
        max_length: tokens per text or window; of a window of ``protocol`` 2,048 when None.
        image_column, text_column, label_column: columns of a table, where their names are not usual ones.
        streaming: read a data set of the hub as it comes, keep no copy of it, and measure on its first rows, as many as
            ``num_samples`` says.
        workers: processes that read samples ahead, 0 for none; when None as many as pay, within the cores.
        protocol: `gptq` cuts text as that paper does, for perplexities to stand beside published ones; see
            `peftc.options.Windows`.
        first_token: what begins as the tokenizer begins a text: each `window`, or the whole `text` alone.
        stride: move each window on by so many tokens, and score those that no earlier window scored.
        against: another model, or `base` for the earliest of the artifact's chain with the same head and task; adds
            paired differences.
        batch_size: samples at once.
        max_drop: gate: how much worse than ``against`` the first metric may be, in its own unit.
        min_quality: gate: the least the first metric must be; for perplexity, where less is better, the most.
        device, dtype: where and in what precision to run.
        compile: compile the layers of both models by `torch.compile`.
        seed: of subsets, masks, drawn text and resampling.

    Raises:
        DataError: the data cannot be read, or does not fit the model or the task.
        WeightError: the model gives NaN or infinite outputs.
    """
    given = locals()
    reading, gates = Reading.of(given, windows=Windows.of(given)), Gates.of(given)
    if max_drop is not None and against is None:
        hint = "add `--against base` or `--against MODEL`"
        raise UsageError("`--max-drop` needs something to compare with", hint=hint)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"`--batch-size` is {batch_size}", why="a batch has at least one sample")
    subject = load.load(model)
    reference = None if against is None else baseline.before(subject) if against == "base" else load.load(against)
    exam = Exam(spec_of(data, reading), reading, gates, batch_size, device, dtype)
    with ExitStack() as held:
        for each in (subject, reference) if compile else ():
            if each is not None:
                held.enter_context(layerwise(runnable(each, device=device, dtype=dtype), compiled=True))
        report = evaluated(subject, reference, exam)
    if against == "base" and Path("base").exists():
        report.notes.append(baseline.FOLDER)
    if isinstance(model, str | Path | Source):  # a network in memory may be a part of other work
        keep(report, subject)
    spec = subject.source.spec if isinstance(model, str | Path | Source) else "MODEL"
    brief.compare(report, brief.command("evaluate", spec, "--data", data, "--against", "base"))
    return report
