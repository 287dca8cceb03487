"""MODEL and --data, looked at > a project file with comments > Report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftc import processes
from peftc.data import parts_of, split_names
from peftc.data.dataset import split_word
from peftc.data.given import spec_of
from peftc.errors import OutputError, UsageError
from peftc.models.load import load
from peftc.nn.surgery import parameters
from peftc.options import Reading
from peftc.project import config
from peftc.report import Report, short
from peftc.store import documents
from peftc.store.source import Source

SMALLER = 0.8  # of the parameters, as an example of a gate: half of the weights of the eligible modules leaves less
TOP = """\
# What the peftc commands in this folder take without being told. A flag wins over a PEFTC_ variable, and that over
# this file. `peftc run` runs the whole chain, and the next time only what has changed. Lines with a `#` in front of a
# name are proposals: take the `#` away.

"""
DATA = """\
#teacher = {model}  # whom `distill` imitates (default: what the chain starts from)
#runs = "runs"  # the folder of the artifacts
#device = "cpu"  # any option may stand up here, for all commands that have it

# the steps of `peftc run` in their order; one that comes twice takes a name of its own, as "distill.again", and a table
# [distill.again] for what differs there
chain = [{steps}]

[decompose]
ratio = 0.5  # share of the weights to keep; or one of rank, energy, target-params, target-macs, speedup
#max-params = "{most}"  # a gate: where there are more, the chain ends with exit code 3
"""
LEARNING = """
[distill]
epochs = 5
#learning-rate = 3e-4
{gate}
#[finetune]  # in the chain: learns the task by few parameters
#method = "lora"
#epochs = 10

#[prune-layers]  # in the chain: a network without the layers that the task does not need, to be trained again
#score = "block-influence"
#keep = 8
"""
GATE = "#max-drop = 0.02  # a gate: the most that the first metric may lose, on held-out samples\n"
MEASURING = """
[evaluate]
against = "base"
"""
TIMING = """
[bench]
against = "base"
#min-speedup = 1.2  # a gate: the least gain in throughput
"""


def init(
    model: str | Path | Source,
    *,
    data: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write a `peftc.toml` that names a model and its data, with a chain to start from.

    Args:
        model: any form of MODEL; it is built, without its weights, to see that it is one.
        data: what to learn from and to measure on; without it the chain has only steps that read none.
        image_column, text_column, label_column: of the data, where their names are not usual ones.
        overwrite: replace the file that is there.

    Raises:
        OutputError: there is one already.
        PeftcError: MODEL or the data is not there, or cannot be read.
    """
    if not isinstance(data, str | Path | None):
        raise UsageError(
            "a project file names its data",
            why=f"`data` is a {type(data).__name__}",
            hint='name files: `data="photos"`',
        )
    data = None if data is None else spec_of(data, Reading.of(locals()))
    source = model if isinstance(model, Source) else Source(str(model))
    file = Path(config.FILE)
    if file.exists() and not overwrite:
        hint = "edit it, run it with `peftc run`, or replace it with `--overwrite`"
        raise OutputError(f"`{file}` is there already", why="it may hold settings of yours", hint=hint)
    found = load(source, weights=False)
    splits = split_names(data) if data is not None else []
    if processes.rank() == 0:
        documents.write_whole(file, _text(source, data, splits, parameters(found.module)))
    report = Report("init", {"file": str(file), "model": source.spec, "data": data, "splits": splits})
    report.lines = [str(file)]
    report.notes.append(f"`{source.spec}` is a {type(found.module).__name__} of {found.library}")
    if data is not None:
        report.notes.append(f"`{data}` has {', '.join(f'`{name}`' for name in splits)}")
    else:
        report.notes.append("no `--data`: the chain neither trains nor measures quality")
    report.notes.append(f"look at `{file}`, then `peftc run` runs its chain; `--dry-run` says what it would do")
    return report


def _text(source: Source, data: str | None, splits: list[str], most: int) -> str:
    """Return the file; `distill` measures on a test split itself, and without one `evaluate` does."""
    at = "" if data is None else parts_of(data)[1]
    measured = split_word(at) != "test" and [split_word(name) for name in splits].count("test") == 1
    writes, last = (["decompose", "distill"], "evaluate") if data is not None else (["decompose"], "bench")
    steps = writes if measured else [*writes, last]
    lines = [f"{name} = {_toml(value)}" for name, value in _settings(source, data).items()]
    limit = short(SMALLER * most).replace(" ", "")
    body = DATA.format(model=_toml(source.spec), steps=", ".join(map(_toml, steps)), most=limit)
    if data is None:
        body += TIMING
    else:
        body += LEARNING.format(gate=GATE if measured else "") + ("" if measured else MEASURING + GATE)
    return TOP + "\n".join(lines) + "\n" + body


def _settings(source: Source, data: str | None) -> dict[str, Any]:
    """Return the model, the data, and what was said of how to build the model."""
    found: dict[str, Any] = {"model": source.spec, "data": data}
    for name in ("arch", "revision", "weights", "arch_set", "preprocess", "offline"):
        value = getattr(source, name)
        found[name.replace("_", "-")] = str(value) if isinstance(value, Path) else value
    return {name: value for name, value in found.items() if value}


def _toml(value: Any) -> str:
    """Write a value as TOML does; its strings are those of JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
