"""Texts that share a window learn as if each had its own, and none of their tokens is lost."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.data import open_data
from peftc.data.tokens import IGNORED
from peftc.errors import UsageError
from peftc.models import inputs, unread
from peftc.models.load import load
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.models.tokenizer import tokenizer_of
from peftc.options import Reading
from peftc.tasks import objectives, packing
from peftc.tasks.task import Batch, Encoded
from peftc.training import journal
from tests.networks import GPT2, LLAMA, WORDS, save_transformers
from tests.training.test_streaming import save

GEMMA: dict[str, Any] = {
    **LLAMA,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
    "initializer_range": 0.2,
}
LENGTHS = [3, 30, 1, 12, 7, 7, 19, 70, 2, 25, 40, 5, 64, 11]


def texts_of(folder: Path) -> tuple[str, list[str]]:
    draw = torch.Generator().manual_seed(0)
    texts = [
        " ".join(WORDS[at] for at in torch.randint(len(WORDS), (length,), generator=draw).tolist())
        for length in LENGTHS
    ]
    file = folder / "texts.csv"
    file.write_text("text\n" + "\n".join(f'"{text}"' for text in texts))
    return str(file), texts


def read(model: Model, data: str, **how: Any) -> Encoded:
    return packing.encode_packed(model, open_data(data, task="causal-lm"), Reading(packed=True, **how))


def alone(model: Model, batch: Batch, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the texts of a window as batches of one, without what packing adds, and what each token is to foretell."""
    assert isinstance(batch.inputs, dict)
    places = batch.inputs[inputs.APART][row]
    kept = int(batch.inputs["attention_mask"][row].sum())
    begins = [at for at in range(kept) if places[at] == 0] + [kept]
    ids = batch.inputs["input_ids"][row]
    return [(ids[None, one:two], ids[None, one + 1 : two]) for one, two in pairwise(begins)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("network", "config"),
    [
        ("LlamaForCausalLM", {**LLAMA, "initializer_range": 0.2}),
        ("Gemma3ForCausalLM", GEMMA),
        ("GPT2LMHeadModel", {**GPT2, "initializer_range": 0.2}),
    ],
)
def test_a_window_costs_what_its_texts_cost_alone(network: str, config: Any, attention: str, tmp_path: Path) -> None:
    """The sliding windows of the Gemma are shorter than some texts, and than all texts of a window together."""
    model = runnable(load(save_transformers(tmp_path / "model", network, **config)), device="cpu")
    model.module.set_attn_implementation(attention)
    packing.refuse_unpackable(model)
    encoded = read(model, texts_of(tmp_path)[0], max_length=48)
    batch = encoded.batch(range(encoded.size))
    with torch.no_grad():
        together = objectives.tokens(unread.forward(model, batch.inputs, None), batch)
        each = []
        for row in range(encoded.size):
            of_tokens = []
            for ids, targets in alone(model, batch, row):
                logits = model.module(input_ids=ids).logits[0, :-1]
                of_tokens.append(torch.nn.functional.cross_entropy(logits, targets[0], reduction="none"))
            each.append(torch.cat(of_tokens).mean())
    assert max(len(alone(model, batch, row)) for row in range(encoded.size)) > 2
    assert float(together) == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)


