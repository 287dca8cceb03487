"""Source > Model > statistics over a calibration set > a folder that many decompositions reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftc import processes
from peftc.calibration import memory, statistics
from peftc.calibration.collection import Statistics, collect, identity_of
from peftc.calibration.lanes import LANES
from peftc.calibration.prepared import Request, prepare
from peftc.data.given import Data, spec_of
from peftc.errors import UsageError
from peftc.factors import ordered, spectra, tables
from peftc.factors.asked import eligible
from peftc.factors.factoring import Factoring
from peftc.models import write
from peftc.models.load import load, refuse_non_finite
from peftc.models.model import Model
from peftc.models.place import device_of, solver_device
from peftc.nn.surgery import parameters
from peftc.options import Calibration, Reading
from peftc.pages import brief
from peftc.pages.records import statistics_table
from peftc.plans.plan import Target
from peftc.report import Report, size
from peftc.store import artifact, verified
from peftc.store.header import read_header
from peftc.store.job import Job
from peftc.store.manifest import STATISTICS, Manifest
from peftc.store.source import Source

ONE_FILE = 1 << 62  # bytes: the statistics are never cut into shards, because a module's are read on their own anyway


def calibrate(
    model: str | Path | Source | nn.Module | Model,
    *,
    output_dir: str | Path | None = None,
    data: Data,
    method: str = "auto",
    conv_method: str = "spatial",
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    calibration_samples: int = 512,
    calibration_tokens: float | None = None,
    max_memory: str | float | None = None,
    task: str | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    seed: int = 0,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Report:
    """Collect the statistics that a method asks for, once, for `decompose` to use at any budget.

    Args:
        model: any form of MODEL; it is not changed.
        output_dir: the folder of the statistics; ``<model>-calibrate`` when None.
        data: the calibration set: samples whose labels, if any, are not looked at, or ``generated:N``; its train split
            where it has one.
        method: whose statistics; ``auto`` is `kfac`, and what it asks for serves `whitened` too.
        conv_method: the form in which k x k convolutions will be factored.
        include, skip: patterns over dotted names; a skip beats an include.
        calibration_samples, calibration_tokens: at most so many.
        max_memory: bytes of anonymous memory (what is mapped from files apart), or of the device, to calibrate within.
        task: what the model is for; guessed when None.
        image_size, max_length, image_column, text_column, label_column: how to read the data.
        streaming: read a data set of the hub as it comes, keep no copy of it, and calibrate on samples of its first
            rows.
        workers: processes that read samples ahead, 0 for none; when None as many as pay, within the cores.
        batch_size: samples at once, >= 1.
        device, seed: where and with which random numbers to compute.
        dry_run: open the data, and write nothing.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    given = locals()
    reading, calibration = Reading.of(given), Calibration.of(given)
    factorize = spectra.factorizer(method, conv_method, None, with_data=True)
    if not factorize.needs:
        why = "it takes the weights alone"
        hint = f"decompose at once: `peftc decompose MODEL --method {factorize.name}`"
        raise UsageError(f"`--method {factorize.name}` needs no statistics", why=why, hint=hint)
    asked = Request.of(spec_of(data, reading), reading, calibration, batch_size)
    loaded = memory.bounded(load(model), max_memory)
    ordered.refuse_ordered(loaded)
    refuse_non_finite(loaded)
    targets, reasons = eligible(loaded, conv_method=conv_method, include=include, skip=skip)
    work = Factoring(loaded, targets, factorize, solver_device(device_of(device)), reasons)
    work.leave_uncalled(include)
    prepared = prepare(loaded, asked, device)
    if dry_run:
        report = Report("calibrate", {"eligible": list(work.targets), "data": _without_sketch(prepared.data)})
        report.tables.append(tables.dense_table([], reasons))
        report.notes += [
            *prepared.notes,
            f"{len(work.targets)} modules: {', '.join(factorize.needs)}, for `{factorize.name}`",
            "dry run: nothing was written",
        ]
        return report
    request = {
        "command": "calibrate",
        "method": factorize.name,
        "conv_method": conv_method,
        "include": list(include),
        "skip": list(skip),
        "device": device_of(device).type,
        "seed": seed,
        **identity_of(prepared),
    }
    output = write.output_folder(output_dir, loaded, "calibrate")
    with write.writing(loaded, output, request, overwrite=overwrite) as (job, base):
        if job.done:
            report = write.already(job, "calibrate")
        else:
            job.require(_least_bytes(work.targets, factorize.needs))
            found = collect(prepared, work.targets, factorize.needs, job.work)
            found.note |= {"method": factorize.name, "eligible": list(work.targets), "collected": request}
            report = _report(found, work.targets, reasons)
            if processes.rank() == 0:
                _write(job, loaded, base, request, found, report, work)
    _summarise(report, loaded, asked.data)
    return report


