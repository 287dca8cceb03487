"""What `--json` prints fits the schema that ships with the package: every command, and no key that it does not know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

import peftc
from peftc.cli import app as program
from peftc.report import SCHEMA_VERSION, Report

SCHEMA = json.loads((Path(peftc.__file__).parent / "report.schema.json").read_text(encoding="utf-8"))
COMMANDS = list(typer.main.get_command(program.app).commands)  # type: ignore[attr-defined]
DATA = ["--data", "sklearn:digits", "--num-samples", "40"]
TUNE = ["small", *DATA, "--steps", "2", "--held-out", "0"]

LINES = {  # in this order, each in the folder that the ones before it left
    "analyze": [["{vit}", "--ratio", "0.5"], ["{vit}", *DATA[:2], "--calibration-samples", "32"]],
    "calibrate": [["{vit}", *DATA[:2], "--calibration-samples", "32", "-o", "stats"]],
    "decompose": [
        ["{vit}", "--ratio", "0.5", "--dry-run"],
        ["{vit}", "--ratio", "0.5", *DATA, "--calibration-samples", "32", "--max-params", "1", "-o", "small"],
        ["{vit}", "--keep-all-ranks", "-o", "all"],
        ["{vit}", "--keep-all-ranks", "-o", "all"],
    ],
    "truncate": [["all", "--ratio", "0.4", "-o", "cut"]],
    "prune-layers": [
        ["small", *DATA, "--score", "block-influence", "--keep", "1", "-o", "shorter"],
        ["small", "--drop", "1", "--dry-run"],
        ["small", *DATA, "--drop", "1", "--retrain", "--steps", "1", "-o", "again"],
    ],
    "distill": [["small", *DATA, "--steps", "2", "-o", "healed"]],
    "finetune": [[*TUNE, "-o", "tuned"], [*TUNE, "--delta", "-o", "delta"]],
    "merge": [["delta", "-o", "merged"]],
    "extract-lora": [["tuned", "small", "-o", "extracted"]],
    "export": [["small", "--format", "safetensors", "--rounds", "5", "-o", "exported"]] * 2,
    "evaluate": [["small", *DATA, "--against", "base"], ["small", *DATA]],
    "bench": [
        ["small", "--rounds", "5", "--batch-size", "2", "--against", "base"],
        ["{vit}", "--rounds", "5", "--batch-size", "1"],
    ],
    "show": [["small"], ["stats"], ["small", "--commands"]],
    "compare": [["small", "healed"], ["all"]],
    "report": [["small", "healed"]],
    "init": [["{vit}", "--data", "sklearn:digits"]],
    "run": [["--dry-run"], ["short.toml"], ["short.toml"]],
    "methods": [[], ["decompose"]],
    "env": [[]],
}  # fmt: skip


def errors(printed: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(printed)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def test_the_schema_is_a_schema_and_knows_every_command() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]["command"]["enum"]) == set(COMMANDS)
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert SCHEMA["required"] == list(Report("show").to_json())


def test_a_key_that_the_schema_does_not_know_is_an_error() -> None:
    printed = Report("show", {"manifest": {"id": "", "base": {}, "steps": []}, "commands": [], "tensors": 1})
    assert errors(printed.to_json()) == []
    assert errors({**printed.to_json(), "new": 1}) != []
    assert errors({**printed.to_json(), "command": "shown"}) != []
    assert errors({**printed.to_json(), "tensors": None}) != []


def test_every_command_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_vit: Path, peftc: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text(
        f'model = "{tiny_vit}"\nruns = "short"\nchain = ["decompose", "show"]\n'
        "[decompose]\nratio = 0.5\nmax-params = 1\n"
    )
    assert {*LINES, "demo"} >= set(COMMANDS), "the demo takes long: tests/steps/test_demo.py looks at it"
    for word, lines in LINES.items():
        for line in lines:
            result = peftc(word, *(text.format(vit=tiny_vit) for text in line), "--json")
            assert result.exit_code in (0, 3), f"{word} {line}: {result.stderr}"
            printed = json.loads(result.stdout)
            assert printed["command"] == word
            assert errors(printed) == [], f"{word} {line}"
            for step in printed.get("steps", []) if word == "run" else []:
                assert step["report"] is None or errors(step["report"]) == []


def test_python_gives_the_same_object(tiny_vit: Path) -> None:
    assert errors(peftc.analyze(tiny_vit, ratio=0.5).to_json()) == []


@pytest.mark.parametrize("word", COMMANDS)
def test_the_page_of_a_command_lists_its_keys_with_what_they_hold(word: str) -> None:
    page = Path(__file__).parents[1] / "peftc" / "docs" / "commands" / f"{word}.md"
    told = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page.read_text(encoding="utf-8").partition("## JSON")[2], re.M))
    assert told.keys() == SCHEMA["$defs"][word]["properties"].keys() - SCHEMA["properties"].keys()
    assert all(text.strip() for text in told.values())
