"""Source > one forward pass > a score per layer > Decision > a shorter network > Artifact > Report (SLS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from peftc import depth, measure, processes, tasks
from peftc.depth import Decision
from peftc.errors import DataError, PlanError, UsageError
from peftc.job import Job
from peftc.models import layers, shorten
from peftc.models import load as models
from peftc.models.load import Model, load
from peftc.models.shorten import Shorter
from peftc.report import Report, Table
from peftc.source import Source
from peftc.steps import factored, layer_scores, ordered, quality, samples, write
from peftc.steps.layer_scores import Score
from peftc.steps.plot import draw_scores, refuse_unwritable
from peftc.steps.samples import Samples
from peftc.tasks import Settings

POINTS = 2000  # at most, unless asked for more: t-SNE takes time with the square of them
WARNING = (
    "what was pruned needs training: at alpha 0.3 the authors of SLS fell from 95.9 % to 55.7 % on EuroSAT, and were "
    "back at 94.6 % after training again"
)


def prune_layers(
    model: str | Path | Source | nn.Module | Model,
    *,
    output_dir: str | Path | None = None,
    data: str | None = None,
    score: str | None = None,
    settings: Mapping[str, Any] | None = None,
    alpha: float = 0.3,
    keep: int | None = None,
    drop: str | Sequence[int] | None = None,
    plot: str | Path | None = None,
    task: str | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    max_params: float | None = None,
    max_bytes: float | None = None,
    max_shard_size: str | int = "5GB",
    dry_run: bool = False,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Drop the layers that a task does not need, and write the smaller model as an artifact.

    Args:
        model: a model with a stack of residual layers; it is not changed.
        output_dir: the artifact's folder; ``<model>-prune-layers`` when None.
        data: of the task: its train split is what scores look at. With a test split and labels quality is measured too.
        score: of the table of methods; ``tsne-silhouette`` with labels and ``block-influence`` without, when None.
        settings: of the score.
        alpha: share of the last layer's score that the layers kept must reach, in (0, 1]; for scores of depth.
        keep: keep so many layers instead: the first ones by a score of depth, the best by a score of single layers.
        drop: drop these layers instead, by number from 0, as ``7,9,11``.
        plot: a picture of the scores, ``.png`` or ``.svg``.
        task, num_samples, batch_size, image_size, max_length: how to read the data; 2,000 samples at most when None.
        max_drop, min_quality: gates on the test split; a drop is against the model itself.
        max_params, max_bytes: gates on the size.
        max_shard_size: bytes per weight file, as ``5GB``.
        dry_run: stop at the decision and write nothing.
        device, seed: where to compute, and which samples to take.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    asked = _asked(alpha, keep, drop)
    shard_bytes = factored.shard_bytes(max_shard_size)
    refuse_unwritable("--plot", plot)
    wanted = None if score is None else layer_scores.named(score, settings or {})
    stored = load(model)
    ordered.refuse_ordered(stored)
    if stored.manifest is None and not stored.files:
        models.refuse_unbuildable(stored)
    runs = models.runnable(replace(stored, module=models.detached(stored.module), notes=[]), device=device)
    names = layers.layers(runs)
    if len(names) < 2:
        raise PlanError(
            f"`{stored.name}` has no stack of layers to prune",
            why="no two of its modules run one after the other, each reading what the one before it gave",
        )
    several = runs.kind == "image-text" or getattr(getattr(runs.module, "config", None), "is_encoder_decoder", False)
    if several and not asked.drop:
        raise PlanError(
            f"`{stored.name}` has more than one stack of layers", why="a score of one says nothing about the other",
            hint="name the layers to drop by number: `--drop 2,5`",
        )  # fmt: skip
    given = _samples(runs, data, task, Settings(image_size, max_length, num_samples or POINTS, seed))
    chosen = _score(wanted, settings or {}, given, asked, data)
    work = _Work(stored, runs, names, chosen, given, asked, batch_size)
    if dry_run:
        report, _ = work.decide()
        report.notes.append("dry run: nothing was written")
        return _complete(report, stored, plot, max_params, max_bytes)
    request = {
        "command": "prune-layers", "data": given.about if given else None, "score": chosen.word if chosen else None,
        "settings": dict(settings or {}), "alpha": asked.alpha, "keep": asked.keep,
        "drop": list(asked.drop) if asked.drop else None, "task": task, "num_samples": num_samples,
        "image_size": image_size, "max_length": max_length, "max_shard_bytes": shard_bytes, "device": device,
        "seed": seed,
    }  # fmt: skip
    output = write.output_folder(output_dir, stored, "prune-layers")
    with write.writing(stored, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            report = write.already(job, "prune-layers")
        else:
            job.require(measure.tensor_bytes(stored.module))
            report, shorter = work.decide()
            _carry_out(job, base, request, report, work, shorter, shard_bytes)
    _complete(report, stored, plot, max_params, max_bytes)
    if given is not None and data is not None:
        quality.measure_on_test(
            report, stored, given, data=data, against=stored, max_drop=max_drop, min_quality=min_quality, task=task,
            image_size=image_size, max_length=max_length, device=device, seed=seed,
        )  # fmt: skip
    return report


@dataclass(frozen=True)
class _Asked:
    """How many or which layers: by a threshold, a number, or a list; one of them is set."""

    alpha: float | None = None
    keep: int | None = None
    drop: tuple[int, ...] = ()


def _asked(alpha: float, keep: int | None, drop: str | Sequence[int] | None) -> _Asked:
    if not 0 < alpha <= 1:
        raise UsageError(f"`--alpha` is {alpha:g}", why="it is a share of the last layer's score, in (0, 1]")
    if keep is not None and drop is not None:
        raise UsageError("`--keep` and `--drop` are both given", hint="leave one of them out")
    if keep is not None:
        if keep < 1:
            raise UsageError(f"`--keep` is {keep}", why="one layer at least has to stay")
        return _Asked(keep=keep)
    if drop is None:
        return _Asked(alpha=alpha)
    try:
        numbers = tuple(sorted({int(part) for part in (drop.split(",") if isinstance(drop, str) else drop)}))
    except ValueError:
        raise UsageError(f"`--drop {drop}` is no list of numbers", hint="write it as `--drop 7,9,11`") from None
    if not numbers:
        raise UsageError("`--drop` names no layer", hint="write it as `--drop 7,9,11`")
    return _Asked(drop=numbers)


def _samples(model: Model, data: str | None, task: str | None, settings: Settings) -> Samples | None:
    """Open the samples, with labels where the model's task is to tell classes apart or tokens."""
    if data is None:
        return None
    row = tasks.named_task(task) if task else tasks.guess(model)
    labels = row is not None and (row.has_classes or row.name.endswith("-lm"))
    return samples.read(
        model, data, task=task, labels=labels, held_out=0.0, settings=settings, otherwise="take data without labels"
    )


