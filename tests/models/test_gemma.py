"""Gemma 3 270M, as peftc reads it out of its file, is a language model that knows English."""

import zipfile
from pathlib import Path

import pytest
import torch

import peftc as package
from peftc.models.load import load
from peftc.models.tokenizer import tokenizer_of

pytestmark = pytest.mark.real


def test_gemma_writes_english(gemma_folder: Path) -> None:
    model = load(gemma_folder)
    tokenizer = tokenizer_of(model)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    begun = tokens.shape[1]
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model.module(tokens).logits[:, -1:].argmax(-1)], 1)
    words = tokenizer.decode(tokens[0, begun:]).split()
    assert len(words) > 3 and any(word.strip(",.") in ("Paris", "the", "a", "is", "of", "in") for word in words), words


def test_gemma_has_the_perplexity_that_it_has(gemma_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """On the word-level text, in windows of 512: a few points more than the 41 of all windows of 1,024."""
    with zipfile.ZipFile(data_folder / "sets" / "wikitext2" / "wikitext2_word_level.zip") as packed:
        packed.extract("test.txt", tmp_path)
    report = package.evaluate(
        gemma_folder, data=tmp_path / "test.txt", protocol="gptq", max_length=512, num_samples=3, device="cpu"
    )
    assert 25 < report.data["metrics"]["perplexity"]["value"] < 70
    assert report.data["data"]["windows"]["unknown"]
