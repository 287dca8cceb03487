"""Type checkers of users see the public names, and tell a wrong call from a right one."""

import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from pathlib import Path

import torch

import peftc

report: peftc.Report = peftc.decompose("model", ratio=0.5, data=["a text", "another"])
names: peftc.Report = peftc.methods("finetune")
page: peftc.Report = peftc.report(["small"], output=Path("page.html"))
chain: peftc.Report = peftc.run(dry_run=True)
measured = peftc.evaluate("small", data=(torch.zeros(2, 3), torch.zeros(2)))
network: torch.nn.Module = peftc.load("small")
parameters: int | None = report.parameters
refusal: type[Exception] = peftc.PeftcError
"""
WRONG = """
import peftc

peftc.decompose("model", ratoi=0.5)
peftc.load("small", merge="no")
peftc.methods(finetune=True)
text: str = peftc.report(["small"])
"""
CONFIG = Path(__file__).parents[1] / "pyproject.toml"  # it leaves out what other libraries declare: minutes of reading


def checked(script: str, folder: Path) -> list[str]:
    pytest.importorskip("mypy")
    (folder / "script.py").write_text(script)
    words = ["--config-file", str(CONFIG), "--cache-dir", str(folder / "cache"), "--follow-imports", "silent"]
    line = [sys.executable, "-m", "mypy", *words, "script.py"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "error:" in line]


def test_a_type_checker_sees_the_public_names(tmp_path: Path) -> None:
    assert checked(RIGHT, tmp_path) == []
    lines = {int(error.split(":")[1]) for error in checked(WRONG, tmp_path)}
    assert lines == {4, 5, 6, 7}, "each line of the script is wrong"
