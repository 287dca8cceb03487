"""Frozen weights that stay in bfloat16 change no bit of a training, and take half the memory."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc.models import halved
from peftc.models.load import load
from peftc.options import Reading, Recipe
from peftc.training import journal, student
from tests.conftest import TEXTS
from tests.networks import LLAMA, save_transformers

FEW: dict[str, Any] = {"steps": 4, "batch_size": 4, "device": "cpu", "learning_rate": 1e-2, "evaluations": 2}
FEW["mixed_precision"] = "bf16"
BYTES = ("model.safetensors", "peftc.json", journal.LOG)


def halve(folder: Path, target: Path) -> Path:
    """Copy a model with its weights in bfloat16."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        state = {name: each.bfloat16() if each.is_floating_point() else each for name, each in load_file(path).items()}
        save_file(state, path, {"format": "pt"})
    return target


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LLAMA | {"tie_word_embeddings": False, "attention_bias": True}
    return halve(save_transformers(tmp_path / "whole", "LlamaForCausalLM", **config), tmp_path / "llama")


@pytest.fixture
def story(tmp_path: Path) -> str:
    (tmp_path / "story.txt").write_text("\n".join(TEXTS * 40))
    return str(tmp_path / "story.txt")


def both(patch: pytest.MonkeyPatch, run: Any) -> None:
    """Run with weights as they are stored, and widened, and compare what comes out."""
    kept, found = [], []
    attached = halved.attach
    for way in (True, False):
        with patch.context() as inner:
            inner.setattr(halved, "attach", lambda model: kept.append(model) or attached(model))
            if not way:
                inner.setattr(halved, "suits", lambda network, recipe: False)
            folder = run(str(way))
            found.append([(folder / name).read_bytes() for name in BYTES])
    assert kept and found[0] == found[1]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_language_model_learns_the_same_bits(
    method: str, llama: Path, story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> Path:
        peftc.finetune(llama, output_dir=tmp_path / name, data=story, method=method, max_length=16, **FEW)
        return tmp_path / name

    both(monkeypatch, run)


@pytest.mark.parametrize("more", [{"gradient_checkpointing": True}, {"ema": 0.5, "include": ["*embed*"]}])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_so_does_a_factored_one(
    more: dict[str, Any], method: str, llama: Path, story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peftc.decompose(llama, output_dir=tmp_path / "small", ratio=0.6, method="svd", device="cpu")

    def run(name: str) -> Path:
        options = {**FEW, "data": story, "method": method, "max_length": 16, **more}
        peftc.finetune(tmp_path / "small", output_dir=tmp_path / name, **options)
        return tmp_path / name

    both(monkeypatch, run)


@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_resnet"])
def test_so_do_networks_of_images(
    kind: str, images: str, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = halve(request.getfixturevalue(kind), tmp_path / "half")

    def run(name: str) -> Path:
        peftc.finetune(model, output_dir=tmp_path / name, data=images, head="new", **FEW)
        return tmp_path / name

    both(monkeypatch, run)


def test_so_does_a_student_of_such_a_teacher(
    llama: Path, story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peftc.decompose(llama, output_dir=tmp_path / "small", ratio=0.6, method="svd", device="cpu")

    def run(name: str) -> Path:
        options = {**FEW, "data": story, "loss": "features=1,logits=1,task=1", "max_length": 16}
        peftc.distill(tmp_path / "small", output_dir=tmp_path / name, **options)
        return tmp_path / name

    both(monkeypatch, run)


def built(
    model: Path, mixed_precision: str, method: str = "lora", *, on_product: bool = False, **more: Any
) -> nn.Module:
    stored = load(model, merge=False)
    head = student.headed(stored, "", Reading(task="causal-lm"), "keep")
    recipe = Recipe(steps=1, mixed_precision=mixed_precision, **more)
    how: dict[str, Any] = {"include": (), "skip": (), "on_product": on_product, "task": "causal-lm", "seed": 0}
    return student.build(head, method, {}, **how, device="cpu", recipe=recipe).model.module


def test_products_stay_as_they_are_stored_and_what_learns_is_float32(llama: Path) -> None:
    network = built(llama, "bf16")
    kinds = {name: each.dtype for name, each in network.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".base." in name} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if ".update." in name} == {torch.float32}
    assert {kinds["lm_head.weight"], kinds["model.layers.0.self_attn.q_proj.base.bias"]} == {torch.bfloat16}
    assert {kinds[name] for name in ("model.embed_tokens.weight", "model.norm.weight")} == {torch.float32}
    others = [built(llama, "no"), built(llama, "bf16", compile=True), built(llama, "bf16", "snell")]
    for other in [*others, built(llama, "bf16", "dora", on_product=True)]:
        assert {each.dtype for each in other.parameters()} == {torch.float32}


def test_what_reads_weights_without_calling_their_module_is_widened(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.linear(x, self.gate_proj.weight))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert {each.dtype for each in built(llama, "bf16").parameters()} == {torch.float32}
