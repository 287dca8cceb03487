"""Run the suite with old, middling and new libraries: `make matrix`.

Each row gets a virtual environment of its own (about 7 GB), made by `make test` with another `PYTHON` and `VENV`, and
removed again. What was seen is written to peftc/docs/source/versions.json, and from there to the page of versions.

    make matrix ROWS=lowest   one row, or several with a space between
    make matrix KEEP=1        leave the environments in .matrix, to look at them
    PYTHONS="/a/python3.10 /b/python3.12" make matrix   interpreters that are found nowhere else
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENTS = Path(".matrix")
SEEN = Path("peftc/docs/source/versions.json")
PROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
PYTHON = {"lowest": "3.10", "between": "3.12", "newest": "3.13"}
# about half-way between the lower bounds and what was the newest when this was written
BETWEEN = {
    "accelerate": "1.13.0", "datasets": "4.8.0", "huggingface_hub": "1.26.1", "jsonschema": "4.25.0",
    "matplotlib": "3.10.8", "numpy": "2.3.5", "onnx": "1.20.1", "onnxruntime": "1.26.0", "onnxscript": "0.7.1",
    "peft": "0.19.1", "pillow": "12.0.0", "psutil": "7.0.0", "pytest": "8.4.2", "pytest-xdist": "3.7.0",
    "regex": "2025.10.22", "rich": "14.2.0", "safetensors": "0.7.0", "scikit-learn": "1.7.2", "timm": "1.0.28",
    "torch": "2.11.0", "torchvision": "0.26.0", "transformers": "5.12.1", "typer": "0.28.0",
}  # fmt: skip


def bounds() -> dict[str, str]:
    """Return the lower bound of every dependency, those of development included."""
    lists = re.findall(r"^(?:dependencies|dev) = \[(.*?)\]$", PROJECT, re.M | re.S)
    return dict(re.findall(r'"([\w-]+)>=([\w.]+)', "".join(lists)))


def pins(row: str) -> dict[str, str]:
    """Return what a row installs in a certain version."""
    return {"lowest": bounds(), "between": BETWEEN, "newest": {}}[row]


def plain(name: str) -> str:
    """Return the one spelling of a package's name that pip compares by."""
    return re.sub(r"[-_.]+", "-", name).lower()


def interpreter(version: str) -> str | None:
    """Return the first interpreter of a version that runs and can make environments; None where there is none."""
    for path in candidates(version):
        words = [path, "-c", "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"]
        try:
            told = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        if told.strip() == version:
            return path
    return None


def candidates(version: str) -> Iterator[str]:
    """Return where an interpreter may be: on the path, with pyenv, with uv, where the user says."""
    home, known = Path.home(), os.environ
    yield f"python{version}"
    folders = {
        Path(known.get("PYENV_ROOT") or home / ".pyenv") / "versions": f"{version}.*",
        Path(known.get("UV_PYTHON_INSTALL_DIR") or home / ".local/share/uv/python"): f"cpython-{version}.*",
    }
    for folder, pattern in folders.items():
        yield from (str(found / "bin" / "python3") for found in sorted(folder.glob(pattern), reverse=True))
    yield from known.get("PYTHONS", "").split()


def run(row: str, python: str) -> dict[str, Any]:
    """Make the environment of a row, run the suite in it, and return what was seen."""
    venv, pinned, told = (ENVIRONMENTS / f"{row}{ending}" for ending in ("", ".txt", ".xml"))
    shutil.rmtree(venv, ignore_errors=True)
    told.unlink(missing_ok=True)
    ENVIRONMENTS.mkdir(exist_ok=True)
    pinned.write_text("".join(f"{name}=={version}\n" for name, version in pins(row).items()), encoding="utf-8")
    (default,) = re.findall(r"-m '(.*?)'", PROJECT)
    words = ["-m", f"{default} and not real", f"--junitxml={told}"]
    words += ["-W", "error"] if row == "newest" else []  # for what somebody else deprecated, too
    # in place of constraints that a machine may have for every pip, which would make the newest older than it is
    own = {**os.environ, "PIP_CONSTRAINT": str(pinned)}
    subprocess.run(["make", "test", f"PYTHON={python}", f"VENV={venv}", f"ARGS={shlex.join(words)}"], env=own)
    if not told.exists():
        sys.exit(f"error: the tests of the row `{row}` did not run")
    return seen(venv, told)


def seen(venv: Path, told: Path) -> dict[str, Any]:
    """Return the versions in an environment, and what became of the tests there."""
    suite = next(ElementTree.parse(told).getroot().iter("testsuite")).attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    (site,) = venv.glob("lib/python*/site-packages")
    there = {plain(each.name): each.version for each in distributions(path=[str(site)])}
    (own_version,) = re.findall(r"^version = (.*)", (venv / "pyvenv.cfg").read_text(encoding="utf-8"), re.M)
    return {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "passed": int(suite["tests"]) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "versions": {"python": own_version, **{name: there[plain(name)] for name in bounds() if plain(name) in there}},
    }


def write(row: str, told: dict[str, Any]) -> None:
    """Write down what was seen of a row, beside what was seen of the others."""
    rows = {**json.loads(SEEN.read_text(encoding="utf-8")), row: told}
    SEEN.write_text(json.dumps({row: rows[row] for row in PYTHON if row in rows}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the rows that are asked for, one after the other; exit with 1 where a test failed."""
    rows = sys.argv[1:] or list(PYTHON)
    if unknown := set(rows) - PYTHON.keys():
        sys.exit(f"error: no row is called {', '.join(sorted(unknown))}\n  hint: the rows are {', '.join(PYTHON)}")
    found = {row: interpreter(PYTHON[row]) for row in rows}
    if missing := [PYTHON[row] for row in rows if found[row] is None]:
        sys.exit(
            f"error: Python {' and '.join(missing)} cannot be run here\n"
            "  cause: it is not on the path, nor with pyenv or uv\n"
            '  hint: install it, or say where it is: `PYTHONS="/a/python3.10 /b/python3.13" make matrix`'
        )
    os.chdir(REPOSITORY)
    failed = 0
    for row, python in found.items():
        print(f"== {row}: {python}", flush=True)
        try:
            told = run(row, str(python))
            write(row, told)
            subprocess.run([ENVIRONMENTS / row / "bin" / "python", "-m", "peftc.docs.source.pages"], check=True)
        finally:
            if not os.environ.get("KEEP"):
                shutil.rmtree(ENVIRONMENTS / row, ignore_errors=True)
        failed += told["failed"]
        print(f"== {row}: {told['passed']} passed, {told['failed']} failed", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
