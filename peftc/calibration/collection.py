"""Collect statistics over a calibration set, keep them as parts of a job, and hand them to methods."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from peftc import processes, progress
from peftc.calibration import lanes, statistics
from peftc.calibration.lanes import LANES, Lanes
from peftc.calibration.memory import planned
from peftc.calibration.prepared import Prepared, Request, prepare
from peftc.calibration.statistics import Collector, Found, Site
from peftc.errors import ArtifactError, DataError, UsageError, WeightError
from peftc.models import streaming, unread, write
from peftc.models.model import Model
from peftc.models.place import moved, place_of
from peftc.models.weights import read_note, save_part
from peftc.nn import lowrank
from peftc.nn.vocabulary import Logits, Unread, is_finite
from peftc.plans.plan import Target
from peftc.report import grouped
from peftc.store import artifact, manifest, verified
from peftc.tasks import unlabelled
from peftc.tasks.task import Batch, Task, batches

FILE = "statistics.safetensors"
DRAWS = 2  # of the model's own predictions, for every sample
ENOUGH = 4  # rows per feature, below which a moment is a poor estimate


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

    @property
    def batch_size(self) -> int:
        """How many samples ran at once, as memory allowed."""
        return int(self.note["request"]["batch_size"])

    def why_not(self, name: str) -> str:
        """Return why there are no statistics of a module."""
        if name not in self.note.get("eligible", (name,)):
            return "it was left out when statistics were collected"
        return "the calibration set never reaches it"

    def is_lookup(self, name: str) -> bool:
        """Return whether a module only looks rows up: its matrix is then (width, words)."""
        return bool(self.note["modules"][name]["lookup"])

    def of(self, name: str, device: torch.device) -> Found:
        """Return the statistics of one module on a device."""
        about = self.note["modules"][name]
        leader = about["leader"]
        with safe_open(self.path.with_name(about.get("file", self.path.name)), "pt") as file:
            there = set(file.keys())

            def read(key: str) -> Tensor | None:
                return file.get_tensor(key).to(device) if key in there else None

            covariance = f"{leader}.input.covariance" if about["side"] == "input" else f"{name}.output.covariance"
            others = {
                "output_gradient_gram": read(f"{name}.gradient"),
                "weight_fisher": read(f"{name}.fisher"),
                "input_magnitude": read(f"{leader}.magnitude"),
            }
            return Found(
                about["side"],
                read(f"{leader}.input.mean"),
                read(covariance),
                read(f"{name}.output.mean"),
                {key: value for key, value in others.items() if value is not None},
                about["rows"],
                read(f"{leader}.patch.mean"),
            )


def source_of(
    model: Model, needs: Sequence[str], asked: Request | None, folder: str | Path | None, device: str, *, tries: bool
) -> Prepared | Statistics | None:
    """Return what a method's statistics will come from: the folder of `calibrate`, a calibration set, or nothing.

    With ``tries`` a calibration set keeps some samples apart that plans are tried on, where losses are divergences.
    UsageError where a folder is given to a method that needs none.
    """
    if folder is not None:
        if not needs:
            raise UsageError("`--statistics` is of no use here", why="the method takes the weights alone")
        return read(Path(folder), model, needs)
    apart = tries and "output_gradient_gram" in needs
    return prepare(model, asked, device, apart=apart) if needs and asked is not None else None


def obtain(
    source: Prepared | Statistics, targets: Mapping[str, Target], needs: Sequence[str], folder: Path
) -> Statistics:
    """Return the statistics, collected now where there are none; ArtifactError where those are of other modules."""
    if not isinstance(source, Statistics):
        return collect(source, targets, needs, folder)
    there = {name: source.note["modules"][name]["form"] for name in targets if name in source}
    if not there:
        what = f"`{source.path.parent}` holds statistics of none of the modules that are to be factored"
        raise ArtifactError(what, hint="collect them again, with the same `--include` and `--skip`")
    other = next((name for name, form in there.items() if form != targets[name].form), None)
    if other is not None:
        raise ArtifactError(
            f"`{source.path.parent}` holds statistics of `{other}` as `{there[other]}`, not as `{targets[other].form}`",
            hint=f"add `--conv-method {there[other]}`, or collect them again",
        )
    return source


def identity_of(source: Prepared | Statistics | None, sensitivity: int = 0, sequential: bool = False) -> dict[str, Any]:
    """Return what of the statistics makes two requests the same question."""
    if source is None:
        return {}
    if isinstance(source, Statistics):
        return {"statistics": {"collected": source.note["collected"]}}
    extra: dict[str, Any] = {"sensitivity": sensitivity, **({"sequential": True} if sequential else {})}
    return {"statistics": {"data": source.data, "request": source.asked()}, **extra}


def read(folder: Path, model: Model, needs: Sequence[str]) -> Statistics:
    """Return the statistics that `calibrate` wrote; ArtifactError where none are, or not for this model or method."""
    record = manifest.read(folder)
    artifact.tensor_table(folder, record)
    verified.check(folder, record.files)
    note = artifact.statistics_note(folder, record)
    theirs = record.base.get("files"), [step["id"] for step in record.steps[:-1]]
    earlier = model.manifest.steps if model.manifest else []
    if theirs != (write.base_record(model).get("files"), [step["id"] for step in earlier]):
        why = "its weights have other digests"
        hint = "collect them again: `peftc calibrate MODEL --data DATA -o stats`"
        raise ArtifactError(f"the statistics in `{folder}` were collected on another model", why=why, hint=hint)
    lacking = [need for need in needs if need not in note["needs"]]
    if lacking:
        why = f"it was collected for `--method {note['method']}`"
        hint = "collect them again: `peftc calibrate MODEL --data DATA --method METHOD -o stats`"
        raise ArtifactError(f"`{folder}` lacks {', '.join(f'`{need}`' for need in lacking)}", why=why, hint=hint)
    return Statistics(folder / FILE, note, [f"statistics: `{folder}`", *note["notes"]], too_few(note))


def collect(prepared: Prepared, targets: Mapping[str, Target], needs: Sequence[str], folder: Path) -> Statistics:
    """Run the calibration set through the model once and return the statistics of every target that it reaches.

    Finished lanes lie in ``folder`` and are not run again. NaN or infinite outputs of the model are a WeightError.
    """
    path, subject, encoded = folder / FILE, prepared.model, prepared.encoded
    note = read_note(path)
    processes.wait()  # none writes before all have looked
    if note is None:
        order = [index for run in batches(encoded.lengths, encoded.size, 1) for index in run]
        head = unread.head_of(subject)
        sites = statistics.sites(subject, targets, lambda: _forward(subject, encoded.batch(order[:1]), head))
        collector, request = Collector(subject, sites, needs, keep=False), prepared.request
        whole = replace(prepared, request=replace(request, tokens=None))

        def run(indices: list[int]) -> None:
            _run_lane(whole, [indices], iter([encoded.batch(indices)]), collector)

        size, groups = processes.agreed(lambda: planned(collector, order, request.batch_size, run, folder))
        prepared = replace(prepared, request=replace(request, batch_size=size))
        note = _passes(prepared, sites, needs, path, groups)
    return Statistics(path, note, list(note["notes"]), too_few(note))


def _passes(
    prepared: Prepared, sites: Mapping[str, Site], needs: Sequence[str], path: Path, groups: list[list[str]]
) -> dict[str, Any]:
    """Go through the calibration set once per group of sites, each into a file of its own; return the whole note."""
    if len(groups) == 1:
        return _pass(prepared, sites, needs, path, 0, None)
    notes: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    for number, names in enumerate(groups):
        file = path.with_name(f"{path.stem}-{number + 1:05d}-of-{len(groups):05d}{path.suffix}")
        some = {name: sites[name] for name in names}
        note = read_note(file) or _pass(prepared, some, needs, file, number, notes[0] if notes else None)
        notes.append(note)
        modules |= {name: {**about, "file": file.name} for name, about in note["modules"].items()}
    whole = {**notes[0], "modules": modules, "rows": max(note["rows"] for note in notes)}
    if processes.rank() == 0:
        save_part(path, {}, whole)
    return whole


def _pass(
    prepared: Prepared, sites: Mapping[str, Site], needs: Sequence[str], path: Path, number: int, first: Any
) -> dict[str, Any]:
    """Sum over the calibration set, lane by lane, and write the statistics of some sites; return their note.

    The lanes of a pass see as many samples as those of the ``first``, whose note is given where it is another.
    """
    request, encoded = prepared.request, prepared.encoded
    runs = batches(encoded.lengths, encoded.size, request.batch_size)
    parts = [path.with_name(f"lane-{number}-{lane}.safetensors") for lane in range(LANES)]
    mine = processes.share(range(LANES))
    with processes.together(), progress.track("calibrating", sum(len(runs[lane::LANES]) for lane in mine)) as advance:
        left = [lane for lane in mine if read_note(parts[lane]) is None]
        for _ in (run for lane in set(mine) - set(left) for run in runs[lane::LANES]):
            advance("")
        of_lanes = [runs[lane::LANES] for lane in left]
        for lane, own, arriving in zip(left, of_lanes, _streams(prepared, of_lanes), strict=True):
            collector = Collector(prepared.model, sites, needs)
            _run_lane(prepared, own, arriving, collector, first["lanes"][lane] if first else None, advance)
            lanes.save(parts[lane], collector.sums)

    def merge() -> dict[str, Any]:
        added = Lanes(parts, place_of(prepared.model.module))
        if not sum(added.samples):
            raise DataError(f"`{request.data}` holds no sample to calibrate on")
        note = _note(added, sites, needs, prepared)
        save_part(path, lanes.stored(added, sites, lambda target: matrix_of(prepared.model, target)), note)
        for part in parts:
            part.unlink()
        return note

    return processes.agreed(merge)


def _streams(prepared: Prepared, of_lanes: list[list[list[int]]]) -> Iterator[Iterator[Batch]]:
    """Yield for each lane what gives its batches: one stream for all, unless a lane may end before its last batch."""
    if prepared.request.tokens is None:
        with closing(prepared.encoded.batches([run for runs in of_lanes for run in runs])) as stream:
            yield from (stream for _ in of_lanes)
        return
    for runs in of_lanes:
        with closing(prepared.encoded.batches(runs)) as stream:
            yield stream


def _run_lane(
    prepared: Prepared,
    runs: list[list[int]],
    arriving: Iterator[Batch],
    collector: Collector,
    samples: int | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> None:
    """Run batches until so many samples are seen, as in an earlier pass, or else the lane's share of the tokens."""
    model, tokens = prepared.model, prepared.request.tokens
    watched = (each for site in collector.sites.values() for each in statistics.called(model, site.target))
    head = unread.head_of(model, watched)
    with collector.watching() as sums:
        for indices in runs:
            seen = max((one.count for name, one in sums.running.items() if name.endswith(".input")), default=0)
            enough = tokens is not None and seen >= -(-tokens // LANES)
            if not (enough if samples is None else sums.samples >= samples):
                batch = next(arriving)
                collector.see(batch.inputs)
                if collector.gradients:
                    seeds = [prepared.request.seed * 1_000_003 + index for index in indices]
                    _backward(model, prepared.task, batch, seeds, head)
                else:
                    _forward(model, batch, head)
                sums.samples += len(indices)
            advance("")


def _forward(model: Model, batch: Batch, head: nn.Linear | None = None) -> None:
    """Run forward; of a head that is given nothing is read, so it is left out."""
    _refuse_non_finite(model, unread.outputs(model, moved(model, batch.inputs), head))


def _backward(
    model: Model, task: Task | None, batch: Batch, seeds: Sequence[int], head: nn.Linear | None = None
) -> None:
    """Run forward, and backward from two draws of the model's own prediction; of a large vocabulary from one."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    inputs = moved(model, batch.inputs)
    with torch.enable_grad(), streaming.recomputing(model.module):
        outputs = unread.forward(model, inputs, head)
        _refuse_non_finite(model, outputs)
        if isinstance(outputs, Unread):
            hidden = outputs.hidden
            if hidden.requires_grad:  # one draw, as a window has many tokens: on stories260K two were no better
                (pull,) = unlabelled.pulls_of_own_prediction(outputs, inputs, generators, draws=1)
                hidden.backward(pull.to(hidden.dtype))
            return
        if not outputs.requires_grad:
            return
        for draw in range(DRAWS):
            loss = unlabelled.loss_of_own_prediction(task, outputs, inputs, generators)
            (loss / DRAWS**0.5).backward(retain_graph=draw + 1 < DRAWS)


def _refuse_non_finite(model: Model, outputs: Logits) -> None:
    if not is_finite(outputs):
        why = "no statistic over them would mean anything"
        hint = "look for NaN in its weights with `peftc analyze`, or calibrate in float32"
        raise WeightError(f"`{model.name}` gives NaN or infinite outputs on the calibration set", why=why, hint=hint)


def matrix_of(model: Model, target: Target) -> Tensor:
    """Return a module's weight as the matrix that calibration counts rows and columns of."""
    weight: Any = model.module.get_submodule(target.name).weight
    return lowrank.matrix(weight.detach(), target.form)


def _note(added: Lanes, sites: Mapping[str, Site], needs: Sequence[str], prepared: Prepared) -> dict[str, Any]:
    modules: dict[str, dict[str, Any]] = {}
    for name, site in sites.items():
        rows = added.count(f"{site.leader}.input") or added.count(f"{name}.output")
        sums_of = {
            "output_gradient_gram": f"{name}.gradient",
            "weight_fisher": f"{name}.fisher",
            "input_magnitude": f"{site.leader}.magnitude",
        }
        lacking = [need for need in needs if need in sums_of and f"total:{sums_of[need]}" not in added.keys]
        if not rows or lacking:
            continue
        seen_at = f"{name}.output" if added.count(f"{name}.output") else f"{site.leader}.input"
        modules[name] = {
            "leader": site.leader,
            "side": site.side,
            "form": site.target.form,
            "lookup": statistics.is_lookup(prepared.model, site.target),
            "rows": rows,
            "width": added.shape(f"mean:{seen_at}")[0],
        }
    rows = max((about["rows"] for about in modules.values()), default=0)
    return {
        "needs": sorted(needs),
        "samples": sum(added.samples),
        "lanes": added.samples,
        "rows": rows,
        "data": prepared.data,
        "request": prepared.asked(),
        "modules": modules,
        "notes": prepared.notes,
    }


def too_few(note: Mapping[str, Any]) -> list[str]:
    """Return a warning per pair of too few rows and a width, with the kinds of modules whose moments stand on them."""
    every = sorted(note["modules"].items())  # as in a note that was read back
    poor = {name: about for name, about in every if about["rows"] < ENOUGH * about["width"]}
    kinds: dict[tuple[int, int], list[str]] = {}
    for kind, names in grouped(poor).items():
        kinds.setdefault((poor[names[0]]["rows"], poor[names[0]]["width"]), []).append(f"`{kind}`")
    return [
        f"{', '.join(some)}: {rows:,} calibration rows for {width:,} features are few; "
        f"about {ENOUGH * width:,} are needed, here {-(-ENOUGH * width * note['samples'] // rows):,} samples"
        for (rows, width), some in kinds.items()
    ]
