"""Pruned artifact > finetune > one artifact with both steps in its manifest: what ``prune-layers --retrain`` adds.

The result is byte for byte what `prune-layers` and `finetune` write one after the other, so its manifest says these two
steps. The pruned model lies in the working folder of the job, where a resume finds it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftc import processes
from peftc.errors import UsageError
from peftc.measure.intervals import Interval
from peftc.methods import registry
from peftc.models import write
from peftc.models.model import Model
from peftc.models.place import device_of
from peftc.options import EPOCHS, Reading, Recipe, length
from peftc.report import Report, Table, size_table
from peftc.store import artifact, manifest
from peftc.store.job import Job
from peftc.training.student import refuse_others

USUAL = "lora"  # where the model was not finetuned before
UNTRAINED = "nothing has trained what is left"  # begins a note, where a training would be next


def options(model: Model, data: str | None, asked: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """Return options of `finetune`: those asked for, checked, and the method that the model was last tuned by."""
    if data is None:
        raise UsageError("`--retrain` trains on samples of the task", hint="name some: `--data DATA`")
    earlier = [step["request"] for step in (model.manifest.steps if model.manifest else [])]
    tuned = [request["method"] for request in earlier if request["command"] == "finetune"]
    long = length({**asked, **reading.parameters()}, EPOCHS)
    named = {name: value for name, value in {**asked, **long}.items() if value is not None}
    found = {"method": [USUAL, *tuned][-1], **named}
    registry.find("adapter", found["method"], "--method")
    refuse_others(model, found["method"])
    Recipe(**{name: value for name, value in found.items() if name != "method"})
    return {**found, "head": "keep"}


def idle(asked: Mapping[str, Any]) -> list[str]:
    """Return a note on options of a training, where there is none."""
    named = [f"`--{name.replace('_', '-')}`" for name, value in asked.items() if value is not None]
    return [f"nothing is trained: {', '.join(named)} act with `--retrain`"] if named else []


def trained_again(
    stored: Model,
    output: Path,
    request: dict[str, Any],
    training: Mapping[str, Any],
    prune: Callable[[Path], tuple[Report, Any]],
    finetune: Callable[..., Report],
    *,
    overwrite: bool,
) -> tuple[Report, Any]:
    """Prune into the working folder, finetune what is there, and let that be the artifact.

    Args:
        stored: the model.
        output: the folder to be.
        request: of the pruning alone.
        training: options of the training, for the request.
        prune: writes the pruned artifact into a folder; returns its report, and what was decided.
        finetune: the step of that name, with all but a model, a folder and the size of its files.
        overwrite: replace another artifact at ``output``.

    Returns:
        one report, and what ``prune`` decided; None where it was done before.
    """
    asked = request | {"retrain": dict(training)}
    with write.writing(stored, output, asked, overwrite=overwrite) as (job, _):
        if job.done:
            return write.already(job, "prune-layers"), None
        report, decided = prune(job.work / "pruned")
        processes.wait()  # until the first one has written it
        source = replace(stored.source, spec=str(job.work / "pruned"), allow_code=True)
        tuned = finetune(source, output_dir=job.work / "tuned", max_shard_size=request["max_shard_bytes"])
        if processes.rank() == 0:
            _join(report, tuned, job.work / "tuned")
            _take(job, report, job.work / "tuned")
    return report, decided


def _join(report: Report, tuned: Report, folder: Path) -> None:
    """Add what the training says to the report of the pruning."""
    written = artifact.read_result(folder)["report"]
    size, quality = report.data["size"]["after"], tuned.data.get("quality")
    size |= written["data"].pop("size")["after"]
    report.tables[-1] = size_table(report.data["size"])
    report.tables += [Table(**table) for table in written["tables"]]
    earlier = [note for note in report.notes if not note.startswith((UNTRAINED, "already done"))]
    report.notes = list(dict.fromkeys([*earlier, *written["notes"]]))
    report.warnings = list(dict.fromkeys([*report.warnings, *written["warnings"]]))
    report.data["retrain"] = written["data"] | ({"before": quality["against"]["metrics"]} if quality else {})


def _take(job: Job, report: Report, folder: Path) -> None:
    """Move the trained artifact into place, under the name that both steps have."""
    record = manifest.read(folder)
    places = artifact.read_result(folder).get("places", {})
    job.places = {each: place for each, place in places.items() if each != record.steps[-2]["id"]}
    job.folder.rmdir()
    folder.rename(job.folder)
    job.settle(record.id)
    write.finish(job, record, report, device_of(str(job.request["device"])))


def tell_quality(report: Report) -> None:
    """Put the model, the pruned one and the trained one below each other, where they were measured."""
    quality, before = report.data.get("quality"), report.data.get("retrain", {}).get("before")
    if not quality or not before:
        return
    stages = {quality["against"]["name"]: quality["against"]["metrics"], "pruned": before}
    stages["trained again"] = quality["metrics"]
    rows = [[stage, *(str(Interval(**of[name])) for name in before)] for stage, of in stages.items()]
    report.tables.append(Table("quality", ["", *before], rows))
