"""README and help say what the program does: every command runs, every word in a table exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import peftc
from peftc.cli import app as program
from peftc.cli import completion
from peftc.docs.source import pages
from peftc.methods.registry import METHODS
from peftc.plans import allocate
from peftc.project import config
from peftc.report import SCHEMA_VERSION, Report
from peftc.store import source

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHANGELOG = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
COMMANDS = pages.COMMANDS
PROSE = re.sub(r"```.*?```", "", README, flags=re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block and the headings that it stands under."""

    language: str
    text: str
    headings: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    found, headings, inside = [], [""] * 6, None
    for line in text.splitlines():
        if line.startswith("```"):
            inside = None if inside else (line[3:], [])
            if inside:
                found.append((inside, tuple(filter(None, headings))))
        elif inside:
            inside[1].append(line)
        elif heading := re.fullmatch(r"(#+) (.*)", line):
            level = len(heading[1]) - 1
            headings[level:] = [heading[2], *[""] * (5 - level)]
    return [Block(language, "\n".join(lines), above) for (language, lines), above in found]


def table(heading: str, columns: str) -> list[list[str]]:
    """Return the rows of the table under a heading whose first line is ``columns``."""
    section = TEXT.split(f"# {heading}\n", 1)[1]
    lines = section.split(f"| {columns} |\n", 1)[1].splitlines()[1:]
    rows = lines[: next(at for at, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def bullets(before: str) -> list[str]:
    """Return the first code word of each bullet in the list after a sentence."""
    lines = TEXT.split(before, 1)[1].split("\n\n")[1].splitlines()
    return [line.split("`")[1] for line in lines if line.startswith("- ")]


# what the README says, and the pages that it leads to: their tables and lists are compared with the program
TEXT = "\n".join([README, *pages.there().values()])
PROSE_RULE = r"\b(simply|we|our|us|just|easily)\b"
TOUR = [block for block in blocks(README) if block.language in ("sh", "python")]


# the tour

MISSION = ("small", "healed", "tuned", "shallow", "release")  # what the main example writes, in order


def take_the_tour(folder: Path, **size: str) -> dict[str, str]:
    """Run every block in order, as a reader would; return heading -> what it printed."""
    bin_ = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **size}
    printed = {}
    for block in TOUR:
        shell = ["bash", "-e", "-o", "pipefail", "-c", block.text]
        words = shell if block.language == "sh" else [sys.executable, "-c", block.text]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"
        printed[block.headings[-1]] = done.stdout
    return printed


def check_the_tour(folder: Path, printed: dict[str, str]) -> None:
    assert printed["The first minute"].splitlines()[:2] == ["small", "healed"]
    assert printed["The commands"].startswith("decompose small: ")
    assert (folder / "plan.json").is_file()
    stages = ["decompose", "distill", "finetune", "prune-layers", "finetune"]
    written = [*(folder / f"{at}-{name}" for at, name in enumerate(MISSION, 1)), folder / "release"]
    compared = peftc.compare(written, analysis=folder / "analysis.json")
    base, *rows = compared.data["models"]
    made = [stages[:at] for at in range(1, 6)] + [[*stages, "export torch-export"]]
    assert [row["stages"] for row in rows] == made, "a row for each command that writes"
    assert compared.data["plan"]["parameters"] == rows[0]["parameters"]
    assert all(row["quality"] for row in (base, *rows)), "quality of each, beside the base"
    assert all(row["speedup"] and row["change"] for row in rows[:-1]), "the speed of the export stands in a note"
    printed_table = next(block.text for block in blocks(README) if block.language == "text")
    told = re.findall(r"^(?:\d-)?([a-z]+) +([a-z-]+(?: [a-z-]+)?)  +[\d,]+  ", printed_table, re.M)
    shown = [("dense", "dense"), *zip(MISSION, stages, strict=True), ("release", "export torch-export")]
    assert told == shown, "the table is that of the example"
    assert re.split(" {2,}", printed_table.splitlines()[0]) == list(compared.tables[0].columns)
    exported = json.loads((folder / "release" / "result.json").read_text())
    assert exported["report"]["data"]["deviation"] < 1e-4
    listed = re.findall(
        r"^  ([a-z]+\.\w+)", next(b.text for b in blocks(TEXT) if b.headings[-1:] == ("The artifact",)), re.M
    )
    assert {file.name for file in (folder / "small").iterdir()} == set(listed)


@pytest.mark.pages
def test_the_tour_runs_on_a_model_that_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftc.steps import demo

    monkeypatch.setattr(demo, "EPOCHS", 1)  # of those that the first command would train
    monkeypatch.setattr(demo, "STAGES", {"decompose": demo.STAGES["decompose"]})
    demo.demo(output_dir=tmp_path / "peftc-demo", device="cpu")
    small = {"SAMPLES": "200", "STEPS": "10"}
    check_the_tour(tmp_path, take_the_tour(tmp_path, **small))


@pytest.mark.slow
def test_the_tour_runs(tmp_path: Path) -> None:
    check_the_tour(tmp_path, take_the_tour(tmp_path))


def test_every_command_stands_in_the_table_with_its_page() -> None:
    told = [command for command, _ in table("The commands", "command | what it does")]
    assert sorted(told) == sorted(f"[{word}](peftc/docs/commands/{word}.md)" for word in COMMANDS)


def test_the_first_result_is_on_the_first_screen() -> None:
    """What a newcomer reads before there is something to look at."""
    lines = README.splitlines()
    assert lines.index("peftc demo") < 40


# commands and options


@pytest.mark.parametrize("word", COMMANDS)
def test_the_example_in_the_help_parses(word: str, peftc: Any) -> None:
    lines = re.findall(rf"^ +(peftc {word}.*)", peftc(word, "--help").stdout, re.M)
    assert lines
    for line in lines:
        COMMANDS[word].make_context(word, shlex.split(line)[2:])  # raises where an option or a value is wrong


@pytest.mark.parametrize("block", [b for b in TOUR if b.language == "sh"], ids=lambda block: block.headings[-1])
def test_the_options_of_the_tour_exist(block: Block, tmp_path: Path) -> None:
    # the shell fills in its variables itself; the commands of a pipe run at once, so each writes its line in one go
    noted = "peftc() { printf '%s\\n' \"$(printf '%q ' \"$@\")\" >>typed; }"
    subprocess.run(["bash", "-e", "-c", f"{noted}\n{block.text}"], cwd=tmp_path, check=True, capture_output=True)
    lines = (tmp_path / "typed").read_text().splitlines()
    assert len(lines) >= len(re.findall(r"\bpeftc [a-z-]+ ", re.sub(r"#.*", "", block.text)))
    for line in lines:
        words = shlex.split(line)
        COMMANDS[words[0]].make_context(words[0], words[1:])


def test_every_option_in_the_text_exists() -> None:
    params = [param for command in (pages.PROGRAM, *COMMANDS.values()) for param in command.params]
    known = {opt for param in params for opt in (*param.opts, *param.secondary_opts)} | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PROSE + CHANGELOG)) <= known