def _score(
    wanted: Score | None, settings: Mapping[str, Any], given: Samples | None, asked: _Asked, data: str | None
) -> Score | None:
    """Return the score to take, and refuse one that cannot say what was asked; None where no score is needed.

    Raises:
        UsageError, DataError: with what to add.
    """
    has_classes = given is not None and bool(given.outputs)
    if wanted is None:
        if given is None and asked.drop:
            return None
        wanted = layer_scores.named("tsne_silhouette" if has_classes or given is None else "block_influence", settings)
    if wanted.reads_data and given is None:
        raise UsageError(
            f"`--score {wanted.word}` looks at what layers do with samples", hint="name some of the task: `--data DATA`"
        )
    if wanted.is_of_depth and not has_classes:
        raise DataError(
            f"`--score {wanted.word}` needs classes", why=f"`{data}` has none that the model tells apart",
            hint="score layers without labels: `--score block-influence --keep N`",
        )  # fmt: skip
    if asked.alpha is not None and not wanted.is_of_depth:
        raise UsageError(
            f"`{wanted.word}` ranks layers, but does not say how many to keep",
            why="a share of the last layer's score means something for silhouettes only, which need labels",
            hint="say how many: `--keep N`",
        )
    return wanted


@dataclass
class _Work:
    """What there is to decide on.

    Attributes:
        stored: the model as it is stored.
        runs: the same, ready to run.
        names: its layers.
        score, given: what to score them by, and on what.
        asked: how many, or which.
        batch_size: samples at once.
    """

    stored: Model
    runs: Model
    names: list[str]
    score: Score | None
    given: Samples | None
    asked: _Asked
    batch_size: int | None

    def decide(self) -> tuple[Report, Shorter]:
        """Score the layers, decide which stay, build the shorter model, and say so."""
        report = Report("prune-layers", notes=[*self.stored.notes, *(self.given.notes if self.given else [])])
        fixed = _changing(self.runs, self.names)
        found: list[float] = []
        if self.score is not None:
            seen = None
            if self.score.reads_data and self.given is not None:
                size = self.batch_size or (self.given.task.batch_size if self.given.task else 16)
                seen = layer_scores.see(self.runs, self.given, self.names, size)
                report.notes.append(f"scored by {self.score.word} on {len(self.given.train)} samples, {seen.pooling}")
                if len(self.given.train) == POINTS:
                    report.notes.append(
                        f"{POINTS:,} samples, the classes as even as they allow; `--num-samples` takes more"
                    )
                report.data |= {"samples": len(self.given.train), "pooling": seen.pooling}
            found = layer_scores.scores(self.runs, self.names, self.score, seen)
        decision = self._decision(found, fixed, report)
        kept = [self.names[at] for at in decision.kept]
        shorter = shorten.shorten(self.stored, self.names, kept)
        dropped = [name for name in self.names if name not in kept]
        _compare(self.stored, shorter, dropped)
        _tell(report, self, decision, found, shorter)
        return report, shorter

    def _decision(self, found: list[float], fixed: list[int], report: Report) -> Decision:
        number, asked = len(self.names), self.asked
        if asked.keep is not None and asked.keep > number:
            raise PlanError(f"`--keep` is {asked.keep}", why=f"`{self.stored.name}` has {number} layers")
        if asked.drop:
            decision = depth.without(asked.drop, number)
        elif asked.alpha is not None:
            decision = depth.above_threshold(found, asked.alpha)
        elif self.score is not None and self.score.is_of_depth:
            decision = depth.first(asked.keep or number)
        else:
            decision = depth.best(found, asked.keep or number, fixed)
        lost = [self.names[at] for at in fixed if at not in decision.kept]
        if lost and asked.drop:
            raise PlanError(
                f"`{lost[0]}` cannot be dropped", why="what it gives has another shape than what it reads",
                hint="drop other layers, which keep the shape",
            )  # fmt: skip
        if lost:
            report.notes.append(f"stays, as it changes the shape: {', '.join(f'`{name}`' for name in lost)}")
            decision = replace(decision, kept=tuple(sorted({*decision.kept, *fixed})))
        return decision


