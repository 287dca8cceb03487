"""How a line goes on: what peftc answers, and what bash, zsh and fish make of it."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from peftc.cli import completion
from peftc.docs.source.pages import COMMANDS, PROGRAM
from peftc.methods.registry import METHODS
from peftc.options import OPTIMIZERS, SCHEDULES

SHELLS = tuple(completion.SCRIPTS)


def words(line: str) -> list[str]:
    return [word for word, _ in completion.answer(PROGRAM, line).words]


# what is answered


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("peftc ", list(COMMANDS)),
        ("peftc tr", ["truncate"]),
        ("/some/where/peftc tr", ["truncate"]),
        ("peftc --s", ["--show-completion"]),
        ("peftc prune_layers --sc", ["--score"]),
        ("peftc decompose --rank", ["--rank", "--rank-multiple"]),
        ("peftc decompose --rank_m", ["--rank-multiple"]),
        ("peftc decompose --ratio 0.5 --rati", []),
        ("peftc decompose --skip a --ski", ["--skip"]),
        ("peftc decompose --joi", ["--joint"]),
        ("peftc decompose --no-jo", ["--no-joint"]),
        ("peftc distill --schedule ", list(SCHEDULES)),
        ("peftc distill --schedule c", ["cosine", "constant"]),
        ("peftc distill --schedule=c", ["--schedule=cosine", "--schedule=constant"]),
        ("peftc distill --optimizer ", list(OPTIMIZERS)),
        ("peftc decompose --device m", ["mps"]),
        ("peftc decompose --method ", ["auto", *METHODS["decompose"]]),
        ("peftc finetune m --method ", [*METHODS["adapter"]]),
        ("peftc prune-layers m --method full --score b", ["block-influence"]),
        ("peftc export m --format t", ["timm", "torch-export"]),
        ("peftc export --format hf-", ["hf-code"]),
        ("peftc distill --loss lo", ["logits="]),
        ("peftc distill --loss features=1,ta", ["features=1,task="]),
        ("peftc distill --set logits.t", ["logits.temperature="]),
        ("peftc finetune --method lora --set ra", ["rank="]),
        ("peftc finetune --set ra", ["rank="]),
        ("peftc prune-layers --score tsne-silhouette --set perp", ["perplexity="]),
        ("peftc evaluate --protocol ", ["gptq"]),
        ("peftc bench small --against ba", ["base"]),
        ("peftc methods pr", ["prune-layers"]),
        ("peftc methods finetune sn", ["snell", "snella"]),
        ("peftc decompose --data skl", ["sklearn:digits"]),
        ("peftc nothing --ra", []),
        ("peftc decompose 'open quote --ra", []),
        ("", list(COMMANDS)),
    ],
)  # fmt: skip
def test_a_line_goes_on(line: str, expected: list[str]) -> None:
    assert words(line) == expected


@pytest.mark.parametrize(
    ("line", "disk"),
    [
        ("peftc decompose ", completion.FILES),
        ("peftc decompose m --data ", completion.FILES),
        ("peftc decompose m --data=", completion.FILES),
        ("peftc decompose m -o ", completion.FOLDERS),
        ("peftc decompose m --statistics ", completion.FOLDERS),
        ("peftc run ", completion.FILES),
        ("peftc compare a b c", completion.FILES),
        ("peftc decompose m --seed ", completion.NOTHING),
        ("peftc decompose m x", completion.NOTHING),
        ("peftc decompose m --ra", completion.NOTHING),
    ],
)
def test_files_and_folders_stand_where_they_may(line: str, disk: str) -> None:
    assert completion.answer(PROGRAM, line).disk == disk


@pytest.mark.parametrize("word", COMMANDS)
def test_every_value_that_help_spells_out_is_completed(word: str) -> None:
    for param in COMMANDS[word].params:
        if "|" in (param.metavar or "") and not param.is_flag:
            assert words(f"peftc {word} {param.opts[-1]} ") == param.metavar.split("|")


def test_the_tasks_are_those_of_the_table() -> None:
    from peftc.tasks.table import TASKS

    assert list(TASKS) == list(completion.TASKS)


def test_models_in_the_cache_of_the_hub_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--timm--resnet50.a1_in1k").mkdir()
    (tmp_path / "datasets--org--photos").mkdir()
    assert words("peftc decompose timm") == ["timm/resnet50.a1_in1k"]


def test_the_answer_needs_nothing_heavy() -> None:
    code = "import sys; from peftc.cli.app import app; sys.argv = ['peftc']; app()"
    asked = {completion.VARIABLE: "bash", completion.LINE: "peftc finetune --method "}
    line = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, **asked})
    assert "snella\t" in done.stdout
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not names & {"torch", "numpy", "rich", "transformers", "timm", "huggingface_hub"}


# in the shells


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it but a program `peftc` and a folder `photos`; the working folder, too."""
    program = tmp_path / "bin" / "peftc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m peftc "$@"\n')
    program.chmod(0o755)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "rows.csv").touch()
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR", "BASH_ENV", "ENV"):
        monkeypatch.delenv(name, raising=False)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    root = str(Path(__file__).parents[2])
    for name, value in {"HOME": tmp_path, "PATH": path, "TERM": "xterm", "PYTHONPATH": root}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def installed(shell: str) -> str:
    """Install completion as its user would, and return the name of the shell; skip where it is not here."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no `{shell}` on this machine")
    line = [shell, "-c", "peftc --install-completion; true"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert f"completion for {shell}" in done.stderr, done.stderr
    return shell


def completed(shell: str, lines: Iterable[str]) -> list[str]:
    """Return what an interactive shell makes of lines at a TAB: the words of each behind `peftc`, in angles."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(shell, [shell, "-i"])
    found, ends = [], time.monotonic() + 120
    try:
        _until(terminal, "", ends)  # the prompt is there
        for number, line in enumerate(lines):
            # at the TAB the line goes on; then it becomes the arguments of a command that prints them
            os.write(terminal, f"{line}\t\x05 'end{number}'\x01printf '<%s>' \r".encode())
            text = _until(terminal, f"<end{number}>", ends).rpartition(f"<end{number}>")[0]
            found.append(text.rpartition("<peftc>")[2].replace("/>", ">"))  # zsh takes the / of a folder off at a space
    finally:
        os.write(terminal, b"\x15exit\r")
        os.close(terminal)
        os.waitpid(child, 0)
    return found


