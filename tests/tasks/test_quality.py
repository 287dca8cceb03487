"""A measurement that nobody asked for is of some samples, and says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftc
from peftc.errors import UsageError
from peftc.tasks import quality
from tests.networks import WORDS

QUICK: dict[str, Any] = {"ratio": 0.5, "method": "whitened", "calibration_samples": 32}
SAID = "quality: measured on 12 samples, as no number was asked for; `--num-samples N` takes more, `peftc evaluate` all"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "SAMPLES", 12)
    monkeypatch.setattr(quality, "WINDOWS", 3)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    random, arrays = np.random.default_rng(0), {}
    for split, number in (("train", 40), ("test", 30)):
        arrays[f"x_{split}"] = random.normal(size=(number, 3, 32, 32)).astype(np.float32)
        arrays[f"y_{split}"] = np.arange(number) % 10
    np.savez(tmp_path / "pictures.npz", **arrays)
    return str(tmp_path / "pictures.npz")


def test_without_a_question_it_is_of_some_samples(tiny_vit: Path, pictures: str, tmp_path: Path) -> None:
    report = peftc.decompose(tiny_vit, output_dir=tmp_path / "out", data=pictures, **QUICK)
    assert report.data["quality"]["data"]["samples"] == 12
    assert SAID in report.notes


@pytest.mark.parametrize("asked", [{"num_samples": 20}, {"max_drop": 1.0}])
def test_a_number_or_a_gate_is_a_question(asked: dict[str, Any], tiny_vit: Path, pictures: str, tmp_path: Path) -> None:
    report = peftc.decompose(tiny_vit, output_dir=tmp_path / "out", data=pictures, **QUICK, **asked)
    assert report.data["quality"]["data"]["samples"] == asked.get("num_samples", 30)
    assert not any(note.startswith("quality: measured on") for note in report.notes)


@pytest.mark.parametrize("step", ["decompose", "distill", "finetune", "prune_layers", "export"])
def test_a_gate_that_could_not_fail_is_refused_before_the_work(
    step: str, tiny_vit: Path, pictures: str, tmp_path: Path
) -> None:
    own: dict[str, dict[str, Any]] = {
        "decompose": QUICK,
        "distill": {"teacher": tiny_vit},
        "export": {"format": "timm"},
    }
    with pytest.raises(UsageError, match="`--max-drop 50` could not fail"):
        getattr(peftc, step)(tiny_vit, output_dir=tmp_path / "out", data=pictures, max_drop=50, **own.get(step, {}))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_of_text_it_is_of_windows(tiny_llama: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        text = "\n".join(" ".join(WORDS[(at * 5 + 7 * k) % len(WORDS)] for k in range(12)) for at in range(60))
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{split}.txt").write_text(text)
    asked = {**QUICK, "data": str(tmp_path / "text"), "max_length": 16}
    report = peftc.decompose(tiny_llama, output_dir=tmp_path / "out", **asked)
    assert report.data["quality"]["data"]["samples"] == 3
    assert any(note.startswith("quality: measured on 3 samples") for note in report.notes)