def _changing(model: Model, names: Sequence[str]) -> list[int]:
    """Return the layers whose output has another shape than their input."""
    found: set[str] = set()

    def saw(name: str, before: Any, after: Any) -> None:
        if before.shape != after.shape:
            found.add(name)

    with layers.tapped(model.module, names, saw):
        models.outputs(model, models.probe(model))
    return [at for at, name in enumerate(names) if name in found]


def _compare(stored: Model, shorter: Shorter, dropped: Sequence[str]) -> None:
    """Refuse a shorter network that is not the whole one with the dropped layers left out.

    Raises:
        PlanError: what a layer computes depends on its place, as the shifted windows of Swin do.
    """
    batch = models.probe(stored)
    whole = write.one_dtype(stored)
    with layers.bypassed(whole.module, dropped):
        before = models.outputs(whole, batch).float()
    after = models.outputs(write.one_dtype(shorter.model), batch).float()
    gap = float((before - after).abs().max()) if before.shape == after.shape else float("inf")
    if gap > write.CLOSE * float(before.abs().max()):
        raise PlanError(
            f"`{stored.name}` without {', '.join(f'`{name}`' for name in dropped[:4])} is not what its library builds",
            why=f"the outputs differ by {gap:.2g}: what a layer computes depends on its place in the stack",
            hint="drop neighbours in pairs with `--drop`, or layers at the end of a stack",
        )


