"""What a step says on the terminal: a few lines, the rest with `-v`, nothing twice along a chain, a sign of life."""

import io
import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.cli import console
from peftc.report import Report, Table

DATA = ("--data", "sklearn:digits", "--num-samples", "60")
CHAIN = {  # in this order, each in the folder that the ones before it left
    "decompose": (
        "{vit}",
        "--ratio",
        "0.5",
        *DATA,
        "--calibration-samples",
        "32",
        "--sensitivity",
        "2",
        "-o",
        "1-small",
    ),
    "distill": ("1-small", *DATA, "--steps", "2", "-o", "2-healed"),
    "finetune": ("2-healed", *DATA, "--steps", "2", "-o", "3-tuned"),
    "prune-layers": ("3-tuned", *DATA, "--score", "block-influence", "--keep", "1", "-o", "4-shallow"),
    "evaluate": ("4-shallow", *DATA, "--against", "base"),
    "export": ("4-shallow", "--format", "safetensors", "--rounds", "5", "-o", "release"),
}


@pytest.fixture
def said(tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Any) -> Callable[..., Any]:
    """Run a command of the chain in its folder, as wide as asked for."""
    monkeypatch.chdir(tmp_path)

    def run(word: str, *more: str, width: int = 100) -> Any:
        monkeypatch.setenv("COLUMNS", str(width))
        done = peftc(word, *(part.format(vit=tiny_vit) for part in CHAIN[word]), *more)
        assert done.exit_code == 0, done.stderr
        return done

    return run


def test_a_step_says_at_most_ten_lines_and_the_rest_with_v(said: Callable[..., Any]) -> None:
    for word in CHAIN:
        said(word)  # does it; what it says below is that it was done
    for width in (60, 100, 160):
        for word in CHAIN:
            lines = said(word, width=width).stderr.partition("warning: ")[0].splitlines()
            most = 10 if width > 60 else 28 if word == "evaluate" else 18  # its table stands in blocks there
            assert len(lines) <= most, "\n".join([word, *lines])
            assert all(len(line) <= width for line in lines if "`" not in line), "\n".join(lines)
    for word in ("decompose", "distill", "prune-layers"):
        brief, whole = (said(word, *more).stderr for more in ((), ("-v",)))
        assert len(whole.splitlines()) > 2 * len(brief.splitlines()), word
        assert "already done" in brief and "size" in brief


def test_what_is_next_is_said_to_people_alone(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    report = Report("distill", summary={"asked": "a", "next": "`peftc bench x`"})
    console.tell(report)
    assert capsys.readouterr().err == "asked  a\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.tell(report)
    assert "next" in capsys.readouterr().err


def test_a_summary_stands_for_what_is_not_main(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rows = [["x", 1]]
    report = Report("analyze", tables=[Table("main", ["", ""], rows, main=True), Table("rest", ["", ""], rows)])
    report.notes = ["a detail", "guessed: a column", "resumed at step 3 of 4"]
    report.warnings = ["beware"]
    console.tell(report)
    printed = capsys.readouterr().err
    assert all(text in printed for text in ("main", "rest", "a detail"))
    report.summary = {"asked": "it"}
    console.tell(report)
    printed = capsys.readouterr().err
    assert all(text in printed for text in ("main", "asked", "guessed: a column", "resumed", "beware"))
    assert "rest" not in printed and "a detail" not in printed
    console.tell(report, quiet=True)
    assert capsys.readouterr().err == "guessed: a column\nwarning: beware\n"
    report.told = ["guessed: a column"]  # by the artifact before it
    console.tell(report, verbose=True)
    printed = capsys.readouterr().err
    assert "guessed" not in printed and "a detail" in printed


def test_a_long_line_goes_on_below_its_text(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    console.tell(Report("x", summary={"asked": "one two three four five six seven", "so": "eight"}))
    told = ["asked  one two three four five", "       six seven", "so     eight"]
    assert capsys.readouterr().err.splitlines() == told
    console.tell(Report("x", summary={"try": "`peftc decompose some/model --ratio 0.5 -o small`"}))
    assert len(capsys.readouterr().err.splitlines()) == 1, "what is typed is not broken"


def test_a_note_is_not_repeated_along_a_chain(tiny_bert_classifier: Path, tmp_path: Path, peftc: Any) -> None:
    moods = ("negative", "neutral", "positive")
    rows = [f"a text of number {at};{moods[at % 3]}" for at in range(24)]
    (tmp_path / "moods.csv").write_text("\n".join(["text;label", *rows]))
    train = ("--data", tmp_path / "moods.csv", "--steps", 1, "--held-out", 0, "-v")
    first = peftc("finetune", tiny_bert_classifier, *train, "-o", tmp_path / "a")
    second = peftc("finetune", tmp_path / "a", *train, "-o", tmp_path / "b")
    assert first.exit_code == second.exit_code == 0, second.stderr
    assert "are separated by `;`" in first.stderr and "are separated by `;`" not in second.stderr
    assert "1 steps" in first.stderr and "1 steps" in second.stderr
    third = peftc("finetune", tiny_bert_classifier, *train, "-o", tmp_path / "c")
    assert "are separated by `;`" in third.stderr, "nothing before it has said so"


# a sign of life


def on_a_terminal(words: list[str], folder: Path) -> tuple[str, str]:
    """Run a command with stderr on a terminal of 80 columns; return stdout and what the terminal was sent."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: each for name, each in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "peftc", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = io.BytesIO()
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux says so of a terminal that the other side has closed
            break
        if not part:
            break
        seen.write(part)
    out = process.communicate()[0]
    os.close(ours)
    assert process.returncode == 0, seen.getvalue().decode()
    return out.decode(), seen.getvalue().decode()


def test_a_terminal_sees_a_spinner_before_libraries_are_imported(tiny_vit: Path, tmp_path: Path) -> None:
    out, seen = on_a_terminal(["decompose", str(tiny_vit), "--rank", "4", "-o", "small"], tmp_path)
    assert out == "small\n"
    starting, loading, result = (seen.find(text) for text in ("starting", "loading", "factored"))
    assert 0 <= starting < loading < result
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1, "the cursor comes back"
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.rpartition("\x1b[?25h")[2])
    assert "starting" not in last and "peftc decompose" not in last, "nothing of it is left"


def test_a_pipe_sees_none(tiny_vit: Path, tmp_path: Path, peftc: Any) -> None:
    done = peftc("decompose", tiny_vit, "--rank", 4, "-o", tmp_path / "small")
    assert not re.search("starting|loading|\x1b", done.stderr)
