"""Collect statistics over a calibration set, keep them as parts of a job, and hand them to methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from peftc import artifact, hooks, manifest, progress, tasks, unlabelled
from peftc.data import open_data
from peftc.data.tokens import sample, window
from peftc.errors import ArtifactError, DataError, UsageError, WeightError
from peftc.hooks import Collector, Found, Running, Site, Sums
from peftc.models import load
from peftc.models.inputs import main_output
from peftc.models.load import Model, detached
from peftc.nn import lowrank
from peftc.plan import Target
from peftc.report import grouped
from peftc.steps import write
from peftc.tasks import Batch, Encoded, Settings, Task

FILE = "statistics.safetensors"
GENERATED, GENERATED_LENGTH = "generated:", 128
LANES = 4  # parts of the calibration set that are summed apart, so that a resume and other processes add in one order
DRAWS = 2  # of the model's own predictions, for every sample
ENOUGH = 4  # rows per feature, below which a moment is a poor estimate


@dataclass(frozen=True)
class Request:
    """What the user asked of the calibration.

    Attributes:
        data: a `--data` spec, or ``generated:N``.
        task: a name of the task table; guessed from the model when None.
        samples: at most.
        tokens: at most, padding apart; image patches count as tokens of the first module that is watched.
        batch_size: samples at once.
        image_size, max_length: as for an evaluation.
        seed: of the choice of samples and of drawn predictions.
    """

    data: str
    task: str | None = None
    samples: int = 512
    tokens: int | None = None
    batch_size: int = 8
    image_size: int | None = None
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UsageError: naming the option.
        """
        for option in ("samples", "tokens", "batch_size"):
            value = getattr(self, option)
            if value is not None and value < 1:
                name = option if option == "batch_size" else f"calibration_{option}"
                raise UsageError(f"`--{name.replace('_', '-')}` is {value}", why="at least one is needed")


