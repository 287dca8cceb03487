"""Source > one forward pass > a score per layer > Decision > a shorter network > Artifact > Report (SLS)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc import processes
from peftc.data.given import Data, spec_of
from peftc.errors import UsageError
from peftc.factors import ordered
from peftc.measure import costs
from peftc.measure.intervals import Interval
from peftc.models import shorten, write
from peftc.models.delta import is_delta, of_shorter, reference
from peftc.models.live import refuse_unbuildable
from peftc.models.load import load, without_updates
from peftc.models.model import Model, detached
from peftc.models.place import one_dtype, place_of, runnable
from peftc.models.shorten import Shorter
from peftc.models.weights import pieces_of
from peftc.nn.surgery import parameters, tensor_bytes
from peftc.options import Gates, Reading
from peftc.pages import brief, pictures
from peftc.pages.plot import draw, refuse_unwritable
from peftc.plans import depth
from peftc.pruning import closing, evidence, scores
from peftc.pruning.asked import Work, layers_of, samples_of, score_of
from peftc.pruning.choice import choose, tell
from peftc.pruning.evidence import Choice
from peftc.pruning.scores import Seen
from peftc.pruning.shorter import shorter_of
from peftc.report import Report, figure, gate_size, size_table
from peftc.steps.finetune import finetune
from peftc.store import maps
from peftc.store.job import Job
from peftc.store.source import Source
from peftc.tasks import baseline, quality
from peftc.tasks.evaluation import Exam
from peftc.tasks.figures import refuse_idle
from peftc.training import retraining

POINTS = 2000  # at most, unless asked for more: t-SNE takes time with the square of them


def prune_layers(
    model: str | Path | Source | nn.Module | Model,
    *,
    output_dir: str | Path | None = None,
    data: Data | None = None,
    score: str | None = None,
    settings: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    keep: int | None = None,
    drop: str | Sequence[int] | None = None,
    within_drop: float | None = None,
    repair: bool | None = None,
    retrain: bool = False,
    method: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    learning_rate: float | None = None,
    stability: bool = False,
    delta: bool | None = None,
    plot: str | Path | None = None,
    task: str | None = None,
    num_samples: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    batch_size: int | None = None,
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
        score: of the table of methods; when None ``tsne-silhouette`` with labels, ``block-influence`` without, and
            ``drop`` with ``within_drop``.
        settings: of the score.
        alpha: keep the layers up to the last whose score falls below this share of the last layer's, in (0, 1]; for
            scores of depth. With ``within_drop`` it only says which layers may go.
        keep: keep so many layers: the first ones by a score of depth, the best by a score of single layers.
        drop: drop these layers, by number from 0, as ``7,9,11``.
        within_drop: drop as many layers as leave the task's first metric at most so much worse on held-out samples, by
            the end of its 95 % interval: in the order of the score, and as ``drop`` the least harmful, measured again
            after each. When none of these four is given 0.02, of the layers that may go by ``alpha`` 0.3.
        repair: close each gap by a linear map, fitted on the samples and folded into the layer before it; when None
            where a measured loss decides, as far as gaps can be closed.
        retrain: finetune what is left on the same samples, as `finetune` does, and write that; both steps are recorded.
        method, epochs, steps, minutes, learning_rate: of that training; the method is that of the model's last
            finetuning when None, ``lora`` where there was none.
        stability: score again with other seeds of t-SNE and on halves of the samples.
        delta: write which layers stay and what the task changed in them, on the model beneath, or a whole model; as
            ``model`` is when None.
        plot: a picture of the scores, ``.png`` or ``.svg``, and of the maps that they are taken of.
        task, num_samples, image_size, max_length, image_column, text_column, label_column: how to read the data; scores
            look at 2,000 samples at most when None. A training takes them too.
        streaming: read a data set of the hub as it comes, keep no copy of it, and score on its first rows; a training
            reads on, for as many ``steps`` as it is told.
        workers: processes that read samples ahead, 0 for none; when None as many as pay, within the cores.
        batch_size: samples at once, of the training too.
        max_drop, min_quality: gates on the test split; a drop is against the earliest model of the chain with the same
            head.
        max_params, max_bytes: gates on the size.
        max_shard_size: bytes per weight file, as ``5GB``.
        dry_run: stop at the decision and write nothing.
        device, seed: where to compute, and which samples to take.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    given = locals()
    asked, reading, gates = depth.asked(alpha, keep, drop, within_drop), Reading.of(given), Gates.of(given)
    data, shard_bytes = None if data is None else spec_of(data, reading), write.shard_bytes(max_shard_size)
    refuse_unwritable("--plot", plot)
    wanted = None if score is None else scores.named(score, settings or {})
    stored, as_delta = _loaded(model, delta, data, repair=bool(repair))
    closes = repair if repair is not None or (asked.within_drop is not None and not as_delta) else False
    of_training = {name: given[name] for name in ("method", "epochs", "steps", "minutes", "learning_rate")}
    of_it = {**of_training, "batch_size": batch_size}
    training = retraining.options(stored, data, of_it, reading) if retrain else None

    runs = runnable(replace(stored, module=detached(stored.module), notes=[]), device=device)
    names = layers_of(stored, runs, asked)
    few = replace(reading, num_samples=num_samples or POINTS)
    some = samples_of(runs, data, few, wanted, asked, trains=retrain)
    refuse_idle(some.task if some else None, max_drop)
    chosen = score_of(wanted, settings or {}, some, asked, data)
    if asked.usual and chosen is not None and not chosen.is_of_depth:
        asked = replace(asked, alpha=None)  # a share of the last score means nothing there
    if stability:
        evidence.refuse_unrepeatable(chosen)
    work = Work(stored, runs, names, chosen, some, asked, batch_size, stability, seed, closes)
    report = Report("prune-layers", notes=[*stored.notes, *(some.notes if some else [])])
    if not retrain:
        report.notes += retraining.idle(of_training)
    if dry_run:
        choice, _ = _decide(work, report)
        report.notes.append("dry run: nothing was written")
        return _complete(report, stored, plot, choice, max_params, max_bytes)

    request = {
        "command": "prune-layers",
        "data": some.about if some else None,
        "score": chosen.word if chosen else None,
        "settings": dict(settings or {}),
        **asked.request(),
        "repair": repair,
        "stability": stability,
        "delta": as_delta,
        **reading.request(),
        "max_shard_bytes": shard_bytes,
        "device": device,
        "seed": seed,
    }
    against = stored if max_drop is None else baseline.of_gate(stored)
    output = write.output_folder(output_dir, stored, "prune-layers")
    prune = functools.partial(_prune, work, report, request, overwrite=overwrite)
    if training and data is not None:
        again = functools.partial(finetune, data=data, device=device, **training, **reading.parameters())
        report, decided = retraining.trained_again(stored, output, request, training, prune, again, overwrite=overwrite)
    else:
        report, decided = prune(output)
    _complete(report, stored, plot, decided, max_params, max_bytes)
    if some is not None and data is not None:
        exam, learnt = Exam(data, reading, gates, device=device), some.about["split"]
        quality.measure_on_test(report, stored, exam, learnt=learnt, labelled=some.labelled, against=against)
        retraining.tell_quality(report)
    _summarise(report, asked, data, trained=retrain)
    return report


def _summarise(report: Report, asked: depth.Asked, data: str | None, *, trained: bool) -> None:
    """Say which layers went and what that cost, and warn where layers were asked for by number and cost quality."""
    rows, known = report.data.get("layers"), report.data.get("measured", {})
    if rows is None:  # of a finished folder whose `result.json` is gone
        brief.tell(report, "drop layers", then=brief.time(report.artifact))
        return
    score, gone = report.data["score"], [row["name"] for row in rows if not row["kept"]]
    came = {"layers": f"{len(rows) - len(gone)} of {len(rows)} stay" + (f"; gone: {', '.join(gone)}" if gone else "")}
    if "metric" in known:
        came["held out"] = f"{known['metric']} {figure(known['before'])} before, {figure(known['after'])} after"
        came["held out"] += ", gaps closed by linear maps" if known["repaired"] and gone else ""
        if known["stopped"] and known["stopped"]["cost"]:
            cost = Interval(**known["stopped"]["cost"])
            came["stays"] = f"`{known['stopped']['name']}`: without it {known['metric']} loses {cost}"
    if gone and not trained and asked.within_drop is None and (lost := quality.loss(report.data)):
        hint = "train what is left (`peftc finetune`, or `--retrain`), or leave it to peftc how many layers go"
        report.warnings.append(f"the layers that were asked to go cost {lost}: {hint}")
    trains = bool(gone) and not trained
    then = brief.command("finetune", report.artifact, "--data", data or brief.DATA)
    brief.tell(report, asked.said(score), came, then=then if trains else brief.time(report.artifact))


def _loaded(model: Any, delta: bool | None, data: str | None, *, repair: bool) -> tuple[Model, bool]:
    """Load what may be pruned, and say whether a delta is to be written of it.

    Raises:
        UsageError: a repair has no samples, or would change weights of the base.
    """
    if repair and data is None:
        raise UsageError("`--repair` fits what closes the gap to samples", hint="name some: `--data DATA`")
    stored = load(model, merge=False)
    as_delta = is_delta(stored) if delta is None else delta
    if not as_delta:
        stored, _ = without_updates(stored)
    elif repair:
        raise UsageError("`--repair` changes weights of the base, which a delta leaves alone", hint="add `--full`")
    ordered.refuse_ordered(stored)
    if stored.manifest is None and not stored.files:
        refuse_unbuildable(stored)
    return stored, as_delta


def _prune(
    work: Work, report: Report, request: dict[str, Any], output: Path, *, overwrite: bool
) -> tuple[Report, Choice | None]:
    """Decide and write, where it was not done before; return the report, and the choice where one was made."""
    with write.writing(work.stored, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            return write.already(job, "prune-layers"), None
        job.require(tensor_bytes(work.stored.module))
        decided, shorter = _decide(work, report)
        _carry_out(job, base, request, report, work, shorter, decided.seen)
    return report, decided


def _decide(work: Work, report: Report) -> tuple[Choice, Shorter]:
    """Decide which layers stay, build the shorter model, and say so."""
    choice = choose(work, report)
    kept = [work.names[at] for at in choice.decision.kept]
    shorter = shorter_of(work, kept, report)
    tell(report, work, choice)
    report.data["size"] = _sizes(work.stored, shorter.model)
    report.tables.append(size_table(report.data["size"]))
    if len(work.given.train if work.given else ()) == POINTS:
        report.notes.append(f"{POINTS:,} samples, the classes as even as they allow; `--num-samples` takes more")
    if len(kept) == len(work.names):
        more = "; take more samples, allow more (`--within-drop`), or say how many (`--keep`)"
        report.warnings.append(
            f"no layer was dropped: all of them are needed by this rule{more if choice.measured.get('stopped') else ''}"
        )
    elif work.asked.within_drop is None:
        report.notes.append(f"{retraining.UNTRAINED}: `peftc finetune` does, or `--retrain`")
    return choice, shorter


def _sizes(before: Model, after: Model) -> dict[str, dict[str, Any]]:
    """Return parameters, multiply-adds and bytes of two models."""
    sizes = {}
    for when, model in (("before", before), ("after", after)):
        work = costs.work(one_dtype(model))
        stored = sum(path.stat().st_size for path in model.files) or tensor_bytes(model.module)
        sizes[when] = {"parameters": parameters(model.module), "macs": work.macs, "bytes": stored}
    return sizes


def _carry_out(
    job: Job,
    base: dict[str, Any],
    request: dict[str, Any],
    report: Report,
    work: Work,
    shorter: Shorter,
    seen: Seen | None,
) -> None:
    """Write, reload and compare; the first process does."""
    if processes.rank():
        return
    if work.repair is not False and work.given is not None and shorter.renamed.keys() != {*work.names}:
        closing.close_gaps(work, shorter, report)
    was = shorten.in_base(work.stored, work.names)
    kept = [was[name] for name in shorter.renamed] if len(shorter.renamed) < len(work.names) else None
    pieces = pieces_of(shorter.model)
    beneath = None
    if request["delta"]:
        names, there = of_shorter(work.stored, shorter)
        pieces = {name: pieces[name] for name in names}
        beneath = reference(work.stored, base, there)
    record = write.write_artifact(
        job,
        shorter.model,
        base,
        request,
        pieces,
        shorter.modules,
        max_shard_bytes=request["max_shard_bytes"],
        kept_layers=kept,
        adapters=shorter.adapters,
        delta=beneath,
        skipped=shorter.skipped,
    )
    expected, _ = without_updates(replace(shorter.model, manifest=None))
    report.warnings += write.verify(job.folder, expected)
    report.data["size"]["after"]["bytes"] = record.weight_bytes
    report.tables[-1] = size_table(report.data["size"])
    if seen and seen.maps:
        maps.write(job.folder, seen.maps, torch.cat(seen.labels).tolist(), work.stored.labels)
    write.finish(job, record, report, place_of(work.runs.module))


def _complete(
    report: Report,
    stored: Model,
    plot: str | Path | None,
    choice: Choice | None,
    max_params: float | None,
    max_bytes: float | None,
) -> Report:
    """Draw the picture and add the gates on the size."""
    if plot is not None and processes.rank() == 0:
        _draw(report, stored, Path(plot), choice)
    gate_size(report, max_params, max_bytes)
    return report


def _draw(report: Report, stored: Model, path: Path, choice: Choice | None) -> None:
    """Draw the scores and the maps that they are taken of; of an artifact that was there, those that it keeps."""
    seen = choice.seen if choice else None
    shown = maps.read(report.artifact) if choice is None and report.artifact is not None else None
    if seen and seen.maps:
        labels = torch.cat(seen.labels).tolist()
        there, names = sorted({*labels}), dict(enumerate(stored.labels or []))
        points = {name: each.tolist() for name, each in seen.maps.items()}
        places = [there.index(label) for label in labels]
        shown = maps.Maps(len(labels), [str(names.get(at, at)) for at in there], places, points)
    if shown is not None and not shown.points.keys() >= {row["name"] for row in report.data["layers"]}:
        shown = None
    draw(path, pictures.of_layers(stored.name, report.data, shown))
    report.notes.append(f"scores in `{path}`")
    if shown is not None and len(shown.labels) < shown.samples:
        kept = f"{len(shown.labels)} of {shown.samples:,} samples"
        report.notes.append(f"its maps show {kept}, those that the artifact keeps: `--dry-run` draws all")
