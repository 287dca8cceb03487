"""The command line and the Python functions are one thing: same words, order and defaults."""

import importlib
import inspect

import pytest

import peftc
from peftc.cli.app import app
from peftc.cli.options import OUTPUT, PUSH, SOURCE

STEPS = [
    "analyze", "calibrate", "decompose", "truncate", "prune_layers", "distill", "finetune", "merge", "extract_lora",
    "export", "evaluate", "bench", "demo", "show", "compare", "report", "init", "env", "methods",
]  # fmt: skip
OF_THE_COMMAND_LINE = ["run"]  # it runs commands of the command line: in Python the door to it is in `peftc` itself
PLACED = ("model", "models", "command", "name")  # these may be given by their place


COMMANDS = {info.callback.__name__: info.callback for info in app.registered_commands if info.callback}


def step(word: str) -> inspect.Signature:
    return inspect.signature(getattr(importlib.import_module(f"peftc.steps.{word}"), word))


@pytest.mark.parametrize("word", STEPS)
def test_a_command_has_the_parameters_of_its_function(word: str) -> None:
    extra = {"ctx", *SOURCE, *PUSH, *OUTPUT}
    ours = {name: p.default for name, p in inspect.signature(COMMANDS[word]).parameters.items() if name not in extra}
    theirs = {name: p.default for name, p in step(word).parameters.items()}
    for named in ("model", "models"):  # the project may stand in for it on the command line
        ours.pop(named, None), theirs.pop(named, None)
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("word", STEPS)
def test_all_but_the_model_are_keywords(word: str) -> None:
    kinds = {name: p.kind for name, p in step(word).parameters.items() if name not in PLACED}
    assert set(kinds.values()) <= {inspect.Parameter.KEYWORD_ONLY}, kinds


def test_every_step_is_a_command_and_a_public_name() -> None:
    assert COMMANDS.keys() == {*STEPS, *OF_THE_COMMAND_LINE}
    assert COMMANDS.keys() <= set(peftc.__all__)


@pytest.mark.parametrize("word", COMMANDS)
def test_every_command_is_called_by_its_name(word: str) -> None:
    found = getattr(peftc, word)
    assert inspect.isfunction(found) and found.__name__ == word
    assert inspect.getdoc(found), "what an editor shows"


def test_a_command_that_is_named_like_a_module_is_the_command_whatever_was_imported() -> None:
    for word in ("methods", "report"):
        module = importlib.import_module(f"peftc.{word}")
        assert getattr(peftc, word) is not module and inspect.isfunction(getattr(peftc, word))
    from peftc.report import Report

    found = peftc.methods("finetune", "lora")
    assert isinstance(found, Report) and found.data["methods"] == {"adapter": {"lora": "peftc.methods.adapter.lora"}}
    assert found.tables[0].rows[0][0] == "lora"


def test_a_chain_runs_from_python(tmp_path, monkeypatch, small_vit, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peftc.toml").write_text(f'model = "{small_vit}"\nchain = ["truncate"]\n')
    with pytest.raises(peftc.PeftcError):
        peftc.run()
    (tmp_path / "peftc.toml").write_text(f'model = "{small_vit}"\nchain = ["show"]\n')
    assert peftc.run(dry_run=True).data["steps"][0]["state"] == "would run"
    done = peftc.run("peftc.toml")
    assert done.data["steps"][0]["state"] == "done" and done.passed
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", peftc.__all__)
def test_a_public_name_exists(name: str) -> None:
    if name in STEPS:
        step(name)
    assert getattr(peftc, name).__name__ == name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = peftc.nothing


@pytest.mark.parametrize("word", [*STEPS, *OF_THE_COMMAND_LINE])
def test_help_ends_with_an_example(word: str) -> None:
    text = inspect.getdoc(COMMANDS[word]) or ""
    assert text.splitlines()[-1].startswith(f"  peftc {word.replace('_', '-')}")


def test_the_list_of_commands_cuts_no_summary_short(peftc) -> None:
    listed = peftc("--help").stdout.partition("Make it smaller:")[2]
    assert len(listed.split("\n")) > len(STEPS)
    assert "..." not in listed


def test_every_option_has_one_help_phrase(peftc) -> None:
    from typer.main import get_command

    for word, one in get_command(app).commands.items():
        for param in one.params:
            assert param.help, f"{word} {param.name}"
            assert not param.help.endswith(".")
        result = peftc(word, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")