def test_the_gates_are_those_of_the_commands() -> None:
    there = {
        (param.opts[0], word)
        for word, command in COMMANDS.items()
        for param in command.params
        if (param.help or "").startswith("gate:")
    }
    told = {
        (gate.strip("`").split()[0], word)
        for gate, words, _ in table("Exit codes and gates", "gate | on | fails when")
        for word in words.split(", ")
    }
    assert told == there


def test_the_exit_codes_are_those_of_the_program() -> None:
    there = dict(re.findall(r"^(\d+) +(.*)", program.__doc__ or "", re.M))
    told = dict(table("Exit codes and gates", "code | means"))
    assert told.keys() == there.keys()
    for code, meaning in there.items():
        assert told[code].startswith(meaning.split(";")[0]), code


# the other tables

MODELS = {
    "`timm/NAME`": ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "timm"),
    "`timm:NAME`": ("timm:vit_tiny_patch16_224", "timm-arch"),
    "`ORG/NAME[@REVISION]`": ("google/vit-base@main", "transformers"),
    "`hf:ORG/NAME`": ("hf:google/vit-base", "transformers"),
    "`python:package.module:factory`": ("python:cifar_resnet:CifarResNet", "python"),
}


def test_the_forms_of_a_model_are_those_of_the_program(tmp_path: Path) -> None:
    told = [form for forms, _ in table("What MODEL takes", "form | is") for form in forms.split(", ")]
    others = {
        "a folder with `peftc.json`", "a folder with `config.json` and safetensors",
        "a folder with `adapter_config.json`",
        "`file.gguf`", "`file.safetensors --arch timm:NAME`", "`-`", "nothing",
    }  # fmt: skip
    assert set(told) == MODELS.keys() | others
    for spec, kind in MODELS.values():
        assert source.locate(source.Source(spec)).kind == kind, spec
    for form in re.findall(r"`([^`]+)`", source.FORMS):
        assert form in TEXT, form
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert source.locate(source.Source(str(tmp_path))).kind == "transformers"
    (tmp_path / "config.json").write_text('{"architecture": "resnet26"}')
    assert source.locate(source.Source(str(tmp_path))).kind == "timm"
    (tmp_path / "peftc.json").write_text("{}")
    assert source.locate(source.Source(str(tmp_path))).kind == "artifact"
    (tmp_path / "file.safetensors").touch()
    bare = source.Source(str(tmp_path / "file.safetensors"), arch="timm:resnet26")
    assert source.locate(bare).kind == "timm-arch"