@dataclass
class Statistics:
    """Collected statistics, read one module at a time.

    Attributes:
        path: the safetensors file.
        note: ``needs``, ``samples``, ``rows``, ``data``, ``modules`` (name -> leader, side, form, lookup, rows);
            of those that `calibrate` wrote also ``method``, ``eligible`` (names) and ``collected`` (its request).
        notes, warnings: what people should know about them.
    """

    path: Path
    note: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.note["modules"]

    def why_not(self, name: str) -> str:
        """Return why there are no statistics of a module."""
        calibrated = name in self.note.get("eligible", (name,))
        return (
            "the calibration set never reaches it" if calibrated else "it was left out when statistics were collected"
        )

    def is_lookup(self, name: str) -> bool:
        """Return whether a module only looks rows up: its matrix is then (width, words)."""
        return bool(self.note["modules"][name]["lookup"])

    def of(self, name: str, device: torch.device) -> Found:
        """Return the statistics of one module on a device."""
        about = self.note["modules"][name]
        leader = about["leader"]
        with safe_open(self.path, "pt") as file:
            there = set(file.keys())

            def read(key: str) -> Tensor | None:
                return file.get_tensor(key).to(device) if key in there else None

            covariance = f"{leader}.input.covariance" if about["side"] == "input" else f"{name}.output.covariance"
            others = {
                "output_gradient_gram": read(f"{name}.gradient"), "weight_fisher": read(f"{name}.fisher"),
                "input_magnitude": read(f"{leader}.magnitude"),
            }  # fmt: skip
            return Found(
                about["side"], read(f"{leader}.input.mean"), read(covariance), read(f"{name}.output.mean"),
                {key: value for key, value in others.items() if value is not None}, about["rows"],
                read(f"{leader}.patch.mean"),
            )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A calibration set as a runnable copy of the model reads it.

    Attributes:
        model: on its device.
        task: of the model; None where nothing tells it.
        request: what was asked.
        encoded: the samples.
        data: what identifies them.
        labelled: whether they could measure quality as well.
        notes: what people should know about them.
    """

    model: Model
    task: Task | None
    request: Request
    encoded: Encoded
    data: dict[str, Any]
    labelled: bool
    notes: list[str]


def prepare(model: Model, request: Request, device: str) -> Prepared:
    """Open the calibration set, so that data that does not fit is refused before any work.

    Raises:
        DataError: the data cannot be read, or the model cannot read it.
    """
    subject = load.runnable(replace(model, module=detached(model.module)), device=device)
    task = tasks.named_task(request.task) if request.task else tasks.guess(subject)
    encoded, data, labelled, notes = _encode(subject, task, request)
    return Prepared(subject, task, request, encoded, data, labelled, notes)


def source(
    model: Model, needs: Sequence[str], data: str | None, folder: str | Path | None, device: str, **asked: Any
) -> Prepared | Statistics | None:
    """Return what a method's statistics will come from: the folder of `calibrate`, a calibration set, or nothing.

    Raises:
        UsageError: both were named for it, or statistics for a method that needs none.
    """
    if folder is not None:
        if not needs:
            raise UsageError("`--statistics` is of no use here", why="the method takes the weights alone")
        return read(Path(folder), model, needs)
    return prepare(model, Request(data, **asked), device) if needs and data is not None else None


def obtain(
    source: Prepared | Statistics, targets: Mapping[str, Target], needs: Sequence[str], folder: Path
) -> Statistics:
    """Return the statistics, collected now where they are not there yet.

    Raises:
        ArtifactError: those that are there are of none of the modules, or of another form.
    """
    if not isinstance(source, Statistics):
        return collect(source, targets, needs, folder)
    there = {name: source.note["modules"][name]["form"] for name in targets if name in source}
    if not there:
        raise ArtifactError(
            f"`{source.path.parent}` holds statistics of none of the modules that are to be factored",
            hint="collect them again, with the same `--include` and `--skip`",
        )
    other = next((name for name, form in there.items() if form != targets[name].form), None)
    if other is not None:
        raise ArtifactError(
            f"`{source.path.parent}` holds statistics of `{other}` as `{there[other]}`, not as `{targets[other].form}`",
            hint=f"add `--conv-method {there[other]}`, or collect them again",
        )
    return source


def identity(source: Prepared | Statistics | None, sensitivity: int = 0, sequential: bool = False) -> dict[str, Any]:
    """Return what of the statistics makes two requests the same question."""
    if source is None:
        return {}
    if isinstance(source, Statistics):
        return {"statistics": {"collected": source.note["collected"]}}
    extra: dict[str, Any] = {"sensitivity": sensitivity, **({"sequential": True} if sequential else {})}
    return {"statistics": {"data": source.data, "request": asdict(source.request)}, **extra}


def read(folder: Path, model: Model, needs: Sequence[str]) -> Statistics:
    """Return the statistics that `calibrate` wrote.

    Raises:
        ArtifactError: the folder holds none, or those of another model, or lacks what the method needs.
    """
    record = manifest.read(folder)
    note = artifact.statistics_note(folder, record)
    artifact.tensor_table(folder, record)
    theirs = record.base.get("files"), [step["id"] for step in record.steps[:-1]]
    earlier = model.manifest.steps if model.manifest else []
    if theirs != (write.base_record(model).get("files"), [step["id"] for step in earlier]):
        raise ArtifactError(
            f"the statistics in `{folder}` were collected on another model", why="its weights have other digests",
            hint="collect them again: `peftc calibrate MODEL --data DATA -o stats`",
        )  # fmt: skip
    lacking = [need for need in needs if need not in note["needs"]]
    if lacking:
        raise ArtifactError(
            f"`{folder}` lacks {', '.join(f'`{need}`' for need in lacking)}",
            why=f"it was collected for `--method {note['method']}`",
            hint="collect them again: `peftc calibrate MODEL --data DATA --method METHOD -o stats`",
        )  # fmt: skip
    return Statistics(folder / FILE, note, [f"statistics: `{folder}`", *note["notes"]], too_few(note))


def collect(prepared: Prepared, targets: Mapping[str, Target], needs: Sequence[str], folder: Path) -> Statistics:
    """Run the calibration set through the model once and return the statistics of every target that it reaches.

    Finished lanes lie in ``folder`` and are not run again.

    Raises:
        WeightError: the model gives NaN or infinite outputs.
    """
    path = folder / FILE
    note = write.read_note(path)
    if note is None:
        subject, encoded = prepared.model, prepared.encoded
        runs = hooks.batches(encoded.lengths, encoded.size, prepared.request.batch_size)
        sites = hooks.sites(subject, targets, lambda: _forward(subject, encoded.batch(runs[0][:1])))
        collector = Collector(subject, sites, needs)
        sums = _lanes(prepared, runs, collector, folder)
        found = hooks.tensors(sums, sites, lambda target: matrix_of(subject, target))
        note = _note(sums, sites, needs, prepared)
        write.save_part(path, {key: tensor.cpu() for key, tensor in found.items()}, note)
    return Statistics(path, note, list(note["notes"]), too_few(note))


def _encode(model: Model, task: Task | None, request: Request) -> tuple[Encoded, dict[str, Any], bool, list[str]]:
    """Return the samples as the model reads them, what identifies them, whether they have labels, and notes."""
    if request.data.startswith(GENERATED):
        number = request.data.removeprefix(GENERATED)
        if not number.isdecimal() or int(number) < 1:
            raise UsageError(f"`--data {request.data}` asks for no number of sequences", hint="as `generated:64`")
        if task is None or task.name != "causal-lm":
            raise DataError(f"cannot draw text from `{model.name}`", why="`generated:N` is for causal language models")
        length = min(window(model, request.max_length), request.max_length or GENERATED_LENGTH)
        dataset = sample(model, int(number), length, seed=request.seed + 1)  # an evaluation draws with the seed itself
    else:
        dataset = open_data(request.data, seed=request.seed, task=task.name if task else None, role="calibration")
    windows = task is not None and task.name.endswith("-lm")
    both = dataset.kind == "pairs" and not (task is not None and task.name == "text-classification")
    if not windows:  # of a pair both texts are samples
        dataset = dataset.take(-(-request.samples // 2) if both else request.samples, seed=request.seed)
    settings = Settings(request.image_size, request.max_length, request.samples, request.seed)
    encoded = unlabelled.encode(model, dataset, task, settings)
    about = {"spec": request.data, "split": dataset.split, "digest": dataset.digest, "samples": encoded.size}
    said = [f"calibration: {encoded.size} samples of split `{dataset.split}` of `{request.data}`"]
    return encoded, about, windows or dataset.labels is not None, said


def _lanes(prepared: Prepared, runs: list[list[int]], collector: Collector, folder: Path) -> Sums:
    """Sum over the batches, lane by lane, and add the lanes in order."""
    total = Sums()
    budget = prepared.request.tokens
    with progress.track("calibrating", len(runs)) as advance:
        for lane in range(LANES):
            part = folder / f"lane-{lane}.safetensors"
            mine = runs[lane::LANES]
            if write.read_note(part) is None:
                share = None if budget is None else -(-budget // LANES)
                _run_lane(prepared, mine, collector, share, advance)
                _save(part, collector.sums)
                collector.sums = Sums()
            else:
                for _ in mine:
                    advance("")
            total.merge(_read(part, load.place_of(prepared.model.module)))
    for lane in range(LANES):
        (folder / f"lane-{lane}.safetensors").unlink(missing_ok=True)
    if not total.samples:
        raise DataError(f"`{prepared.request.data}` holds no sample to calibrate on")
    return total


def _run_lane(
    prepared: Prepared, runs: list[list[int]], collector: Collector, tokens: int | None, advance: Callable[[str], None]
) -> None:
    model = prepared.model
    with collector.watching() as sums:
        for indices in runs:
            if tokens is None or _seen(sums) < tokens:
                batch = prepared.encoded.batch(indices)
                collector.see(batch.inputs)
                if collector.gradients:
                    seeds = [prepared.request.seed * 1_000_003 + index for index in indices]
                    _backward(model, prepared.task, batch, seeds)
                else:
                    _forward(model, batch)
                sums.samples += len(indices)
            advance("")


def _seen(sums: Sums) -> int:
    return max((one.count for name, one in sums.running.items() if name.endswith(".input")), default=0)


def _forward(model: Model, batch: Batch) -> Tensor:
    outputs = load.outputs(model, load.moved(model, batch.inputs))
    _refuse_non_finite(model, outputs)
    return outputs


def _backward(model: Model, task: Task | None, batch: Batch, seeds: Sequence[int]) -> None:
    """Run forward once, and backward from each of two draws of the model's own prediction."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    inputs = load.moved(model, batch.inputs)
    with torch.enable_grad():
        outputs = main_output(model, model.module(**inputs) if isinstance(inputs, dict) else model.module(inputs))
        _refuse_non_finite(model, outputs)
        if not outputs.requires_grad:
            return
        for draw in range(DRAWS):
            loss = unlabelled.loss_of_own_prediction(task, outputs, inputs, generators)
            (loss / DRAWS**0.5).backward(retain_graph=draw + 1 < DRAWS)


