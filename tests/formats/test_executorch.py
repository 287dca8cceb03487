"""export --format executorch: run by ExecuTorch itself, where it is installed."""

import sys
from pathlib import Path
from typing import Any

import pytest

import peftc
from peftc.errors import ExportError, UsageError

QUICK: dict[str, Any] = {"format": "executorch", "rounds": 5, "batch_size": 2}
pytestmark = pytest.mark.filterwarnings("ignore")  # of ExecuTorch and what it imports


@pytest.mark.parametrize("kind", ["image", "text with shared factors"])
def test_a_factored_model_runs_in_executorch(
    kind: str, tiny_vit: Path, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    pytest.importorskip("executorch.exir", reason="the package executorch is not installed", exc_type=ImportError)
    base, is_text = (tiny_vit, False) if kind == "image" else (tiny_bert_classifier, True)
    peftc.decompose(base, ratio=0.5, joint=is_text, output_dir=tmp_path / "small")
    report = peftc.export(tmp_path / "small", output_dir=tmp_path / "out", **QUICK)
    assert report.data["deviation"] < 1e-5 and report.data["factors"] > 0
    assert (tmp_path / "out" / "model.pte").is_file()


def test_without_the_package_it_says_what_to_install(
    tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ExportError, match="needs the package `executorch`") as caught:
        peftc.export(tiny_vit, output_dir=tmp_path / "out", **QUICK)
    assert caught.value.hint == "pip install 'peftc[executorch]'"
    with pytest.raises(UsageError, match="`--set largest_batch=1` is too small"):
        peftc.export(tiny_vit, output_dir=tmp_path / "out", settings={"largest_batch": 1}, **QUICK)
    assert not (tmp_path / "out").exists()
