"""Turn the requests of an artifact back into the command lines that make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftc.errors import ArtifactError
from peftc.store import documents
from peftc.store.documents import CONTROL
from peftc.store.manifest import Manifest

if TYPE_CHECKING:
    pass


DEFAULT_SHARD = 5_000_000_000


WRITING = (
    "calibrate",
    "decompose",
    "distill",
    "export",
    "extract-lora",
    "finetune",
    "merge",
    "prune-layers",
    "truncate",
)


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
                f"the manifest names the command `{request['command']}`",
                why="it is no command of peftc that writes",
                hint="build the artifact again with this version of peftc, or look at its files by hand",
            )
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
        request,
        "epochs",
        "steps",
        "minutes",
        "batch_size",
        "accumulate",
        "learning_rate",
        "weight_decay",
        "warmup",
        "clip",
        "ema",
        "mixed_precision",
        "held_out",
        "evaluations",
        "task",
        "num_samples",
        "image_size",
        "max_length",
    )
    options |= {
        "augment": request["policy"],
        "mixup": request["mixup"] or None,
        "cutmix": request["cutmix"] or None,
        "data": request["data"]["spec"],
        "loss": ",".join(f"{name}={weight:g}" for name, weight in request["loss"].items()),
        "teacher": teacher["spec"],
    }
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
    return _words(
        {
            **_of(asked, "data", "task"),
            "calibration_samples": asked.get("samples"),
            "calibration_tokens": asked.get("tokens"),
            **_of(asked, "image_size", "max_length", "max_memory"),
            "batch_size": asked.get("batch_size") if request["command"] == "calibrate" else None,
            "sensitivity": request.get("sensitivity") if request["command"] == "decompose" else None,
            "sequential": request.get("sequential"),
        }
    )
