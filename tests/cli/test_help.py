"""What `--help` prints: everything once, under the headings of the pages, whole at any width."""

import os
import re
import subprocess
import sys

import pytest

from peftc.cli import app as program
from peftc.cli import help
from peftc.docs.source import pages

COMMANDS = pages.COMMANDS
WIDTHS = (60, 80, 100, 160)


def headings(text: str) -> list[str]:
    return [line.removesuffix(":") for line in re.findall(r"^(?!Usage)(\S.*)$", text, re.M)]


@pytest.mark.parametrize("word", COMMANDS)
def test_every_option_stands_in_the_help_once_and_under_its_heading(word: str, peftc) -> None:
    found = help.sections(COMMANDS[word])
    assert sorted(p.name for params in found.values() for p in params) == sorted(p.name for p in COMMANDS[word].params)
    text = peftc(word, "--help").stdout
    assert headings(text) == [pages.titled(heading) for heading in found]
    for param in COMMANDS[word].params:
        if param.param_type_name == "option":
            assert len(re.findall(rf"^  .*{param.opts[-1]}\b(?!-)", text.partition("Example:")[2], re.M)) >= 1


def test_the_headings_are_those_of_the_page(peftc) -> None:
    page = pages.pages()["commands/decompose.md"]
    shared = {pages.titled(heading) for heading in help.SHARED}
    own = [heading for heading in headings(peftc("decompose", "--help").stdout) if heading not in shared]
    assert re.findall(r"^### (.*)", page.partition("## Options")[2], re.M) == own


def test_every_command_stands_in_one_group_and_on_the_index_too(peftc) -> None:
    text = peftc("--help").stdout
    words = " ".join(program.GROUPS.values()).replace("_", "-").split()
    assert sorted(words) == sorted(COMMANDS)
    assert re.findall(r"^  ([a-z][a-z-]+)  ", text.partition("Example:")[2], re.M) == words
    assert headings(text)[:-1] == [pages.titled(heading) for heading in program.GROUPS]
    index = pages.pages()["README.md"].partition("## Commands")[2].partition("## Methods")[0]
    assert re.findall(r"^### (.*)", index, re.M) == headings(text)[:-1]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("word", ["", "decompose"])
def test_no_line_is_cut_or_longer_than_the_terminal(word: str, width: int) -> None:
    line = [
        sys.executable,
        "-m",
        "peftc",
        *word.split(),
        "--help",
    ]  # the runner of the other tests has a width of its own
    text = subprocess.run(line, env={**os.environ, "COLUMNS": str(width)}, capture_output=True, text=True).stdout
    assert max(len(line) for line in text.splitlines() if not line.startswith("    peftc ")) <= width
    joined = " ".join(text.split())
    told = [one.get_short_help_str(1000) for one in COMMANDS.values()] if not word else []
    told += [param.help for param in COMMANDS[word].params] if word else []
    for phrase in told:
        assert " ".join(phrase.split()) in joined
    assert not re.search(r"\[default:$", text, re.M)


def test_help_is_plain_where_it_is_no_terminal(peftc) -> None:
    assert "\x1b" not in peftc("--help").stdout + peftc("decompose", "--help").stdout
