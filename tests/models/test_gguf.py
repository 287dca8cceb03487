"""A GGUF file is a MODEL: read once, kept as a plain folder, and the recorded base of what is made of it."""

import importlib.util
import json
import os
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc as package
from peftc.errors import ArtifactError, SourceError, UsageError
from peftc.models import from_gguf
from peftc.models.load import load
from peftc.models.tokenizer import tokenizer_of
from peftc.nn import surgery
from peftc.store.source import Source

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
VOCABULARY = ["<unk>", "<s>", "</s>", "▁", *string.ascii_lowercase, "th", "the", "▁the", "."]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def network(*, tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
        max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, **SIZES
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def written(path: Path, model: Any, *, without: str = "none", layers: int = 2) -> Path:
    """Write a network as a file of llama.cpp: its largest matrices in 8 bits, rotary halves in turn."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([-float(at) for at in range(len(VOCABULARY))])
    writer.add_token_types([2, 3, 3, *[1] * (len(VOCABULARY) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    for name, tensor in model.state_dict().items():
        if name != without and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            _add(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, tensor: torch.Tensor) -> None:
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    there = whole.get(name)
    if there is None:
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        there = f"blk.{layer}.{NAMES[part]}"
    values = tensor.numpy()
    if heads := {"attn_q": 4, "attn_k": 2}.get(there.split(".")[-1]):
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    if "ffn" in there and values.ndim == 2:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{there}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(f"{there}.weight", values)


def rounded(model: Any) -> Any:
    """Round what was written in 8 bits as that does."""
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            there = gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)
            parameter.data = torch.from_numpy(there)
    return model


@pytest.fixture
def own_cache(tmp_path: Path) -> Path:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    return tmp_path / "cache" / "peftc" / "gguf"


@pytest.fixture
def file(tmp_path: Path, own_cache: Path) -> Path:
    return written(tmp_path / "tiny.gguf", network())


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_the_file(tmp_path: Path, own_cache: Path, tied: bool) -> None:
    file = written(tmp_path / "tiny.gguf", network(tied=tied))
    model, wanted = load(file), rounded(network(tied=tied))
    found = surgery.tensors_of(model.module)
    assert all(torch.allclose(found[name], tensor) for name, tensor in wanted.named_parameters())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(model.module(tokens).logits, wanted(tokens).logits, atol=1e-4)
    assert (model.name, model.files) == ("tiny", [file])
    told = "`tiny.gguf` was dequantised from GGUF: its weights are those of the quantised file, "
    assert f"{told}and what is made of it is stored in float32" in model.notes


def test_the_tokenizer_comes_along(file: Path) -> None:
    tokenizer = tokenizer_of(load(file))
    ids = tokenizer("the cat .")["input_ids"]
    assert ids[:2] == [1, VOCABULARY.index("▁the")] and tokenizer.decode(ids[1:]) == "the cat ."


def test_the_second_use_reads_the_cache(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(file)
    found = importlib.util.find_spec
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None if name == "gguf" else found(name))
    again = load(file)
    assert again.notes == first.notes and again.folder == first.folder
    assert again.folder is not None and again.folder.parent == own_cache
    assert "quantization_config" not in json.loads((again.folder / "config.json").read_text())
    assert again.infos and all(info.path.parent == again.folder for info in again.infos.values())
    assert load(shutil.copy(file, file.with_name("other.gguf"))).folder == first.folder


def test_without_its_package_a_file_is_refused(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="takes the package `gguf`") as refused:
        load(file)
    assert refused.value.hint == "pip install 'peftc[gguf]'"
    assert [each.name for each in own_cache.iterdir()] == ["lock"]


@pytest.mark.parametrize("kept", [0, 3, 100, 600, 3000, 100_000])
def test_a_file_that_is_cut_short_is_refused(file: Path, own_cache: Path, kept: int) -> None:
    content = file.read_bytes()
    assert kept < len(content)
    file.write_bytes(content[:kept])
    with pytest.raises(SourceError, match="is no GGUF file|cannot read the (model|tokenizer) in"):
        load(file)
    assert not own_cache.exists() or [each.name for each in own_cache.iterdir()] == ["lock"]


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path, own_cache: Path) -> None:
    file = written(tmp_path / "tiny.gguf", network(), without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(SourceError, match="does not hold its whole model") as refused:
        load(file)
    assert "model.layers.1.mlp.up_proj.weight" in str(refused.value.why)


def test_a_file_that_says_it_is_far_larger_than_it_is_is_refused(tmp_path: Path, own_cache: Path) -> None:
    file = written(tmp_path / "tiny.gguf", network(), layers=10_000_000)
    with pytest.raises(SourceError, match="num_hidden_layers"):
        load(file)


def test_files_that_are_no_model_are_refused(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "tiny.gguf").write_text("hello")
    with pytest.raises(SourceError, match="is no GGUF file"):
        load(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match="there is no model at `models/none.gguf`"):
        load("models/none.gguf")
    with pytest.raises(UsageError, match="`--arch` says how to build a model, and"):
        load(Source(str(tmp_path / "tiny.gguf"), arch="timm:resnet18"))
    with pytest.raises(ArtifactError, match="is a model, not an artifact of peftc"):
        package.show(tmp_path / "tiny.gguf")


def test_a_cache_that_cannot_be_written_is_said(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "taken")
    with pytest.raises(SourceError, match="cannot keep what .* holds in the cache"):
        load(file)


def test_a_name_in_the_working_folder_is_not_taken_for_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tiny.gguf").write_text("another")
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    assert load("../tiny.gguf").name == "tiny"


def test_a_chain_on_a_file_finds_it_again(
    file: Path, tmp_path: Path, peftc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text("the cat sat on the mat .\n" * 60)
    made = peftc("decompose", "tiny.gguf", "--ratio", 0.6, "-o", "small")
    assert made.exit_code == 0, made.stderr
    record = json.loads((tmp_path / "small" / "peftc.json").read_text())["base"]
    assert record["source"] == {"spec": "tiny.gguf"} and list(record["files"]) == ["tiny.gguf"]
    asked = ["--data", "story.txt", "--protocol", "gptq", "--max-length", 64, "--json"]
    compared = peftc("evaluate", "small", *asked, "--against", "base")
    assert compared.exit_code == 0, compared.stderr
    assert json.loads(compared.stdout)["against"]["divergence"]["value"] > 0
    assert peftc("analyze", "tiny.gguf", "--ratio", 0.5).exit_code == 0
    tuned = ["finetune", "tiny.gguf", "--data", "story.txt", "--steps", 1, "--held-out", 0, "--max-length", 32]
    assert peftc(*tuned, "--delta", "-o", "tuned").exit_code == 0
    assert peftc("evaluate", "tuned", *asked).exit_code == 0
    written(file, network(tied=False))
    other = peftc("evaluate", "small", *asked, "--against", "base")
    assert other.exit_code == 1 and "`tiny.gguf` holds other bytes" in other.stderr
