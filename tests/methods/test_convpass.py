"""Convpass: a convolution over the patches beside attention and MLP, the class token on its own, nothing at first."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftc
from peftc.errors import PlanError, UsageError
from peftc.methods.adapter.convpass import Bypass, convpass
from peftc.models import adapting, load
from peftc.nn.adapted import Adapted, adapted_modules
from peftc.store import manifest
from tests.networks import BERT, INPUT, VIT, save_timm, save_transformers

CPU: dict[str, Any] = {"device": "cpu"}


def bypass(width: int = 6, **settings: Any) -> Bypass:
    """Return a bypass of an MLP in which everything learnt is random."""
    torch.manual_seed(0)
    found = convpass(timm.layers.Mlp(width, 12), rank=4, **settings)
    assert isinstance(found, Bypass)
    for parameter in found.parameters():
        nn.init.normal_(parameter)
    return found


def nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_a_layer_of_vit_b_gains_as_many_parameters_as_the_authors_count() -> None:
    layer = timm.create_model("vit_base_patch16_224", depth=1).blocks[0]
    updates = [convpass(layer.attn), convpass(layer.mlp)]
    assert sum(p.numel() for update in updates if update is not None for p in update.parameters()) == 27_296


@pytest.mark.parametrize("before", [0, 1, 5])
def test_it_is_a_convolution_over_the_patches_and_of_one_pixel_before_them(before: int) -> None:
    update, x = bypass(scale=0.5), torch.randn(2, before + 9, 6)
    narrow = F.gelu(F.linear(x, update.down.weight, update.down.bias))

    def convolved(tokens: Tensor, side: int) -> Tensor:
        image = tokens.reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)
        out = F.conv2d(image, update.conv.weight, update.conv.bias, padding=1).permute(0, 2, 3, 1)
        return out.reshape(len(tokens), side * side, -1)

    parts = [convolved(narrow[:, at : at + 1], 1) for at in range(before)]
    seen = torch.cat([*parts, convolved(narrow[:, before:], 3)], dim=1)
    expected = F.linear(0.5 * F.gelu(seen), update.up.weight, update.up.bias)
    torch.testing.assert_close(update(nothing, x), expected)  # type: ignore[arg-type]
    torch.testing.assert_close(update(torch.sin, x), torch.sin(x) + expected)  # type: ignore[arg-type]


def test_it_starts_at_the_base_and_gradients_reach_it_alone(vit: Path) -> None:
    model = load.load(vit)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model.module(x)
    placed = adapting.place(model, "convpass", {"rank": 4}, skip=["blocks.1.mlp"])
    assert sorted(placed.adapters) == [
        "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.2.attn", "blocks.2.mlp",
        "blocks.3.attn", "blocks.3.mlp",
    ]  # fmt: skip
    assert torch.equal(model.module(x), before)
    for update in (each.update for each in adapted_modules(model.module).values()):
        nn.init.normal_(update.up.weight)  # type: ignore[union-attr, arg-type]
    model.module(x).sum().backward()
    learnt = {name for name, each in model.module.named_parameters() if each.grad is not None}
    assert learnt == {name for name, _ in model.module.named_parameters() if ".update." in name}
    assert all(each.grad.abs().sum() > 0 for each in model.module.parameters() if each.grad is not None)


def test_an_attention_gets_the_mask_that_its_block_hands_it() -> None:
    given = {}

    class Attention(nn.Module):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            given["mask"] = attn_mask
            return x

    mask = torch.ones(4, 4)
    Adapted(Attention(), bypass())(torch.randn(1, 4, 6), attn_mask=mask)
    assert given["mask"] is mask


def test_a_tuned_delta_reloads_merges_to_itself_and_loses_its_layers(vit: Path, images: str, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"data": images, "held_out": 0, "steps": 3, "settings": {"rank": 4, "scale": 2.0}, **CPU}
    peftc.finetune(vit, method="convpass", delta=True, output_dir=tmp_path / "delta", **quick)
    peftc.finetune(vit, method="convpass", output_dir=tmp_path / "whole", **quick)
    peftc.prune_layers(tmp_path / "delta", drop="1,3", output_dir=tmp_path / "shorter", **CPU)
    delta, whole, shorter = (peftc.load(tmp_path / name) for name in ("delta", "whole", "shorter"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(delta(x), whole(x)) and not torch.equal(delta(x), peftc.load(vit)(x))
        delta.blocks = nn.Sequential(delta.blocks[0], delta.blocks[2])
        assert torch.equal(shorter(x), delta(x))
    record = manifest.read(tmp_path / "shorter")
    assert sorted(record.adapters) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert {entry["settings"]["scale"] for entry in record.adapters.values()} == {2.0}


def test_factored_blocks_take_it_too(vit: Path, images: str, tmp_path: Path) -> None:
    peftc.decompose(vit, ratio=0.5, output_dir=tmp_path / "small", **CPU)
    peftc.finetune(
        tmp_path / "small", method="convpass", data=images, held_out=0, steps=2, output_dir=tmp_path / "out", **CPU
    )
    assert len(manifest.read(tmp_path / "out").adapters) == 8
    assert peftc.load(tmp_path / "out")(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_decompose_leaves_alone_what_an_update_sits_beside(vit: Path, images: str, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"data": images, "held_out": 0, "steps": 1, **CPU}
    peftc.finetune(vit, method="adapter", settings={"rank": 2}, output_dir=tmp_path / "adapter", **quick)
    report = peftc.decompose(tmp_path / "adapter", ratio=0.5, output_dir=tmp_path / "small", **CPU)
    assert {name.rpartition(".")[2] for name in manifest.read(tmp_path / "small").modules} == {"qkv", "fc1"}
    assert any("beside or in an update" in str(entry) for entry in report.data["dense"])
    peftc.finetune(vit, method="convpass", output_dir=tmp_path / "convpass", **quick)
    with pytest.raises(PlanError, match="has no eligible module"):
        peftc.decompose(tmp_path / "convpass", ratio=0.5, output_dir=tmp_path / "none", **CPU)


@pytest.mark.parametrize("count", [1, 3, 99])
def test_tokens_that_are_no_square_are_refused(count: int) -> None:
    with pytest.raises(PlanError, match=f"a square of patches(.|\n)*\\[{count}\\]"):
        bypass()(nothing, torch.randn(1, count, 6))  # type: ignore[arg-type]


def test_models_without_a_square_of_patches_are_refused(images: str, tmp_path: Path) -> None:
    for name in ("wide", "bert", "resnet"):
        (tmp_path / name).mkdir()
    wide = {**INPUT, "input_size": [3, 48, 32]}
    save_timm(tmp_path / "wide", "vit_tiny_patch16_224", {**VIT, "img_size": [48, 32]}, wide)
    save_timm(tmp_path / "resnet", "resnet18", {"channels": [8, 16, 24, 32], "num_classes": 5}, INPUT)
    save_transformers(tmp_path / "bert", "BertForSequenceClassification", **BERT)
    (tmp_path / "texts.csv").write_text("text,label\n" + "a word,0\nanother,1\n" * 8)
    for name, why in (("wide", "6 x 4 patches"), ("resnet", "no grid"), ("bert", "no grid")):
        data = str(tmp_path / "texts.csv") if name == "bert" else images
        with pytest.raises(PlanError, match=f"a square of patches(.|\n)*{why}"):
            peftc.finetune(tmp_path / name, method="convpass", data=data, steps=1, output_dir=tmp_path / "out", **CPU)
    assert not (tmp_path / "out").exists()


def test_in_swin_a_window_is_an_image(tmp_path: Path, images: str) -> None:
    size = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 5}
    folder = save_timm(tmp_path, "swin_tiny_patch4_window7_224", size, INPUT)
    peftc.finetune(folder, method="convpass", data=images, held_out=0, steps=2, output_dir=tmp_path / "out", **CPU)
    assert len(manifest.read(tmp_path / "out").adapters) == 8


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="is none"):
        convpass(timm.layers.Mlp(6, 12), rank=0)