def test_every_token_is_there_once_and_foretold_once(tiny_llama: Path, tmp_path: Path) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    data, texts = texts_of(tmp_path)
    encoded = read(model, data, max_length=32)
    batch, tokenizer = encoded.batch(range(encoded.size)), tokenizer_of(model)
    assert isinstance(batch.inputs, dict)
    made = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    start = packing.around(model, tokenizer)[0]
    pieces = sum(-(-len(ids) // (32 - len(start))) for ids in made)
    expected = Counter(token for ids in made for token in ids) + Counter(start * pieces)
    kept = batch.inputs["attention_mask"].bool()
    assert Counter(batch.inputs["input_ids"][kept].tolist()) == expected
    assert int((batch.targets != IGNORED).sum()) == int(kept.sum()) - pieces  # the first of each is given
    assert len(encoded.notes) == 1 and f"{len(texts)} texts in {encoded.size} windows" in encoded.notes[0]


def test_windows_are_as_few_as_they_can_be() -> None:
    assert packing.packed([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert packing.packed([10, 1, 9, 3, 7], 10) == [[0], [2, 1], [4, 3]]
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 65, (500,), generator=draw).tolist()
    found = packing.packed(sizes, 64)
    assert sorted(at for some in found for at in some) == list(range(500))
    assert all(sum(sizes[at] for at in some) <= 64 for some in found)
    assert len(found) <= 1.03 * sum(sizes) / 64 + 1


def test_lines_of_a_file_are_its_texts(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("the cat sat\n\nthe dog ran on the red mat\nit was small\n")
    encoded = read(runnable(load(tiny_llama), device="cpu"), str(tmp_path / "story.txt"), max_length=64)
    assert encoded.size == 1 and "3 texts in 1 windows" in encoded.notes[0]


def test_a_network_that_mixes_texts_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    packing.refuse_unpackable(model)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
        with pytest.raises(UsageError, match=r"`--packing` does not go with[\s\S]*depends on the one before"):
            packing.refuse_unpackable(model)
    bloom = {"hidden_size": 32, "n_layer": 1, "n_head": 2}
    other = runnable(load(save_transformers(tmp_path / "bloom", "BloomForCausalLM", **bloom)), device="cpu")
    with pytest.raises(UsageError, match="takes no positions of tokens"):
        packing.refuse_unpackable(other)


# trainings

FEW: dict[str, Any] = {"steps": 4, "batch_size": 2, "device": "cpu", "learning_rate": 1e-2, "max_length": 48}


def test_texts_are_learnt_in_windows_and_the_report_says_what_that_saves(tiny_llama: Path, tmp_path: Path) -> None:
    data, _ = texts_of(tmp_path)
    found = []
    for workers in (0, 2):
        output = tmp_path / str(workers)
        report = peftc.finetune(tiny_llama, output_dir=output, data=data, packing=True, workers=workers, **FEW)
        assert any("padded tokens saved" in note for note in report.notes), report.notes
        found.append([(output / name).read_bytes() for name in ("model.safetensors", "peftc.json", journal.LOG)])
    assert found[0] == found[1]


def test_texts_of_a_stream_are_packed_block_by_block(tiny_llama: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "texts", 700)  # of which the first 512 are held out
    report = peftc.finetune(
        tiny_llama, output_dir=tmp_path / "out", data=f"hf:{folder}", streaming=True, packing=True, **FEW
    )
    assert report.data["steps"] == 4
    assert any("512 texts in" in note for note in report.notes) and any("in blocks of" in note for note in report.notes)


@pytest.mark.parametrize("loss", ["features=1,logits=1,task=1", "logits=1"])
def test_student_and_teacher_read_the_same_windows(
    loss: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not logits are whole, kept on disk, or layers computed again."""
    data, _ = texts_of(tmp_path)
    peftc.decompose(tiny_llama, output_dir=tmp_path / "small", ratio=0.6, method="svd", device="cpu")
    losses = []
    for at, more in enumerate(({}, {"cache_teacher": True}, {"gradient_checkpointing": True}, {"large": 8})):
        options: dict[str, Any] = {**FEW, "data": data, "loss": loss, "packing": True, **more}
        with monkeypatch.context() as patch:
            patch.setattr(unread, "LARGE", options.pop("large", unread.LARGE))
            report = peftc.distill(tmp_path / "small", output_dir=tmp_path / str(at), **options)
        losses.append(report.data["losses"])
    assert all(each == pytest.approx(losses[0], rel=1e-4) for each in losses[1:]), losses


def test_what_reads_no_single_texts_is_refused(
    tiny_bert_mlm: Path, images: str, tiny_vit: Path, tmp_path: Path
) -> None:
    data, _ = texts_of(tmp_path)
    for model, samples in ((tiny_bert_mlm, data), (tiny_vit, images)):
        with pytest.raises(UsageError, match="`--packing` joins texts for causal language models"):
            peftc.finetune(model, data=samples, packing=True, output_dir=tmp_path / "out", **FEW)