def _summarise(report: Report, model: Model, data: str) -> None:
    known = report.data
    if "needs" not in known:  # of a finished folder whose `result.json` is gone
        brief.tell(report, f"statistics of `{data}`")
        return
    there = f"{', '.join(known['needs'])} of {len(known['modules'])} modules, {size(known.get('bytes', 0))}"
    words = ("decompose", model.source.spec, "--statistics", report.artifact, "--ratio", "0.5", "-o", "small")
    asked = f"statistics for --method {known['method']}, of {known['samples']:,} samples of `{data}`"
    brief.tell(report, asked, {"collected": there}, then=brief.command(*words))


def _least_bytes(targets: Mapping[str, Target], needs: Sequence[str]) -> int:
    """Return what the gradients of the outputs alone take, in every part, their sum and the folder."""
    outs = [statistics.matrix_shape(target)[0] for target in targets.values()]
    grams = sum(out**2 for out in outs if out <= statistics.LARGEST_GRAM)
    return 8 * (LANES + 2) * grams if "output_gradient_gram" in needs else 0


def _write(
    job: Job,
    model: Model,
    base: dict[str, Any],
    request: dict[str, Any],
    found: Statistics,
    report: Report,
    work: Factoring,
) -> None:
    """Write the statistics and what is known of them, check the bytes, and let the folder appear."""
    pieces = {name: artifact.from_file(info) for name, info in read_header(found.path)[0].items()}
    files = artifact.write_weights(job.folder, pieces, job.id, ONE_FILE, STATISTICS)
    files[f"{STATISTICS}.json"] = artifact.write_json(job.folder / f"{STATISTICS}.json", found.note)
    earlier = model.manifest.steps if model.manifest else []
    record = Manifest(
        id=job.id,
        base=base,
        steps=[*earlier, {"id": job.id, "request": request}],
        files=files,
        parameters=parameters(model.module),
        preprocess=model.preprocess,
        labels=model.labels,
    )
    promised = {job.folder / name: entry["sha256"] for name, entry in files.items()}
    if changed := verified.differing(promised, remembered=False):
        raise write.differs(job.folder, f"`{changed[0].name}` holds other bytes")
    report.data["bytes"] = record.weight_bytes
    report.notes.append(f"the folder takes {size(record.weight_bytes)}")
    write.finish(job, record, report, work.device)


def _without_sketch(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "sketch"}


def _report(found: Statistics, targets: Mapping[str, Target], reasons: Mapping[str, str]) -> Report:
    """Say of which modules there are statistics, and over how many rows."""
    about = found.note["modules"]
    never = {name: found.why_not(name) for name in targets if name not in found}
    report = Report("calibrate", {key: found.note[key] for key in ("method", "needs", "samples", "modules")})
    report.data["data"] = _without_sketch(found.note["data"])
    report.data["dense"] = [{"name": name, "reason": reason} for name, reason in {**reasons, **never}.items()]
    report.tables += [statistics_table(about), tables.dense_table([], {**reasons, **never})]
    report.notes += [*found.notes, f"for `--method {found.note['method']}`: {', '.join(found.note['needs'])}"]
    report.warnings += found.warnings
    return report
