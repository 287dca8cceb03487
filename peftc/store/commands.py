"""Turn the requests of an artifact back into the command lines that make it again."""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from peftc.errors import ArtifactError
from peftc.store import documents
from peftc.store.documents import CONTROL
from peftc.store.manifest import Manifest

GIVEN = "{} given in Python, sha256 {}"  # the spec of data that had no name, and that nobody can type
DEFAULT_SHARD = 5_000_000_000
WRITING = "calibrate decompose distill export extract-lora finetune merge prune-layers truncate".split()


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
            why = "it is no command of peftc that writes"
            hint = "build the artifact again with this version of peftc, or look at its files by hand"
            raise ArtifactError(f"the manifest names the command `{request['command']}`", why=why, hint=hint)
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


def is_given(spec: str) -> bool:
    """Whether a `--data` spec stands for data that was given in Python."""
    return re.search(r" given in Python, sha256 [0-9a-f]{16}($|[?@])", spec) is not None


def _data(data: Any) -> dict[str, Any]:
    """Return the option of data: a word in capitals, as for a network that was in memory, where it had no name."""
    spec = data["spec"] if isinstance(data, Mapping) else data
    return {"data": "DATA" if spec and is_given(spec) else spec}


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


def _calibration(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the calibration set that a request read itself."""
    named = {"samples": "calibration_samples", "tokens": "calibration_tokens"}
    return {named.get(key, key): value for key, value in asked.items()} | _data(asked.get("data"))


# what a key of a request is as options, where it is not an option of its own name
SAID: dict[str, Callable[[Any], dict[str, Any]]] = {
    "command": lambda _: {},
    "plan": lambda _: {},  # a file of its own
    "tuned": lambda _: {},
    "is_judged": lambda _: {},
    "budget": lambda amounts: dict(amounts or {}),
    "settings": lambda found: {"set": [f"{name}={value}" for name, value in found.items()]},
    "data": _data,
    "teacher": lambda teacher: {"teacher": teacher and teacher["spec"]},  # without a name it is the base
    "loss": lambda weights: {"loss": ",".join(f"{name}={weight:g}" for name, weight in weights.items())},
    "policy": lambda policy: {"augment": policy},
    "drop": lambda layers: {"drop": ",".join(map(str, layers)) if layers else None},
    "repair": lambda closes: {} if closes is None else {"repair" if closes else "no_repair": True},
    "delta": lambda delta: {"delta" if delta else "full": True},
    "bias_correction": lambda corrects: {"no_bias_correction": not corrects},
    "max_shard_bytes": lambda size: {"max_shard_size": None if size == DEFAULT_SHARD else size},
    "statistics": lambda found: _calibration(found.get("request", {})),
}
NO_OPTION = {"extract-lora": ("delta",), "calibrate": ("sensitivity",)}  # what these do not ask


def _request_options(request: Mapping[str, Any]) -> list[str]:
    """Return the options of a request, leaving out what its keys do not say."""
    command = request["command"]
    options: dict[str, Any] = {}
    for key, value in request.items():
        if key not in NO_OPTION.get(command, ()):
            options |= SAID[key](value) if key in SAID else {key: value}
    if "statistics" in request and command != "calibrate":
        options.pop("batch_size", None)  # there it is that of a measurement
    return _words(options)
