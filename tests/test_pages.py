"""The pages under peftc/docs: written anew from what they say, every example run, every link somewhere."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc as package
from peftc.docs.source import pages
from tests.test_docs import PROSE_RULE, REPOSITORY, Block, blocks

WRITTEN = pages.pages()
DOCS = pages.there()
EXAMPLES = {name: [b for b in blocks(text) if b.language in ("sh", "python")] for name, text in DOCS.items()}
ELSEWHERE = {"commands/demo.md", "methods/format/executorch.md"}  # the README runs one, tests of exports the other
INSTALLED = "extending.md"  # its examples are one module, which tests/test_extending.py installs


def test_the_pages_are_those_that_would_be_written() -> None:
    assert DOCS.keys() == WRITTEN.keys() | pages.GUIDES.keys(), "run `make docs`"
    for name, text in WRITTEN.items():
        assert DOCS[name] == text, f"peftc/docs/{name} is out of date: run `make docs`"


def test_every_command_and_every_method_has_a_page_with_an_example() -> None:
    from peftc.methods.registry import METHODS
    from peftc.steps.methods import page_of

    expected = {f"commands/{word}.md" for word in pages.COMMANDS}
    expected |= {page_of(kind, name) for kind, names in METHODS.items() for name in names}
    there = {name for name, found in EXAMPLES.items() if found}
    assert expected - ELSEWHERE <= there
    for name in expected - ELSEWHERE:
        word = Path(name).stem if name.startswith("commands/") else Path(name).stem.replace("-", "[-_]")
        assert any(re.search(rf"\b{word}\b", block.text) for block in EXAMPLES[name]), f"{name} shows something else"


def test_a_setting_is_told_with_its_default_and_its_meaning() -> None:
    text = DOCS["methods/adapter/snella.md"]
    assert re.search(r"\| `sparsity` \| `0.55` \| in \[0, 1\), share of all entries .*\|", text)
    assert re.search(r"\| `split` \| `3` \| \w.*\|", text), "what `snell` says of it"
    assert "`--learning-rate 0.001` and `--weight-decay 0.0001`" in text
    for name, page in DOCS.items():
        told = page.split("## Options")[0] + page.partition("## JSON")[2]
        assert not re.search(r"^\| `\w+` \| (`[^`]*` \|)?  \|$", told, re.M), f"{name}: a setting or a key says nothing"


@pytest.mark.parametrize("word", pages.COMMANDS)
def test_the_options_of_a_page_are_those_of_the_command(word: str) -> None:
    text = DOCS[f"commands/{word}.md"].split("## Options")[1].split("## JSON")[0]
    told = {
        option for row in re.findall(r"^\| (`-.*?) \|", text, re.M) for option in re.findall(r"`(--?[a-z-]+)`", row)
    }
    own = {option for param in pages.COMMANDS[word].params for option in (*param.opts, *param.secondary_opts)}
    shared = re.findall(r"`(--?[a-z-]+)`", DOCS["options.md"])
    assert told == {option for option in own if option.startswith("-")} - set(shared)


def test_every_option_in_the_text_exists() -> None:
    params = [param for command in pages.COMMANDS.values() for param in command.params]
    known = {opt for param in params for opt in (*param.opts, *param.secondary_opts)} | {"--help"}
    of_others = {"--multi_gpu", "--num_processes", "--install-completion", "--show-completion"}  # launchers and shells
    of_others |= {"--model", "--model_args", "--tasks", "--outfile", "--outtype"}  # lm-eval and llama.cpp
    of_others |= {"--no-deps", "--tensor-parallel-size"}  # pip and vLLM
    for name, text in DOCS.items():
        if name != "migration.md":  # it names those of other tools
            found = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text.replace("pip install --", "")))
            assert found - of_others <= known, name


def test_the_side_of_peftc_in_the_migration_exists() -> None:
    params = [param for command in pages.COMMANDS.values() for param in command.params]
    known = {opt for param in params for opt in (*param.opts, *param.secondary_opts)}
    rows = re.findall(r"^\| (?!there|---)(.*) \|$", DOCS["migration.md"], re.M)
    assert len(rows) > 50
    for row in rows:
        there, here, _ = re.split(r" \| ", row + " | ", maxsplit=2)
        assert there
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", here)) <= known, row
        for word in re.findall(r"`peftc ([a-z-]+)", here):
            assert word in pages.COMMANDS, row


# links


@pytest.mark.parametrize("name", ["../../README.md", *DOCS])
def test_every_link_leads_somewhere(name: str) -> None:
    here = (pages.DOCS / name).resolve()
    text = re.sub(r"```.*?```", "", here.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, part = link.partition("#")
        there = (here.parent / file).resolve() if file else here
        assert there.is_file(), f"{name}: {link}"
        assert there.is_relative_to(REPOSITORY), f"{name}: {link}"
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", there.read_text(), flags=re.S), re.M)
        assert not part or part in {anchor(heading) for heading in headings}, f"{name}: {link}"


def anchor(heading: str) -> str:
    """Return what GitHub calls a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_can_be_reached_from_the_readme() -> None:
    found, left = set(), [REPOSITORY / "README.md"]
    while left:
        here = left.pop()
        if here in found:
            continue
        found.add(here)
        links = re.findall(r"\]\(([^)#]+\.md)", here.read_text(encoding="utf-8"))
        left += [(here.parent / link).resolve() for link in links if not link.startswith("https://")]
    assert {pages.DOCS / name for name in DOCS} <= found