def _refuse_non_finite(model: Model, outputs: Tensor) -> None:
    if not torch.isfinite(outputs).all():
        raise WeightError(
            f"`{model.name}` gives NaN or infinite outputs on the calibration set",
            why="no statistic over them would mean anything",
            hint="look for NaN in its weights with `peftc analyze`, or calibrate in float32",
        )


def matrix_of(model: Model, target: Target) -> Tensor:
    """Return a module's weight as the matrix that calibration counts rows and columns of."""
    weight: Any = model.module.get_submodule(target.name).weight
    return lowrank.matrix(weight.detach(), target.form)


def _save(path: Path, sums: Sums) -> None:
    tensors: dict[str, Tensor] = {f"total:{name}": value for name, value in sums.totals.items()}
    for name, seen in sums.running.items():
        tensors[f"mean:{name}"] = seen.mean
        if seen.scatter is not None:
            tensors[f"scatter:{name}"] = seen.scatter
    counts = {name: seen.count for name, seen in sums.running.items()}
    write.save_part(path, tensors, {"samples": sums.samples, "counts": counts})


def _read(path: Path, device: torch.device) -> Sums:
    note = write.read_note(path)
    assert note is not None
    sums = Sums(samples=note["samples"])
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        for name, count in note["counts"].items():
            mean = file.get_tensor(f"mean:{name}").to(device).clone()
            scatter = file.get_tensor(f"scatter:{name}").to(device).clone() if f"scatter:{name}" in there else None
            sums.running[name] = Running(len(mean), scatter, mean, count)
        for key in sorted(there):
            if key.startswith("total:"):
                sums.totals[key.removeprefix("total:")] = file.get_tensor(key).to(device).clone()
    return sums


