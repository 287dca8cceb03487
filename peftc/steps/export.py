"""Artifact [> factors multiplied out] > Format > its own runtime: same numbers, how quick > files > Report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.data.given import Data, spec_of
from peftc.errors import DataError, UsageError
from peftc.formats import foreign, parity, summary
from peftc.formats.exported import Exported, Inputs, of_sentences
from peftc.formats.judged import Judge, judge_of
from peftc.formats.multiplied import multiplied
from peftc.methods import registry
from peftc.models import padding, write
from peftc.models.load import load
from peftc.models.model import Model, detached
from peftc.models.place import runnable
from peftc.nn import surgery
from peftc.nn.surgery import parameters, tensor_bytes
from peftc.options import Gates, Reading
from peftc.report import Report
from peftc.store import artifact, manifest
from peftc.store.exports import ExportRecord
from peftc.store.job import Job, execution
from peftc.store.source import EXPORT, PARTS, Source
from peftc.tasks.figures import add_gates
from peftc.tasks.table import TASKS


def export(
    model: str | Path | Source | nn.Module | Model,
    *,
    format: str | None = None,
    output_dir: str | Path | None = None,
    dense: bool = False,
    settings: Mapping[str, Any] | None = None,
    data: Data | None = None,
    task: str | None = None,
    num_samples: int = 64,
    image_size: int | None = None,
    max_length: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    batch_size: int = 16,
    max_drop: float | None = None,
    min_quality: float | None = None,
    max_bytes: float | None = None,
    rounds: int = 10,
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Write a model as other programs read it, load it with theirs, and check that it computes the same.

    Args:
        model: an artifact, or any other model; it is not changed.
        format: of the table of methods: ``hf``, ``hf-code``, ``timm``, ``safetensors``, ``onnx``, ``torch-export``,
            ``executorch`` or ``peft``.
        output_dir: the folder to write; ``<model>-export`` when None.
        dense: multiply factors out first.
        settings: of the format.
        data: samples to compare on, and where they have labels to measure quality on; random inputs alone when None.
        task: of the model, as for `evaluate`.
        num_samples: of ``data``, to compare on.
        image_size, max_length: of the inputs, instead of the model's own; a graph keeps its image size.
        image_column, text_column, label_column: of ``data``, where their names are not usual ones.
        streaming: read a data set of the hub as it comes, keep no copy of it, and compare on its first rows.
        workers: processes that read samples ahead, 0 for none; when None as many as pay, within the cores.
        batch_size: of the second timing; the first is of one sample.
        max_drop, min_quality: gates on all of ``data``, which needs labels then; a drop is against the
            earliest model of the chain with the same head.
        max_bytes: gate on the files together.
        rounds: timed rounds, at least 5.
        seed: which samples to take.
        overwrite: replace another export at ``output_dir``.

    Raises:
        PeftcError: with the cause, also where what was written computes something else; nothing is left then.
    """
    given = locals()
    reading, gates = Reading.of(given), Gates.of(given)
    data = None if data is None else spec_of(data, reading)
    word, written_by, chosen = _format(format, settings or {})
    unmerged = registry.trait(written_by, "UNMERGED", False)
    _check(word, rounds, batch_size, without_data=bool(gates) and data is None, dense_updates=unmerged and dense)

    stored = load(model)
    leaves = load(model, merge=False) if unmerged else multiplied(stored) if dense else stored
    runs = runnable(replace(stored, module=detached(stored.module), notes=[]), device="cpu")
    judge = judge_of(stored, runs, data, reading, gates, batch_size=batch_size) if data else None
    sides: dict[str, Any] = {"image_size": image_size, "max_length": max_length}
    pad = _padding(stored, runs)
    probes = parity.probes(runs, **sides)
    timed = [parity.example(runs, n, **sides) for n in dict.fromkeys((1, batch_size))]
    work = _Work(stored, leaves, runs, list(probes), timed, rounds, len(probes))
    if data is not None:
        work.batches += parity.real_inputs(runs, data, reading, batch_size)
    request = {
        "command": "export",
        "format": word,
        "dense": dense,
        "settings": dict(settings or {}),
        "data": None if data is None else str(data),
        **reading.request(),
        "num_samples": num_samples if data else None,
        "seed": seed,
        "is_judged": bool(gates),
    }
    base = write.base_record(stored)
    identity = write.identity(stored, base, request)
    output = write.output_folder(output_dir, stored, "export")
    with execution(output, identity, request, overwrite=overwrite, record=EXPORT) as job:
        if job.done:
            report = write.already(job, "export")
        else:
            parity.refuse_unsteady(runs, probes)
            job.require(tensor_bytes(leaves.module))
            exported = _padded(written_by(leaves, parity.example(runs, 2, **sides), job.folder, **chosen), stored, pad)
            _bring_companions(job.folder, stored)
            report = _compared(work, exported, word, data, judge)
            if word == "hf":
                report.notes += _consumed(work, job.folder, exported)
            _finish(job, report, work, exported, word, request, base)
    if gates:
        found = report.data["quality"]
        add_gates(report, found, TASKS[found["task"]].metrics[0], gates)
    report.at_most("--max-bytes", max_bytes, report.data["bytes"])
    summary.tell(report, stored.name)
    return report


