"""Models of a large vocabulary: every step gives with logits in parts what it gives with whole ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftc
from peftc.models import inputs, unread
from peftc.models.load import load
from peftc.models.place import runnable
from peftc.nn import vocabulary
from peftc.nn.vocabulary import Unread
from peftc.store import manifest
from tests.networks import LLAMA, WORDS, save_transformers

HELD = {"device": "cpu", "max_length": 16}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("story")
    for split, step in (("train", 7), ("test", 11)):
        lines = [" ".join(WORDS[(start + step * at) % len(WORDS)] for at in range(12)) for start in range(40)]
        (folder / f"{split}.txt").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Take every vocabulary for a large one from now on."""

    def now() -> None:
        monkeypatch.setattr(unread, "LARGE", 2)
        monkeypatch.setattr(vocabulary, "WORDS", 8)
        monkeypatch.setattr(vocabulary, "BLOCK", 128)

    return now


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert_mlm"])
def test_what_the_head_reads_times_the_head_are_the_logits(
    name: str, in_parts: Callable[[], None], request: pytest.FixtureRequest
) -> None:
    model = runnable(load(request.getfixturevalue(name)), device="cpu")
    batch = inputs.probe(model, batch=2)
    assert unread.head_of(model) is None
    in_parts()
    head = unread.head_of(model)
    found = unread.outputs(model, batch, head)
    assert isinstance(found, Unread)
    whole = inputs.outputs(model, batch)
    assert found.shape == whole.shape
    with torch.no_grad():
        torch.testing.assert_close(found.whole(), whole)


def test_a_model_that_changes_its_logits_is_taken_whole(tmp_path: Path, in_parts: Callable[[], None]) -> None:
    capped = {**LLAMA, "head_dim": 16, "final_logit_softcapping": 0.01}
    model = runnable(load(save_transformers(tmp_path / "gemma", "Gemma2ForCausalLM", **capped)), device="cpu")
    in_parts()
    assert unread.head_of(model) is None


def test_what_is_put_around_a_head_is_heeded(tiny_llama: Path, in_parts: Callable[[], None]) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    in_parts()
    assert unread.head_of(model) is not None
    network: Any = model.module
    network.lm_head = nn.Sequential(network.lm_head, nn.Tanh())
    assert unread.head_of(model) is None


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert_mlm"])
def test_figures_are_the_same(
    name: str, story: str, in_parts: Callable[[], None], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    peftc.decompose(folder, ratio=0.5, output_dir=tmp_path / "small")
    whole = peftc.evaluate(tmp_path / "small", data=story, against=folder, **HELD).data
    in_parts()
    parts = peftc.evaluate(tmp_path / "small", data=story, against=folder, **HELD).data
    assert parts["metrics"]["nll"]["value"] == pytest.approx(whole["metrics"]["nll"]["value"], rel=1e-5)
    assert parts["against"]["divergence"]["value"] == pytest.approx(
        whole["against"]["divergence"]["value"], rel=1e-3, abs=1e-7
    )
    assert parts["against"]["agreement"] == whole["against"]["agreement"]


def test_statistics_without_gradients_never_run_the_head(
    tiny_llama: Path, story: str, in_parts: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"data": story, "ratio": 0.5, "method": "whitened", "calibration_samples": 8, **HELD}
    peftc.decompose(tiny_llama, output_dir=tmp_path / "whole", num_samples=2, **asked)
    in_parts()
    multiplied: list[int] = []
    monkeypatch.setattr(Unread, "tiles", lambda _: multiplied.append(1) or iter(()))
    peftc.calibrate(tiny_llama, output_dir=tmp_path / "statistics", data=story, method="whitened", **HELD)
    assert not multiplied
    monkeypatch.undo()
    peftc.decompose(tiny_llama, output_dir=tmp_path / "parts", num_samples=2, **asked)
    one, other = (peftc.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_are_collected_from_what_was_drawn(
    tiny_llama: Path, story: str, in_parts: Callable[[], None], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"data": story, "calibration_samples": 64, **HELD}
    found = []
    for name in ("whole", "parts"):
        peftc.calibrate(tiny_llama, output_dir=tmp_path / name, **asked)
        found.append(
            peftc.decompose(tiny_llama, ratio=0.5, statistics=tmp_path / name, output_dir=tmp_path / f"{name}-small")
        )
        in_parts()
    one, other = (each.data["predicted"]["value"] for each in found)
    assert one == pytest.approx(other, rel=0.2)  # draws differ; what they are drawn from does not


def test_a_head_that_is_to_be_factored_runs(
    tiny_llama: Path, story: str, in_parts: Callable[[], None], tmp_path: Path
) -> None:
    in_parts()
    made = peftc.decompose(
        tiny_llama,
        ratio=0.5,
        include=["lm_head"],
        data=story,
        calibration_samples=16,
        output_dir=tmp_path / "out",
        **HELD,
    )
    names = [row["name"] for row in made.data["modules"]]
    assert any("embed_tokens" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize("cache", [False, True])
def test_a_student_learns_the_same(
    cache: bool, tiny_llama: Path, story: str, in_parts: Callable[[], None], tmp_path: Path
) -> None:
    peftc.decompose(tiny_llama, ratio=0.5, output_dir=tmp_path / "small")
    asked: dict[str, Any] = {
        "teacher": tiny_llama, "data": story, "steps": 4, "batch_size": 4, "loss": "logits=1,features=1,task=1",
        "cache_teacher": cache, "learning_rate": 1e-3, **HELD,
    }  # fmt: skip
    peftc.distill(tmp_path / "small", output_dir=tmp_path / "whole", **asked)
    in_parts()
    peftc.distill(tmp_path / "small", output_dir=tmp_path / "parts", **asked)
    one, other = (peftc.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)


def test_layers_are_pruned_by_the_same_losses(
    tiny_llama: Path, story: str, in_parts: Callable[[], None], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"data": story, "score": "drop", "keep": 1, **HELD}
    peftc.prune_layers(tiny_llama, output_dir=tmp_path / "whole", **asked)
    in_parts()
    peftc.prune_layers(tiny_llama, output_dir=tmp_path / "parts", **asked)
    one, other = (manifest.read(tmp_path / name).kept_layers for name in ("whole", "parts"))
    assert one == other


def test_nan_in_the_head_is_told(tiny_llama: Path, story: str, in_parts: Callable[[], None]) -> None:
    model = load(tiny_llama)
    network: Any = model.module
    network.lm_head.weight = nn.Parameter(torch.full_like(network.lm_head.weight, torch.nan))
    in_parts()
    with pytest.raises(peftc.PeftcError, match="NaN"):
        peftc.evaluate(model, data=story, **HELD)


def test_a_dry_run_of_a_large_vocabulary_counts_no_whole_logits(
    in_parts: Callable[[], None], story: str, tiny_llama: Path
) -> None:
    asked: dict[str, Any] = {"ratio": "0.5", "data": story, "calibration_samples": 32, "sensitivity": 0, **HELD}

    def estimated() -> int:
        found = peftc.decompose(tiny_llama, dry_run=True, **asked).data["estimate"]
        return int(found["peak_memory_bytes"])

    whole = estimated()
    in_parts()
    assert estimated() < whole
