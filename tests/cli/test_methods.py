"""`peftc methods`: every method in the table of its command, and suggestions that work when typed."""

import json
import re
import shlex

import pytest

from peftc.docs.source import pages
from peftc.methods.registry import METHODS
from peftc.steps.methods import KINDS, details_of, methods

COMMANDS = list(dict.fromkeys(one.command for one in KINDS.values()))
EACH = [(kind, name) for kind, names in METHODS.items() for name in names]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_has_every_method_of_its_command(command: str, peftc) -> None:
    text = peftc("methods", command, env={"COLUMNS": "160"}).stdout
    for kind in (kind for kind, one in KINDS.items() if one.command == command):
        assert KINDS[kind].heading in text
        for name in METHODS[kind]:
            assert re.search(rf"^{name.replace('_', '-')}  ", text, re.M), name


def test_a_column_that_holds_nothing_is_left_out() -> None:
    (formats,), (adapters,) = methods("export").tables, methods("finetune").tables
    assert list(formats.columns) == ["name", "what it is", "when to take it"]
    assert adapters.columns[-1] == "paper" and "" in [row[-1] for row in adapters.rows]


@pytest.mark.parametrize(("kind", "name"), EACH, ids=lambda value: value)
def test_each_method_says_what_it_is_when_to_take_it_and_its_paper(kind: str, name: str) -> None:
    told = details_of(kind, name)
    assert told["summary"] and told["when"]
    assert not re.search(r"arXiv|\]\(|``", told["summary"] + told["when"])
    page = pages.pages()[pages.page_of(kind, name)]
    assert told["summary"].split(": ")[-1] in page.replace("``", "`")
    assert kind == "format" or name in ("full", "head") or re.fullmatch(r"arXiv [\d.]+|[A-Z].* \d{4}", told["paper"])


def test_the_paper_is_the_first_that_is_named() -> None:
    assert details_of("decompose", "svd")["paper"] == "Eckart and Young 1936"
    assert details_of("importance", "silhouette")["paper"] == "Rousseeuw 1987"
    assert details_of("decompose", "kfac")["paper"] == "arXiv 1503.05671"
    assert details_of("adapter", "adapter")["paper"] == "arXiv 1902.00751"


@pytest.mark.parametrize("width", [40, 60, 100, 160])
@pytest.mark.parametrize("words", ["", "finetune", "decompose", "prune-layers tsne-silhouette"])
def test_no_line_is_longer_than_the_terminal(words: str, width: int, peftc) -> None:
    lines = peftc("methods", *words.split(), env={"COLUMNS": str(width)}).stdout.splitlines()
    titles = {line for line in lines if line.partition(":")[0] in {one.heading for one in KINDS.values()}}
    assert max(len(line) for line in lines if line not in titles) <= max(width, 60)


def test_one_method_shows_its_settings(peftc) -> None:
    text = peftc("methods", "finetune", "lora").stdout
    assert "peftc finetune --method lora" in text and "rank=8 " in text and "alpha=16.0 " in text
    assert "features.KEY=VALUE" in peftc("methods", "distill", "features").stdout
    assert "no settings" in peftc("methods", "export", "hf").stdout
    found = json.loads(peftc("methods", "prune-layers", "tsne-silhouette", "--json").stdout)
    assert list(found["details"]["importance"]) == ["tsne_silhouette"]


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        ("finetun", "peftc methods finetune"),
        ("prunelayers", "peftc methods prune-layers"),
        ("lora", "peftc methods finetune lora"),
        ("block-influence", "peftc methods prune-layers block-influence"),
        ("finetune lorra", "peftc methods finetune lora"),
        ("xyzzy", "peftc methods"),
    ],
)
def test_what_is_suggested_works_when_it_is_typed(typed: str, suggested: str, peftc) -> None:
    refused = peftc("methods", *typed.split())
    assert refused.exit_code == 2
    assert re.findall(r"`(peftc [^`]*)`", refused.stderr.partition("hint:")[2]) == [suggested]
    assert peftc(*shlex.split(suggested)[1:]).exit_code == 0


@pytest.mark.parametrize(
    "word", ["analyze", "decompose_conv", "decompose-conv", "adapter", "loss", "importance", "format"]
)
def test_kinds_and_related_commands_do_as_well(word: str, peftc) -> None:
    assert peftc("methods", word).exit_code == 0


def test_a_method_of_another_package_stands_in_the_table_too(peftc, monkeypatch) -> None:
    from peftc.methods import registry

    point = type("Point", (), {"value": "theirs.module:mine"})
    monkeypatch.setattr(registry, "outsiders", lambda kind: {"mine": point} if kind == "decompose" else {})
    assert re.search("^mine *$", peftc("methods", "decompose").stdout, re.M)
    assert "no settings" in peftc("methods", "decompose", "mine").stdout
