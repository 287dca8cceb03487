"""How large and how quick a model is, and whether it is quicker than the one it came from.

Every time is taken in one interleaved run with the baseline and with the baseline once more (the A/A control): what
the same module shows against itself is the noise, and a change inside it is called "no measurable change".
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import SourceError, UsageError
from peftc.measure import costs, generation
from peftc.measure.costs import Call, Seconds, Speedup, quantile
from peftc.models import load, write
from peftc.models.inputs import outputs, probe
from peftc.models.layerwise import layerwise
from peftc.models.model import Model
from peftc.models.place import place_of, runnable
from peftc.nn.surgery import parameters, tensor_bytes
from peftc.report import Report, Table, count, duration, rate, short, size, speedup_text
from peftc.store.source import Source
from peftc.tasks import baseline
from peftc.version import __version__

FEWEST_ROUNDS = 5  # fewer give no interval worth the name
NOISY = 1.15  # a noise band that reaches further hides most real changes
PACKAGES = ("torch", "timm", "transformers")
CASES = ("batch_1", "saturating")


def bench(
    model: str | Path | Source | nn.Module | Model,
    *,
    against: str | Path | Source | nn.Module | Model | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    rounds: int = 30,
    min_speedup: float | None = None,
    max_params: float | None = None,
    max_bytes: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    generate: int | None = None,
    seed: int = 0,
) -> Report:
    """Measure sizes, multiply-adds, latency, throughput and peak memory, alone or against a baseline.

    Args:
        model: what to measure.
        against: the baseline; ``base`` is the earliest model of the artifact's chain with the same head, as `evaluate`
            takes it.
        batch_size: takes the place of the saturating batch, which is otherwise found on the baseline.
        image_size: side of the images in pixels; the model's own when None.
        max_length: tokens of a text.
        rounds: timed rounds, each with one block of calls per candidate; at least 5.
        min_speedup: gate on the throughput ratio at the saturating batch; inside the noise it counts as 1.
        max_params: gate on parameters.
        max_bytes: gate on the bytes of the weight files, or in memory for a model without files.
        device: where to run.
        dtype: floating dtype to run in.
        compile: compile the layers of both by `torch.compile`, for the shapes that are timed.
        generate: so many tokens are written after a prompt of ``max_length``, and timed: reading the prompt, and the
            tokens after the first; at least 8.
        seed: of the random inputs.

    Raises:
        UsageError: too few rounds, a batch below 1, ``--min-speedup`` without a baseline, or ``--generate`` for what
            writes no text.
        SourceError: model and baseline read inputs of different shapes.
    """
    _check(rounds, batch_size, min_speedup, against)
    if generate is not None:
        generation.check(generate, compiled=compile)
    subject = runnable(load.load(model), device=device, dtype=dtype)
    pair = {"model": subject}
    if against is not None:
        found = baseline.timed(subject) if against == "base" else load.load(against)
        pair["against"] = runnable(found, device=device, dtype=dtype)
    if generate is not None:
        for which in pair.values():
            generation.refuse(which)
    sides: dict[str, Any] = {"image_size": image_size, "max_length": max_length, "seed": seed}
    samples = {label: probe(which, **sides) for label, which in pair.items()}
    shapes = _shapes(samples, pair)

    def forward(which: Model, batch: int) -> Call:
        inputs = probe(which, batch=batch, **sides)
        return lambda: outputs(which, inputs)

    forwards: dict[str, Callable[[int], Call]] = {
        label: functools.partial(forward, which) for label, which in pair.items()
    }
    other, place = pair.get("against", subject), place_of(subject.module)
    forwards["control"] = functools.partial(forward, other)
    largest = batch_size or costs.saturating_batch(forwards["control"], place)
    with ExitStack() as held:
        for which in pair.values() if compile else ():
            held.enter_context(layerwise(which, compiled=True, fixed=True))
        times = _time(forwards, largest, rounds, place)

    data: dict[str, Any] = {}
    if generate is not None:
        asked = generation.Asked(next(iter(shapes["model"].values()))[0], generate, rounds, seed)
        data["generation"] = generation.measure(pair, asked, batch_size)
    for label, which in pair.items():
        data[label] = _sizes(which, samples[label]) | _speeds(times, label, largest)
        working = costs.working_memory(forwards[label](largest), place)
        peak = None if working is None else working + tensor_bytes(which.module)
        data[label]["memory"] = {"batch": largest, "working_bytes": working, "peak_bytes": peak}
    compared = {case: _compare(run) for case, run in times.items()} if against is not None else None
    data["speedup"] = None if compared is None else {case: asdict(change) for case, change in compared.items()}
    data["noise"] = {case: costs.noise_of(run) for case, run in times.items()}
    data |= {"input": shapes["model"], "rounds": rounds, "compiled": compile, "environment": _environment(place)}
    report = _report(data, compared, subject, largest, min_speedup, max_params, max_bytes)
    report.notes += [baseline.FOLDER] if against == "base" and Path("base").exists() else []
    if isinstance(model, str | Path | Source):
        where = {name: data["environment"][name] for name in ("device_name", "threads")}
        question = [where, data["model"]["dtype"], data["input"], largest, None if against is None else other.name]
        more = [*(["compiled"] if compile else []), *([f"generate {generate}"] if generate is not None else [])]
        write.keep_measured(report, subject, [*question, *more])
    return report


def _check(rounds: int, batch_size: int | None, min_speedup: float | None, against: object) -> None:
    if rounds < FEWEST_ROUNDS:
        raise UsageError(f"`--rounds {rounds}` is too few for a noise band", hint=f"take at least {FEWEST_ROUNDS}")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"`--batch-size {batch_size}` holds no sample", hint="take at least 1")
    if min_speedup is not None and against is None:
        hint = "name a baseline: `--against MODEL`, or `--against base` for the one an artifact records"
        raise UsageError("`--min-speedup` has nothing to compare with", hint=hint)


def _shapes(samples: dict[str, Any], pair: dict[str, Model]) -> dict[str, dict[str, list[int]]]:
    """Return the shapes of the inputs of each model, which have to be the same.

    Raises:
        SourceError: they are not.
    """
    shapes = {}
    for label, sample in samples.items():
        named = sample if isinstance(sample, dict) else {"input": sample}
        shapes[label] = {name: list(tensor.shape[1:]) for name, tensor in named.items()}
    if "against" in shapes and shapes["model"] != shapes["against"]:
        what = f"`{pair['model'].name}` and `{pair['against'].name}` read inputs of different shapes"
        why = f"{shapes['model']} and {shapes['against']} per sample"
        raise SourceError(what, why=why, hint="give both the same: `--image-size N`, or `--max-length N` for text")
    return shapes


def _time(
    forwards: dict[str, Callable[[int], Call]], largest: int, rounds: int, device: torch.device
) -> dict[str, Seconds]:
    times: dict[str, Seconds] = {}
    for case, batch in zip(CASES, (1, largest), strict=True):
        if case == "saturating" and largest == 1:
            times[case] = times["batch_1"]
            continue
        calls = {label: forward(batch) for label, forward in forwards.items()}
        times[case] = costs.latency(calls, rounds=rounds, device=device, title=f"timing batches of {batch}")
    return times


def _compare(run: Seconds) -> Speedup:
    return costs.speedup(run["against"], run["control"], run["model"])


def _sizes(model: Model, sample: Tensor | dict[str, Tensor]) -> dict[str, Any]:
    return {
        "name": model.name,
        "source": model.source.spec,
        "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
        "parameters": parameters(model.module),
        "macs": costs.work(model, sample).macs,
        "bytes_on_disk": sum(file.stat().st_size for file in model.files) if model.files else None,
        "bytes_in_memory": tensor_bytes(model.module),
    }


def _speeds(times: dict[str, Seconds], label: str, largest: int) -> dict[str, Any]:
    return {
        case: {
            "batch": batch,
            "median_seconds": quantile(times[case][label], 0.5),
            "p90_seconds": quantile(times[case][label], 0.9),
            "samples_per_second": batch / quantile(times[case][label], 0.5),
        }
        for case, batch in zip(CASES, (1, largest), strict=True)
    }


def _environment(device: torch.device) -> dict[str, Any]:
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else costs.processor()
    return {
        "device": str(device),
        "device_name": named,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"peftc": __version__, **{package: metadata.version(package) for package in PACKAGES}},
    }


# -- for people -------------------------------------------------------------------------------------------------------


def _report(
    data: dict[str, Any],
    compared: dict[str, Speedup] | None,
    subject: Model,
    largest: int,
    min_speedup: float | None,
    max_params: float | None,
    max_bytes: float | None,
) -> Report:
    report = Report("bench", data=data, artifact=subject.folder if subject.manifest else None)
    figures, saturating = data["model"], compared["saturating"] if compared else None
    stored = figures["bytes_on_disk"]
    report.tables.append(_table(data, compared, largest))
    if "generation" in data:
        report.tables.append(generation.table(data["generation"], report.tables[0].title))
    where = data["environment"]
    report.notes.append(
        f"{where['device_name']}, threads: {where['threads']}, {figures['dtype']}, {data['rounds']} rounds"
        f"{', layers compiled' if data['compiled'] else ''}; "
        + ", ".join(f"{name} {list(shape)}" for name, shape in data["input"].items())
    )
    bands = {1: data["noise"]["batch_1"], largest: data["noise"]["saturating"]}
    each = [f"{band['low']:.3f}x to {band['high']:.3f}x at batch {batch}" for batch, band in bands.items()]
    report.notes += [f"noise, the same model against itself: {', '.join(each)}", *subject.notes]
    widest = max(band["high"] for band in data["noise"].values())
    if widest > NOISY:
        report.warnings.append(
            f"this machine is too busy to see changes under {widest:.2f}x; end other programs, or raise `--rounds`"
        )
    if figures["memory"]["peak_bytes"] is None:
        report.notes.append("peak memory is measured on CUDA and on Linux with glibc only")
    if saturating is not None and "slower" in saturating.verdict:
        report.warnings.append(f"`{figures['name']}` is {saturating.verdict} than `{data['against']['name']}`")
    if compared is not None and figures["dtype"] != data["against"]["dtype"]:
        report.warnings.append(
            f"`{figures['name']}` ran in {figures['dtype']}, its baseline in {data['against']['dtype']}; "
            "`--dtype` gives both the same"
        )
    report.at_least("--min-speedup", min_speedup, saturating.counted if saturating else None)
    report.at_most("--max-params", max_params, figures["parameters"])
    report.at_most("--max-bytes", max_bytes, figures["bytes_in_memory"] if stored is None else stored)
    return report


def _table(data: dict[str, Any], compared: dict[str, Speedup] | None, largest: int) -> Table:
    """Lay out the figures: each with where it stands, how it is written, and the case whose change is claimed of it."""
    rows: list[tuple[str, tuple[str, ...], Callable[[float], str], str | None]] = [
        ("parameters", ("parameters",), count, None),
        ("weights on disk", ("bytes_on_disk",), size, None),
        ("weights in memory", ("bytes_in_memory",), size, None),
        ("multiply-adds per sample", ("macs",), short, None),
        ("latency, batch 1, median", ("batch_1", "median_seconds"), duration, "batch_1"),
        ("latency, batch 1, p90", ("batch_1", "p90_seconds"), duration, ""),
        ("throughput, batch 1", ("batch_1", "samples_per_second"), rate, "batch_1"),
        (f"throughput, batch {largest}", ("saturating", "samples_per_second"), rate, "saturating"),
        (f"peak memory, batch {largest}", ("memory", "peak_bytes"), size, None),
    ]
    lines = []
    for name, path, form, case in rows:
        if largest == 1 and case == "saturating":
            continue
        found = [
            functools.reduce(dict.__getitem__, path, data[which]) for which in ("against", "model") if which in data
        ]
        cells = [name, *("not known" if value is None else form(value) for value in found)]
        if compared is not None:
            cells.append(_share(*found) if case is None else speedup_text(asdict(compared[case])) if case else "")
        lines.append(cells)
    if compared is None:
        return Table(data["model"]["name"], ("figure", "value"), lines)
    title = f"{data['against']['name']} > {data['model']['name']}"
    return Table(title, ("figure", "before", "after", "change"), lines)


def _share(old: float | None, new: float | None) -> str:
    return "" if not old or new is None else f"{100 * (new / old - 1):+.1f} %"