def _check(word: str, rounds: int, batch_size: int, *, without_data: bool, dense_updates: bool) -> None:
    """Refuse options that do not go together.

    Args:
        word: of the format.
        rounds, batch_size: of timing.
        without_data: a gate asks for samples, and none are named.
        dense_updates: products of factors are asked of a format that writes updates.

    Raises:
        UsageError, DataError: with what to change.
    """
    if rounds < 5 or batch_size < 1:
        raise UsageError(f"`--rounds {rounds} --batch-size {batch_size}` is too few", hint="take 5 and 1 at least")
    if without_data:
        hint = "name some with labels: `--data DATA`"
        raise DataError("`--max-drop` and `--min-quality` need samples to measure on", hint=hint)
    if dense_updates:
        why = "it writes updates, and no weights"
        raise UsageError(f"`--dense` does not go with `--format {word}`", why=why, hint="leave one of them out")


def _compared(work: _Work, exported: Exported, word: str, data: str | None, judge: Judge | None) -> Report:
    """Compare what was written with the model, and measure its quality in its own runtime where that can be told."""
    try:
        report = work.check(exported, word, data)
        report.warnings += summary.of_rounding(exported, is_gated=judge is not None and judge.is_gate)
        if judge is not None:
            judge.measure(report, work.runs, exported)
    finally:
        exported.close()
    return report


def _bring_companions(folder: Path, stored: Model) -> None:
    """Add what travels along."""
    there = {path.name for path in folder.iterdir()}
    for name, content in write.companions(stored).items():
        if name not in there:
            artifact.write_companion(folder / name, content)


def _consumed(work: _Work, folder: Path, exported: Exported) -> list[str]:
    """Compare what sentence-transformers computes with a folder that is for it, where it is installed; return notes.

    Raises:
        ExportError: it does not load it, or computes something else.
    """
    consumer = of_sentences(work.leaves, folder, factored=bool(exported.expected))
    if consumer is None:
        unasked = f"`{PARTS}` asks for sentence-transformers, which is not installed: only transformers ran it"
        return [unasked] if (folder / PARTS).is_file() else []
    try:
        found = parity.compare(work.runs, consumer, work.batches)
        consumer.tolerance = exported.tolerance
        parity.refuse_other(work.stored.name, found, consumer)
    finally:
        consumer.close()
    return [f"{consumer.runtime} loads it too; its vectors of tokens deviate by {found.deviation:.2g} of the largest"]


def _format(name: str | None, settings: Mapping[str, Any]) -> tuple[str, Callable[..., Exported], dict[str, Any]]:
    """Return the word of a format, its function, and its settings.

    Raises:
        UsageError: none is named, or there is none of that name, or a setting is not one of its own.
    """
    known = ", ".join(f"`{each.replace('_', '-')}`" for each in registry.METHODS["format"])
    if name is None:
        raise UsageError("say what to write", why=f"`--format` is one of {known}")
    foreign.refuse_elsewhere(name)
    written_by, word = registry.find("format", name.replace("-", "_"), "--format"), name.replace("_", "-")
    return word, written_by, registry.with_settings(written_by, word, settings)


def _padding(stored: Model, runs: Model) -> int | None:
    """Return the id by which what is written finds the last token of a text, which the model to compare with is told.

    None for a model that looks for no such token.
    """
    if not padding.reads_last_token(runs.module):
        return None
    named = padding.padding_id(runs.module)
    pad = padding.id_to_write(stored) if named is None else named
    runs.module.config.get_text_config().pad_token_id = pad
    return pad