def _tell(report: Report, work: _Work, decision: Decision, found: Sequence[float], shorter: Shorter) -> None:
    """Say which layers stay and why, and what becomes of the size."""
    close = decision.close(found)
    number = len(work.names)
    rows: list[dict[str, Any]] = [
        {
            "number": at, "name": name, "score": found[at] if found and found[at] == found[at] else None,
            "kept": at in decision.kept, "close": at in close,
        }
        for at, name in enumerate(work.names)
    ]  # fmt: skip
    threshold = decision.threshold
    report.data |= {
        "score": work.score.word if work.score else None, "alpha": work.asked.alpha, "threshold": threshold,
        "layers": rows, "size": _sizes(work.stored, shorter.model),
    }  # fmt: skip
    word = work.score.word if work.score else ""
    shown = [
        [
            row["number"], row["name"], "" if row["score"] is None else f"{row['score']:.4g}",
            "" if threshold is None or row["score"] is None else f"{row['score'] - threshold:+.3f}",
            "kept" if row["kept"] else "dropped", "close" if row["close"] else "",
        ]
        for row in rows
    ]  # fmt: skip
    report.tables.append(Table("layers", ["", "layer", word, "to threshold", "", ""], shown))
    report.tables.append(factored.size_table(report.data["size"]))
    report.notes.append(f"{len(decision.kept)} of {number} layers kept")
    if threshold is not None:
        report.notes.append(
            f"threshold: {threshold:.3f}, alpha {work.asked.alpha:g} of the last layer's {found[-1]:.3f}"
        )
    if close:
        report.warnings.append(
            f"within {depth.NOISE} of the threshold, where another seed may decide otherwise: "
            + ", ".join(f"`{work.names[at]}`" for at in close)
        )
    if len(decision.kept) == number:
        report.warnings.append("no layer was dropped: all of them are needed by this rule")
    else:
        report.notes.append(WARNING)


def _sizes(before: Model, after: Model) -> dict[str, dict[str, Any]]:
    """Return parameters, multiply-adds and bytes of two models."""
    sizes = {}
    for when, model in (("before", before), ("after", after)):
        work = measure.work(write.one_dtype(model))
        stored = sum(path.stat().st_size for path in model.files) or measure.tensor_bytes(model.module)
        sizes[when] = {"parameters": measure.parameters(model.module), "macs": work.macs, "bytes": stored}
    return sizes


def _carry_out(
    job: Job, base: dict[str, Any], request: dict[str, Any], report: Report, work: _Work, shorter: Shorter,
    shard_bytes: int,
) -> None:  # fmt: skip
    """Write, reload and compare; the first process does."""
    if processes.rank():
        return
    was = shorten.in_base(work.stored, work.names)
    kept = [was[name] for name in shorter.renamed] if len(shorter.renamed) < len(work.names) else None
    record = write.write_artifact(
        job, shorter.model, base, request, write.pieces_of(shorter.model), shorter.modules, max_shard_bytes=shard_bytes,
        kept_layers=kept,
    )  # fmt: skip
    report.warnings += write.verify(job.folder, shorter.model)
    report.data["size"]["after"]["bytes"] = record.weight_bytes
    report.tables[-1] = factored.size_table(report.data["size"])
    write.finish(job, record, report, models.place_of(work.runs.module))
    report.artifact = job.output


def _complete(
    report: Report, stored: Model, plot: str | Path | None, max_params: float | None, max_bytes: float | None
) -> Report:
    """Draw the picture and add the gates on the size."""
    if plot is not None and processes.rank() == 0:
        draw_scores(report.data, Path(plot), stored.name)
        report.notes.append(f"scores in `{plot}`")
    factored.gate_size(report, max_params, max_bytes)
    return report