def _until(terminal: int, mark: str, ends: float) -> str:
    """Read until a mark is there, or, without one, until nothing more comes."""
    seen = b""
    while not mark or mark.encode() not in seen:
        if select.select([terminal], [], [], 0.5)[0]:
            seen += os.read(terminal, 65536)
        elif not mark and seen:
            break
        elif time.monotonic() > ends:
            pytest.fail(f"no answer: {seen!r}")
    return seen.decode(errors="replace").replace("\r", "")


LINES = {
    "peftc trun": "<truncate>",
    "peftc distill --sched": "<distill><--schedule>",
    "peftc distill --schedule cos": "<distill><--schedule><cosine>",
    "peftc distill --schedule=cos": "<distill><--schedule=cosine>",
    "peftc export small --format exec": "<export><small><--format><executorch>",
    "peftc finetune --set thr": "<finetune><--set><thr>",  # of lora, which has none of that name
    "peftc finetune --method sara --set thr": "<finetune><--method><sara><--set><threshold=>",
    "peftc evaluate --data skle": "<evaluate><--data><sklearn:digits>",
    "peftc evaluate --data sklearn:di": "<evaluate><--data><sklearn:digits>",
    "peftc evaluate --data pho": "<evaluate><--data><photos>",
    "peftc evaluate --data=photos/ro": "<evaluate><--data=photos/rows.csv>",
    "peftc calibrate -o photos/": "<calibrate><-o><photos/cats>",
}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_tab_in_the_shell(shell: str, home: Path) -> None:
    installed(shell)
    assert dict(zip(LINES, completed(shell, LINES), strict=True)) == LINES


def test_fish_completes_too(home: Path) -> None:
    installed("fish")

    def found(line: str) -> list[str]:
        asked = ["fish", "-c", f'complete -C "{line}"']
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()

    assert found("peftc trun") == ["truncate\tCut an artifact with all ranks to a budget, in seconds."]
    assert found("peftc distill --schedule cos") == ["cosine"]
    assert found("peftc distill --schedule=cos") == ["--schedule=cosine"]
    assert [line.partition("\t")[0] for line in found("peftc evaluate --data pho")] == ["photos/"]
    assert "photos/rows.csv" in "\n".join(found("peftc evaluate --data photos/ro"))


def test_to_install_twice_changes_nothing_more(home: Path) -> None:
    (home / ".bashrc").write_text("alias ll='ls -l'")
    installed("bash")
    once = (home / ".bashrc").read_text()
    assert once.splitlines()[0] == "alias ll='ls -l'" and len(once.splitlines()) == 2
    installed("bash")
    assert (home / ".bashrc").read_text() == once


def test_a_shell_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch, peftc) -> None:
    import shellingham

    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("tcsh", "/bin/tcsh"))
    for option in ("--install-completion", "--show-completion"):
        refused = peftc(option)
        assert refused.exit_code == 2
        assert "no completion for `tcsh`" in refused.stderr and "_PEFTC_COMPLETE=source_bash" in refused.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed_for_who_wants_to_put_it_elsewhere(shell: str, monkeypatch, peftc) -> None:
    import shellingham

    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, shell))
    assert peftc("--show-completion").stdout == completion.SCRIPTS[shell]
    assert peftc(env={completion.VARIABLE: f"source_{shell}"}).stdout == completion.SCRIPTS[shell]
    assert peftc(env={completion.VARIABLE: "source_tcsh"}).exit_code == 1