def test_the_forms_of_data_are_those_of_the_program() -> None:
    from peftc import data
    from peftc.data import spec, tables

    told = " ".join(form for form, _ in table("What --data takes", "form | is"))
    assert set(tables.ENDINGS) <= set(re.findall(r"`(\.\w+)`", told))
    for form in re.findall(r"`([^`]+)`|(\.\w+)", data.FORMS):
        assert (form[0] or form[1]) in told, form
    assert f"`{spec.GENERATED}N`" in told


def test_the_lists_of_choices_are_those_of_the_program() -> None:
    from peftc.tasks.table import TASKS

    page = pages.there()["commands/decompose.md"]
    budgets = [option.strip("`").split()[0][2:] for option, _ in table("How much to keep", "option | keeps")]
    assert {option.replace("-", "_") for option in budgets} == set(config.BUDGET)
    assert bullets("`--allocation` says") == list(allocate.ALLOCATIONS)
    assert set(bullets("For convolutions")) == set(METHODS["decompose_conv"])
    assert set(re.findall(r"`--method (\w+)`", page)) == set(METHODS["decompose"])
    told = [name for cell, *_ in table("Tasks and metrics", "task | a sample | metrics") for name in cell.split(", ")]
    assert set(told) == set(TASKS)


def test_the_json_object_has_the_keys_that_are_listed() -> None:
    told = TEXT.split("With `--json` you get one object: ")[1].split(" and the figures")[0]
    assert set(re.findall(r"`(\w+)`", told)) == {*Report("show").to_json(), "pushed"}
    assert f"`schema_version` ({SCHEMA_VERSION})" in told


def test_the_shells_that_complete_are_those_of_the_page() -> None:
    block = next(block.text for block in blocks(TEXT) if block.headings[-1:] == ("Shell completion",))
    assert re.findall(rf"{completion.VARIABLE}=source_(\w+) peftc", block) == list(completion.SCRIPTS)


def test_what_is_named_is_there() -> None:
    for path in re.findall(r"`((?:examples|tests)/[^`]*|peftc/[\w/]*(?:\.py|\.md)?)`", TEXT):
        assert (REPOSITORY / path).exists(), path
    makefile = (REPOSITORY / "Makefile").read_text()
    for goal in re.findall(r"make (\w+)[`,]", README):
        assert re.search(rf"^{goal}:", makefile, re.M), goal


# prose


def test_the_changelog_names_every_command_and_function() -> None:
    assert "\n## [Unreleased]\n" in CHANGELOG
    for word in COMMANDS:
        assert f"`peftc {word}`" in CHANGELOG
    for name in peftc.__all__:
        if name[0].islower():
            assert f"`peftc.{name}`" in CHANGELOG


@pytest.mark.parametrize("text", [PROSE, CHANGELOG], ids=["README", "CHANGELOG"])
def test_the_prose_keeps_to_the_rules(text: str) -> None:
    assert not re.findall(PROSE_RULE, text, re.I)


def test_lines_of_the_text_end_in_time() -> None:
    assert [line for line in (README + CHANGELOG).splitlines() if len(line) > 140] == []