def _padded(exported: Exported, stored: Model, pad: int | None) -> Exported:
    """Return an export whose inputs are padded as it expects them, and that says so."""
    if pad is None:
        return exported
    run, prepare = exported.run, exported.prepare
    exported.run = lambda inputs: run(padding.filled(inputs, pad))
    exported.prepare = lambda inputs: prepare(padding.filled(inputs, pad))
    exported.about["pad_token_id"] = pad
    if padding.padding_id(stored.module) is None:
        exported.notes.append(
            f"the model's config names no padding: several texts at once are padded with token {pad}, which is told "
            "from the last token of each by its id"
        )
    return exported


@dataclass
class _Work:
    """What there is to compare."""

    stored: Model  # the model as it is stored
    leaves: Model  # as it is written
    runs: Model  # the stored one, ready to run
    batches: list[Inputs]  # inputs to compare on
    timed: list[Inputs]  # inputs to time
    rounds: int  # of timing
    drawn: int = 0  # how many of the first batches are random inputs

    def check(self, exported: Exported, word: str, data: str | None) -> Report:
        """Compare what was written with the model, look for its factors, and time both.

        Raises:
            ExportError: it computes something else, or factors are gone.
        """
        report = Report("export", notes=[*self.stored.notes, *exported.notes])
        parity.refuse_merged(self.stored.name, exported)
        found = parity.compare(self.runs, exported, self.batches)
        if self.leaves is not self.stored and exported.tolerance is not None:
            stored = {tensor.dtype for tensor in surgery.tensors_of(self.leaves.module).values()}
            exported.tolerance = max(exported.tolerance, *(parity.ROUNDED.get(dtype, 0.0) for dtype in stored))
        parity.refuse_other(self.stored.name, found, exported)
        sizes = [len(next(iter(batch.values()))) for batch in self.batches]
        report.data = {
            "format": word,
            "runtime": exported.runtime,
            "samples": sum(sizes),
            "random_inputs": sum(sizes[: self.drawn]),
            **asdict(found),
            "tolerance": exported.tolerance,
            "factors": len(exported.expected),
            "products": None if exported.products is None else len(exported.products),
            "times": parity.times(self.runs, exported, self.timed, self.rounds),
        }
        if data is None:
            report.notes.append("compared on random inputs; `--data` compares on samples of yours")
        if found.spread <= parity.NOTHING:
            report.warnings.append(
                f"`{self.stored.name}` gives one output whatever the input: that the export does so too says little"
            )
        return report


def _finish(
    job: Job,
    report: Report,
    work: _Work,
    exported: Exported,
    word: str,
    request: Mapping[str, Any],
    base: Mapping[str, Any],
) -> None:
    """Write ``export.json`` and let the folder appear."""
    leaves = work.leaves
    files = {
        path.relative_to(job.folder).as_posix(): {"sha256": manifest.file_digest(path), "bytes": path.stat().st_size}
        for path in sorted(job.folder.rglob("*"))
        if path.is_file()
    }
    record = work.stored.manifest
    about = {
        "format": word,
        "library": leaves.library,
        "architecture": leaves.architecture,
        "preprocess": leaves.preprocess,
        "labels": leaves.labels,
        **_card_of(word),
        "modules": leaves.manifest.modules if leaves.manifest else {},
        **exported.about,
        "made_from": {
            "base": base,
            "steps": record.steps if record else [],
            "kept_layers": record.kept_layers if record else [],
            "parameters": parameters(leaves.module),
        },
    }
    total = sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file())
    report.data |= {"files": files, "bytes": total}
    report.artifact = job.output
    report.tables.insert(0, summary.table_of(report.data))
    result = {"seconds": round(job.seconds, 3), **write.environment(torch.device("cpu"))}
    result |= {"places": write.places(work.stored), "report": write.kept(report)}
    job.finish(ExportRecord(job.id, request, files, about), result)


def _card_of(word: str) -> dict[str, Any]:
    """Return what the file of a format has for a card: the library that loads it, tags, and lines of Python."""
    function = registry.find("format", word.replace("-", "_"), "--format")
    library, use = registry.trait(function, "LIBRARY", None), registry.trait(function, "USE", None)
    return {"library_name": library, "tags": list(registry.trait(function, "TAGS", ())), "use": use}