@pytest.mark.parametrize("name", DOCS)
def test_the_prose_of_a_page_keeps_to_the_rules(name: str) -> None:
    text = re.sub(r"```.*?```", "", DOCS[name], flags=re.S)
    assert not re.findall(PROSE_RULE, text, re.I)


# the examples


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_resnet: Path, tiny_bert: Path, tiny_bert_classifier: Path
) -> Iterator[Path]:
    """What the index says that the folder of an example holds."""
    from peftc.steps import demo
    from tests.networks import WORDS

    folder = tmp_path_factory.mktemp("examples")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "EPOCHS", 1)
        patch.setattr(demo, "STAGES", {"decompose": demo.STAGES["decompose"]})
        demo.demo(output_dir="peftc-demo", device="cpu")
        package.decompose("peftc-demo/dense-seed-0", ratio=0.5, output_dir="small")
        package.finetune("small", data="sklearn:digits", num_samples=64, steps=2, delta=True, output_dir="delta")
    for name, model in (("resnet", tiny_resnet), ("sentences", tiny_bert), ("bert", tiny_bert_classifier)):
        shutil.copytree(model, folder / name)
    rows = [" ".join(random.Random(at).sample(WORDS[:19], 6)) for at in range(24)]
    (folder / "sentences.csv").write_text("\n".join(["text", *rows]) + "\n")
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.pages
@pytest.mark.parametrize("name", [name for name, found in EXAMPLES.items() if found and name != INSTALLED])
def test_the_examples_of_a_page_run(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Callable[..., Any]
) -> None:
    for there in models.iterdir():
        (tmp_path / there.name).symlink_to(there)
    monkeypatch.chdir(tmp_path)
    for block in EXAMPLES[name]:
        if block.language == "python":
            exec(compile(block.text, name, "exec"), {})
        else:
            run(block, peftc)


def run(block: Block, peftc: Callable[..., Any]) -> None:
    """Run the commands of peftc in this process, and what else there is in a shell."""
    other: list[str] = []
    for line in block.text.splitlines():
        if not line.startswith("peftc "):
            other.append(line)
            continue
        if other:
            subprocess.run(
                ["bash", "-e", "-c", "\n".join(other)], check=True, env={**os.environ, "PATH": "/usr/bin:/bin"}
            )
            other = []
        words, _, file = line.partition(" >")
        done = peftc(*shlex.split(words, comments=True)[1:])
        assert done.exit_code == 0, f"{line}\n{done.stdout}{done.stderr}"
        if file:
            Path(file.strip()).write_text(done.stdout, encoding="utf-8")
    assert not other, other