def _note(sums: Sums, sites: Mapping[str, Site], needs: Sequence[str], prepared: Prepared) -> dict[str, Any]:
    modules: dict[str, dict[str, Any]] = {}
    for name, site in sites.items():
        seen = sums.running.get(f"{site.leader}.input") or sums.running.get(f"{name}.output")
        sums_of = {
            "output_gradient_gram": f"{name}.gradient", "weight_fisher": f"{name}.fisher",
            "input_magnitude": f"{site.leader}.magnitude",
        }  # fmt: skip
        lacking = [need for need in needs if need in sums_of and sums_of[need] not in sums.totals]
        if seen is None or not seen.count or lacking:
            continue
        modules[name] = {
            "leader": site.leader, "side": site.side, "form": site.target.form,
            "lookup": hooks.is_lookup(prepared.model, site.target), "rows": seen.count,
            "width": (sums.running.get(f"{name}.output") or seen).size,
        }  # fmt: skip
    rows = max((about["rows"] for about in modules.values()), default=0)
    return {
        "needs": sorted(needs), "samples": sums.samples, "rows": rows, "data": prepared.data,
        "request": asdict(prepared.request), "modules": modules, "notes": prepared.notes,
    }  # fmt: skip


def too_few(note: Mapping[str, Any]) -> list[str]:
    """Return a warning per kind of module whose moment was estimated from too few rows."""
    poor = {name: about for name, about in note["modules"].items() if about["rows"] < ENOUGH * about["width"]}
    said = []
    for kind, names in grouped(poor).items():
        rows, width = poor[names[0]]["rows"], poor[names[0]]["width"]
        needed = -(-ENOUGH * width * note["samples"] // rows)
        said.append(
            f"`{kind}`: {rows:,} calibration rows for {width:,} features are few; about {ENOUGH * width:,} are needed, "
            f"here {needed:,} samples"
        )
    return said
