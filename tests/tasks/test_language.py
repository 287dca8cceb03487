"""Windows of text, wherever a language model reads some: how they begin, and in which unit losses on them are said."""

import random
from pathlib import Path

import pytest
import torch

import peftc as package
from peftc.calibration.prepared import Request, prepare
from peftc.data.tokens import start_of
from peftc.models.load import load
from peftc.models.tokenizer import tokenizer_of
from peftc.options import Reading
from peftc.training import samples
from tests.networks import GPT2, WORDS, save_transformers


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of 400 lines of words drawn at random."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("story") / "story.txt"
    file.write_text("\n".join(" ".join(draw.choice(WORDS) for _ in range(12)) for _ in range(400)))
    return str(file)


def test_every_window_begins_as_the_tokenizer_begins_texts(tiny_llama: Path, story: str) -> None:
    model = load(tiny_llama)
    start = tokenizer_of(model).bos_token_id
    calibrated = prepare(model, Request(story, samples=8, max_length=16), "cpu").encoded
    learnt = samples.read(model, story, Reading(max_length=16), labels=True, held_out=0.2)
    for encoded in (calibrated, learnt.train, learnt.held):
        tokens = encoded.batch(range(5)).inputs["input_ids"]
        assert tokens.shape == (5, 16)
        assert (tokens[:, 0] == start).all() and not (tokens[:, 1:] == start).any()


def test_a_tokenizer_without_a_start_token_gives_none(tmp_path: Path, story: str) -> None:
    from tokenizers.processors import TemplateProcessing

    model = load(save_transformers(tmp_path, "GPT2LMHeadModel", **GPT2))
    tokenizer = tokenizer_of(model)
    assert start_of(model, tokenizer) == [tokenizer.bos_token_id]
    core = tokenizer.backend_tokenizer
    for single, wanted in (("$A", []), ("$A </s>", []), ("<s> <s> $A </s>", [tokenizer.bos_token_id] * 2)):
        ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        core.post_processor = TemplateProcessing(single=single, pair="$A $B", special_tokens=ids)
        assert start_of(model, tokenizer) == wanted, single
    core.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    core.save(str(tmp_path / "tokenizer.json"))
    assert start_of(load(tmp_path), tokenizer_of(load(tmp_path))) == []
    report = package.evaluate(tmp_path, data=story, max_length=16, num_samples=4, device="cpu")
    assert "data: windows of 16 tokens, the first of each given" in report.notes


def test_predicted_and_measured_losses_are_in_one_unit(tiny_llama: Path, story: str, tmp_path: Path) -> None:
    how = {"data": story, "ratio": 0.6, "max_length": 32}
    report = package.decompose(tiny_llama, output_dir=tmp_path / "small", **how)
    predicted = report.data["predicted"]
    measured = report.data["quality"]["against"]["divergence"]
    assert predicted["unit"] == "nats per token"
    assert predicted["value"] == pytest.approx(measured["value"], rel=0.2)
    assert any(f"{predicted['unit']} of divergence" in note for note in report.notes)
    analyzed = package.analyze(tiny_llama, **how)
    assert analyzed.data["curve"]["unit"] == "nats per token"
    assert analyzed.data["plan"]["predicted"] == pytest.approx(measured["value"], rel=0.5)
    package.calibrate(tiny_llama, data=story, max_length=32, output_dir=tmp_path / "stats")
    summed = package.decompose(tiny_llama, statistics=tmp_path / "stats", ratio=0.6, output_dir=tmp_path / "again")
    assert summed.data["predicted"]["value"] == pytest.approx(predicted["apart"], rel=0.5)
    assert summed.data["predicted"]["unit"] == "nats per token"


def test_losses_of_images_are_per_sample(tiny_vit: Path, tmp_path: Path) -> None:
    how = {"data": "sklearn:digits", "calibration_samples": 32, "ratio": 0.6}
    report = package.decompose(tiny_vit, output_dir=tmp_path / "small", **how)
    assert report.data["predicted"]["unit"] == "nats per sample"
    assert torch.isfinite(torch.tensor(report.data["predicted"]["value"]))
