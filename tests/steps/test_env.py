"""What peftc runs on, without a secret in it."""

import json
import platform
from pathlib import Path

import pytest
import torch

import peftc as package


def test_it_says_what_a_report_of_a_bug_needs(peftc) -> None:
    found = json.loads(peftc("env", "--json").stdout)
    assert (found["peftc"], found["python"]) == (package.__version__, platform.python_version())
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["cpu"]["cores"] >= 1
    text = peftc("env").stdout
    for word in ("peftc", "python", "torch", "transformers", "cpu", "threads", "cache of hub"):
        assert [line for line in text.splitlines() if line.startswith(f"{word}  ")], word


def test_it_shows_neither_users_nor_tokens(peftc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "someone"
    for name, value in {
        "HOME": home, "USER": "someone", "XDG_CACHE_HOME": home / "cache", "HF_TOKEN": "hf_secret",
        "OMP_NUM_THREADS": "3", "HF_DATASETS_CACHE": home / "sets", "AWS_SECRET": "hf_secret", "HTTPS_PROXY": "http://a:hf_secret@b",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    for text in (peftc("env").stdout, peftc("env", "--json").stdout):
        assert "someone" not in text and "hf_secret" not in text
        assert "~/cache/peftc" in text and "~/sets" in text
    assert json.loads(peftc("env", "--json").stdout)["variables"]["OMP_NUM_THREADS"] == "3"


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    needs = ["torch>=2", "nothing_of_this_name>=1; extra == 'onnx'", "tomli; python_version < '3'", "x; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    found = package.env()
    assert next(iter(found.data["versions"])) == "torch"
    assert found.data["extras"] == {"onnx": {"nothing_of_this_name": None}}
    assert [line for line in found.lines if line.startswith("extra onnx") and "not installed: nothing_of" in line]


def test_sources_without_metadata_are_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert "torch" in package.env().data["versions"]
