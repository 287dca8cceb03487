"""Classifiers that read the last token: a batch gives what its texts give one at a time, whatever pads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc.data.tokens import tokenise
from peftc.errors import DataError
from peftc.models import inputs, padding
from peftc.models.heads import with_head
from peftc.models.load import load
from peftc.steps.evaluate import evaluate
from peftc.steps.export import export
from peftc.steps.finetune import finetune
from tests.networks import save_transformers

TEXTS = ["a dog", "the cat sat on the mat", "a", "a good film", "the dog ran to the cat", "mat"]
SIZES = {
    "GPT2ForSequenceClassification": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "LlamaForSequenceClassification": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
}  # fmt: skip
IDS = {"none": None, "no token": -1, "a token": 5}


@pytest.fixture(scope="module", params=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"num_labels": 3, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    return save_transformers(tmp_path_factory.mktemp("decoder"), request.param, **SIZES[request.param], **more)


def changed(folder: Path, target: Path, **config: Any) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    there = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**there, **config}))
    return target


def alone(folder: Path, ids: list[int]) -> torch.Tensor:
    """What transformers gives for one text, which nothing pads."""
    import transformers

    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    with torch.inference_mode():
        return cls.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("named", IDS.values(), ids=IDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_its_texts_give_alone(folder: Path, tmp_path: Path, side: str, named: int | None) -> None:
    there = changed(folder, tmp_path / "model", pad_token_id=named)
    told = json.loads((there / "tokenizer_config.json").read_text())
    (there / "tokenizer_config.json").write_text(json.dumps({**told, "padding_side": side}))
    model = load(there)
    tokens = tokenise(model, TEXTS, None)
    together = inputs.outputs(model, tokens.pad(range(len(TEXTS))))
    for row in range(len(TEXTS)):
        batch = tokens.pad([row])
        assert torch.allclose(together[row], inputs.outputs(model, batch)[0], atol=1e-6)
        if named == -1:  # transformers refuses a single text, or reads what nothing pads
            continue
        assert torch.allclose(together[row], alone(there, batch["input_ids"][0].tolist()), atol=1e-5)
    assert model.module.config.pad_token_id == named


def test_a_text_that_ends_in_what_usually_pads_keeps_its_last_token(folder: Path) -> None:
    model = load(folder)
    rows = [[4, 5, 1], [6, 1, 1], [0, 7, 8], [2], [3]]  # 1 ends a text, and pads where nothing else is named
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    together = inputs.outputs(model, {"input_ids": ids, "attention_mask": mask})
    for row, logits in zip(rows, together, strict=True):
        assert torch.allclose(logits, alone(folder, row), atol=1e-5)


def test_a_batch_that_leaves_no_token_to_pad_with_is_refused(folder: Path) -> None:
    model = load(folder)
    tokens = model.module.config.vocab_size
    ids = torch.tensor([[0, token] for token in range(tokens)])
    mask = torch.ones_like(ids)
    inputs.outputs(model, {"input_ids": ids, "attention_mask": mask})  # nothing is padded
    ids, mask = torch.cat([ids, ids[:1]]), torch.cat([mask, torch.tensor([[1, 0]])])
    with pytest.raises(DataError, match=rf"batch of {tokens + 1} texts[\s\S]*`--batch-size`"):
        inputs.outputs(model, {"input_ids": ids, "attention_mask": mask})


def test_only_classifiers_that_look_for_it_are_told(tiny_bert_classifier: Path, tiny_llama: Path, folder: Path) -> None:
    asks = [padding.reads_last_token(load(each).module) for each in (tiny_bert_classifier, tiny_llama, folder)]
    assert asks == [False, False, True]


def table(path: Path) -> str:
    lines = [f"{text},{number % 3}" for number, text in enumerate(TEXTS * 2)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return str(path)


def test_evaluate_and_finetune_take_a_decoder_without_a_pad_token_and_leave_its_config(
    folder: Path, tmp_path: Path
) -> None:
    data = table(tmp_path / "a.csv")
    one, many = (evaluate(load(folder), data=data, batch_size=size).data["metrics"] for size in (1, 5))
    assert one == many
    finetune(folder, data=data, steps=1, held_out=0, output_dir=tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] is None


def test_a_new_head_names_what_pads_and_says_so(tiny_llama: Path) -> None:
    bare = load(tiny_llama)
    bare.config["pad_token_id"] = None
    bare.module.config.pad_token_id = None
    headed = with_head(bare, ["bad", "good"]).model
    assert headed.config["pad_token_id"] == headed.module.config.pad_token_id == padding.id_to_write(bare)
    assert any("as padding" in note for note in headed.notes)


@pytest.mark.parametrize("format", ["torch-export", pytest.param("hf", marks=pytest.mark.slow)])
@pytest.mark.parametrize("folder", ["GPT2ForSequenceClassification"], indirect=True)
def test_an_export_computes_the_same_in_batches(folder: Path, tmp_path: Path, format: str) -> None:
    report = export(folder, format=format, data=table(tmp_path / "a.csv"), rounds=5, output_dir=tmp_path / "out")
    assert report.data["deviation"] < 1e-4
    about = json.loads((tmp_path / "out/export.json").read_text())["about"]
    assert any(f"token {about['pad_token_id']}" in note for note in report.notes)
