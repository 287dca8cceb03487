"""The matrix pins what pyproject.toml says, and finds interpreters that run."""

import re
import sys
from pathlib import Path

import pytest

from tests import matrix  # type: ignore[import-not-found]

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_every_dependency_has_a_lower_bound_that_is_pinned() -> None:
    lists = re.findall(r"^(?:dependencies|onnx|report|dev) = \[(.*?)\]$", matrix.PROJECT, re.M | re.S)
    names = set(re.findall(r'"([\w-]+)[^"]*"', "".join(lists)))
    assert names == matrix.bounds().keys() == matrix.pins("lowest").keys()
    assert matrix.pins("between").keys() <= names and not matrix.pins("newest")


def test_between_is_between() -> None:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    lowest, between = matrix.pins("lowest"), matrix.pins("between")
    assert all(numbers(version) >= numbers(lowest[name]) for name, version in between.items())


def test_an_interpreter_that_is_there_and_does_not_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / f"python{HERE}"
    stub.write_text("#!/bin/sh\nexit 127\n")
    stub.chmod(0o755)
    monkeypatch.setattr(matrix, "candidates", lambda version: iter([str(stub), sys.executable]))
    assert matrix.interpreter(HERE) == sys.executable
    assert matrix.interpreter("2.1") is None


def test_interpreters_are_looked_for_on_the_path_then_with_pyenv_and_uv_then_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [tmp_path / "pyenv/versions/3.12.1/bin/python3", tmp_path / "uv/cpython-3.12.4-linux/bin/python3"]
    for path in (*made, tmp_path / "pyenv/versions/3.11.7/bin/python3"):
        path.parent.mkdir(parents=True)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("PYTHONS", "/a/python /b/python")
    assert list(matrix.candidates("3.12")) == ["python3.12", *map(str, made), "/a/python", "/b/python"]
