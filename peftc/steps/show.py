"""Print an artifact from its manifest and headers alone: no torch, whatever its size."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.errors import ArtifactError, PeftcError
from peftc.models import hub
from peftc.report import Cell, Report, Table, count, grouped, size, span
from peftc.store import artifact, documents, manifest
from peftc.store.documents import CONTROL
from peftc.store.manifest import Manifest
from peftc.store.source import MANIFEST, Located, Source, locate

if TYPE_CHECKING:
    from peftc.store.header import TensorInfo

DEFAULT_SHARD = 5_000_000_000
WRITING = (
    "calibrate", "decompose", "distill", "export", "extract-lora", "finetune", "merge", "prune-layers", "truncate",
)  # fmt: skip


def show(model: str | Path | Source, *, commands: bool = False, verify: bool = False) -> Report:
    """Return what an artifact is made of.

    Args:
        model: an artifact folder, or the hub id of one, of which only the small files are fetched.
        commands: only the command lines that rebuild it.
        verify: read every file and compare it with the digest in the manifest, whatever was compared before.

    Raises:
        ArtifactError: it is no artifact, its files do not fit its manifest, or ``verify`` found other bytes.
        SourceError: the hub does not give it.
    """
    source = model if isinstance(model, Source) else Source(str(model))
    folder, there = Path(source.spec), None
    if not folder.is_dir():
        there = _of_the_hub(source)
        folder = hub.snapshot(there, source, True) if verify else hub.looked_at(there, source)
    name = there.name if there else str(folder)
    if not (folder / MANIFEST).is_file() and (folder / "config.json").is_file():
        hint = f"look into it with `peftc analyze {name}`"
        raise ArtifactError(f"`{name}` is a model, not an artifact of peftc", hint=hint)
    record = manifest.read(folder)
    if verify:
        artifact.verify(folder, record, remembered=False)
    tensors = _tensors(folder, record, there)
    lines = command_lines(record)
    report = Report("show", {"manifest": vars(record), "commands": lines, "tensors": len(tensors)}, artifact=folder)
    if commands:
        report.lines = lines
        return report
    report.notes += [f"rebuilt by: {line}" for line in lines]
    if verify:
        read = size(sum(entry["bytes"] for entry in record.files.values()))
        report.notes.append(f"all {count(len(record.files))} files, {read}, hold the bytes that the manifest promises")
    base = record.base
    stored = size(sum(info.stop - info.start for info in tensors.values()))
    facts = [
        ["id", record.id[:16]],
        ["base", f"{base['library']} {base['architecture']}"],
        ["from", base.get("source", {}).get("spec", "a live network")],
        ["parameters", count(record.parameters)],
        ["statistics" if record.holds_statistics else "weights", f"{len(tensors)} tensors, {stored}"],
        ["files", ", ".join(sorted(record.files))],
        ["classes", count(len(record.labels)) if record.labels else ""],
        ["layers kept", ", ".join(record.kept_layers)],
        ["layers passed over", ", ".join(record.skipped)],
    ]
    if record.holds_statistics:
        _add_statistics(report, facts, folder, artifact.statistics_note(folder, record))
    if record.ordered:
        kept = _tensors(folder, record, there, factors=True)
        facts.append(["factors", f"{len(kept)} tensors, {size(sum(info.stop - info.start for info in kept.values()))}"])
        report.tables.append(modules_table("ordered factors, up to rank", record.ordered))
        report.notes.append(f"cut it to any budget: `peftc truncate {name} --ratio 0.5 -o small`")
    report.tables.insert(0, Table(name, ["", ""], [fact for fact in facts if fact[1]]))
    if record.modules:
        report.tables.insert(1, modules_table("factored modules", record.modules))
    return report


def _of_the_hub(source: Source) -> Located:
    """Return the hub id that was named.

    Raises:
        ArtifactError: it is the path of a folder that is not there.
    """
    try:
        there = locate(source)
    except PeftcError:
        there = None
    if there is None or there.kind not in ("timm", "transformers"):
        why = "`peftc show` reads artifacts: folders, and repositories of the hub"
        raise ArtifactError(f"there is no artifact at `{source.spec}`", why=why)
    return there


def _tensors(folder: Path, record: Manifest, there: Located | None, *, factors: bool = False) -> dict[str, TensorInfo]:
    """Return the tensors of an artifact, or those of its ordered factors, wherever its files are."""
    if there is None or all((folder / name).is_file() for name in record.files):
        return artifact.tensor_table(folder, record, factors=factors)
    names = [name for name in record.files if name.endswith(".safetensors")]
    names = [name for name in names if name.startswith(artifact.FACTORS) == factors]
    return hub.tensors(there, folder.name, names)


def modules_table(title: str, modules: Mapping[str, dict[str, Any]]) -> Table:
    """Group factored modules of one kind and form, with the span of their ranks."""
    rows = []
    for kind, names in grouped(modules).items():
        edits = [modules[name] for name in names]
        ranks = sorted((edit["rank"] for edit in edits), key=lambda rank: rank if isinstance(rank, list) else [rank])
        texts = [str(rank).strip("[]").replace(", ", "x") for rank in ranks]
        rows.append([kind, len(names), edits[0]["form"], span(texts)])
    return Table(title, ["module", "count", "form", "rank"], rows)


def statistics_table(modules: Mapping[str, Mapping[str, Any]]) -> Table:
    """Group modules of one kind: whose second moment is kept, of how many features, over how many rows."""
    lines: list[list[Cell]] = []
    for kind, names in grouped(modules).items():
        some = [modules[name] for name in names]
        widths, rows = ([count(n) for n in sorted({each[key] for each in some})] for key in ("width", "rows"))
        sides = " and ".join(sorted({f"{each['side']}s" for each in some}))
        lines.append([kind, len(some), sides, span(widths), span(rows)])
    return Table("statistics", ["module", "count", "of its", "features", "rows"], lines)


def _add_statistics(report: Report, facts: list[list[str]], folder: Path, note: Mapping[str, Any]) -> None:
    """Say what a folder of `calibrate` holds."""
    data = note["data"]
    facts += [
        ["calibrated on", f"{count(note['samples'])} samples of split `{data['split']}` of `{data['spec']}`"],
        ["for", f"`--method {note['method']}`: {', '.join(note['needs'])}"],
    ]
    report.data["statistics"] = dict(note)
    report.tables.append(statistics_table(note["modules"]))
    report.notes.append(f"use it at any budget: `peftc decompose MODEL --statistics {folder} --ratio 0.5 -o small`")


def command_lines(record: Manifest) -> list[str]:
    """Return the shell lines that rebuild an artifact, one per step."""
    asked = [record.base.get("source", {}), [step["request"] for step in record.steps]]
    if any(CONTROL.search(text) for text in documents.texts(asked)):
        why = "a terminal, or a shell that reads them, would do what those say"
        raise ArtifactError("the commands of the manifest hold control characters", why=why)
    source = record.base.get("source", {})
    model = [source.get("spec", "MODEL"), *_source_options(source)]
    lines = []
    for number, step in enumerate(record.steps, 1):
        request = step["request"]
        if request["command"] not in WRITING:
            raise ArtifactError(
                f"the manifest names the command `{request['command']}`", why="it is no command of peftc that writes",
                hint="build the artifact again with this version of peftc, or look at its files by hand",
            )  # fmt: skip
        name = f"{number:02d}-{request['command']}"
        if request.get("plan"):
            lines.append(f"cat >{name}.json <<'PLAN'\n{json.dumps(request['plan'])}\nPLAN")
            model += ["--plan", f"{name}.json"]
        collected = request.get("statistics", {}).get("collected")
        if collected:
            calibrated = f"{number:02d}-calibrate"
            lines.append(shlex.join(["peftc", "calibrate", *model, *_request_options(collected), "-o", calibrated]))
            model += ["--statistics", calibrated]
        if request["command"] == "extract-lora":  # it names the base: of the tuned model only a digest is known
            model = ["TUNED", *model]
        lines.append(shlex.join(["peftc", request["command"], *model, *_request_options(request), "-o", name]))
        model = [name, *(["--allow-code"] if record.base["library"] == "python" else [])]
    return lines


def _source_options(source: dict[str, Any]) -> list[str]:
    options = {key: source.get(key) or None for key in ("arch", "weights", "revision")}
    for key in ("arch_set", "preprocess"):
        items = source.get(key, {}).items()
        options[key] = [f"{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in items]
    return _words(options | {"trust_remote_code": source.get("trust_remote_code", False)})


def _words(options: Mapping[str, Any]) -> list[str]:
    """Return options as they are typed: nothing for None and False, a flag for True, one for each of a list."""
    words: list[str] = []
    for key, value in options.items():
        option = f"--{key.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not False:
                words += [option] if each is True else [option, str(each)]
    return words


def _of(request: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: request.get(key) for key in keys}


def _request_options(request: dict[str, Any]) -> list[str]:
    """Return the options of a request, leaving out what its keys do not say."""
    command, settings = request["command"], [f"{name}={value}" for name, value in request.get("settings", {}).items()]
    if command == "export":
        return _words(
            _of(request, "format", "data", "task", "num_samples", "image_size", "max_length")
            | {"seed": request.get("seed") or None, "set": settings, "dense": request.get("dense")}
        )
    shard = request.get("max_shard_bytes", DEFAULT_SHARD)
    return [
        *(_training_options(request) if "loss" in request else []),
        *(_layer_options(request) if command == "prune-layers" else []),
        *_words(request.get("budget") or {}),
        *_words(_of(request, "keep_all_ranks", "joint", "rank", "on_product", "same_rank")),
        *_words({"max_shard_size": None if shard == DEFAULT_SHARD else shard}),
        *_words(_of(request, "allocation", "method", "conv_method", "device", "seed", "rank_multiple")),
        *_words({"no_bias_correction": request.get("bias_correction") is False}),
        *_calibration_options(request),
        *_words({"set": settings, **_of(request, "include", "skip")}),
    ]


def _training_options(request: dict[str, Any]) -> list[str]:
    """Return the options of a training: what it read, towards what, and how long."""
    teacher = request.get("teacher") or {"spec": None}  # without a name it is the base
    options = _of(
        request, "epochs", "steps", "minutes", "batch_size", "accumulate", "learning_rate", "weight_decay", "warmup",
        "clip", "ema", "mixed_precision", "held_out", "evaluations", "task", "num_samples", "image_size", "max_length",
    )  # fmt: skip
    options |= {
        "augment": request["policy"], "mixup": request["mixup"] or None, "cutmix": request["cutmix"] or None,
        "data": request["data"]["spec"],
        "loss": ",".join(f"{name}={weight:g}" for name, weight in request["loss"].items()), "teacher": teacher["spec"],
    }  # fmt: skip
    if request["command"] == "finetune":
        options |= {"head": request.get("head"), **_delta(request)}
    return _words(options | {"dropout": request["dropout"]})


def _delta(request: dict[str, Any]) -> dict[str, bool]:
    return {"delta" if request["delta"] else "full": True} if "delta" in request else {}


def _layer_options(request: dict[str, Any]) -> list[str]:
    """Return the options that chose layers: the samples, the score, and how many or which."""
    options = _of(request, "score", "alpha", "keep", "task", "num_samples", "image_size", "max_length")
    options["data"] = request["data"]["spec"] if request.get("data") else None
    options["drop"] = ",".join(map(str, request["drop"])) if request.get("drop") else None
    return _words(options | _of(request, "within_drop", "repair", "stability") | _delta(request))


def _calibration_options(request: dict[str, Any]) -> list[str]:
    """Return the options of the calibration set that a request read itself."""
    asked = request.get("statistics", {}).get("request") or {}
    return _words({
        **_of(asked, "data", "task"), "calibration_samples": asked.get("samples"),
        "calibration_tokens": asked.get("tokens"), **_of(asked, "image_size", "max_length", "max_memory"),
        "batch_size": asked.get("batch_size") if request["command"] == "calibrate" else None,
        "sensitivity": request.get("sensitivity") if request["command"] == "decompose" else None,
        "sequential": request.get("sequential"),
    })  # fmt: skip
