"""Environments that hold a few packages more than this one, for libraries that nothing here depends on."""

import atexit
import functools
import shutil
import subprocess
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@functools.cache
def python_with(*packages: str) -> Path:
    """Return the interpreter of an environment on top of this one; the test is skipped where pip finds them not."""
    place = Path(tempfile.mkdtemp(prefix="peftc-environment-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    venv.create(place, with_pip=True, symlinks=True)
    python = place / "bin/python"
    (site,) = place.glob("lib/python*/site-packages")
    here = dict.fromkeys((str(REPOSITORY), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "beneath.pth").write_text("\n".join(here) + "\n")
    line = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *packages]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip does not install {', '.join(packages)}: {(done.stderr.splitlines() or ['?'])[-1]}")
    return python


def run(python: Path, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an interpreter to its end, which has to be a good one."""
    done = subprocess.run([python, "-W", "ignore", *map(str, words)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
