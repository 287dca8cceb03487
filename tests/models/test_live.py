"""Networks in memory: what is built again, with which arguments, and why something cannot be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

import peftc
from peftc.errors import SourceError
from peftc.models.live import refuse_unbuildable
from peftc.models.load import load
from tests.networks import BERT, VIT


class Wide(nn.Module):
    """It keeps its arguments under their names."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.first, self.last = nn.Linear(48, width), nn.Linear(width, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)) * self.heads


class Silent(nn.Module):
    """It does not."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.steps = 0
        self.first, self.last = nn.Linear(48, width), nn.Linear(width, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


MADE = [
    ("vit_tiny_patch16_224", VIT),
    ("vit_tiny_patch16_224", {"num_classes": 3, "in_chans": 1}),
    ("vit_tiny_patch16_224", {"depth": 2, "num_heads": 6, "mlp_ratio": 2.0}),
    ("vit_tiny_patch16_224", {"depth": 2, "num_heads": 6}),
    ("vit_tiny_patch16_224", {"depth": 2, "class_token": False, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"depth": 2, "reg_tokens": 4, "qkv_bias": False, "init_values": 0.1}),
    ("resnet18", {"num_classes": 7, "in_chans": 1}),
    ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "num_classes": 4}),
    ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "num_classes": 2}),
    ("mobilenetv2_050", {"num_classes": 2}),
]


@pytest.mark.parametrize(("name", "arguments"), MADE, ids=lambda each: str(each))
def test_a_timm_network_made_with_arguments_is_stored_and_reloads(name: str, arguments: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, **arguments).eval()
    report = peftc.decompose(network, ratio=0.9, output_dir=tmp_path / "out")
    assert report.artifact is not None and not [text for text in report.warnings if "not compared" in text]
    made = peftc.load(report.artifact)
    size = arguments.get("img_size", 224)
    image = torch.zeros(1, arguments.get("in_chans", 3), size, size)
    assert made(image).shape == network(image).shape
    usual = {"num_classes"} == arguments.keys()
    assert any("built again with" in note for note in report.notes) is not usual


def test_a_network_of_ones_own_is_built_with_the_arguments_that_it_shows(tmp_path: Path) -> None:
    for network in (Wide(32), Wide(32, heads=5)):
        model = load(network)
        refuse_unbuildable(model)
        assert model.base["arguments"]["width"] == 32
    peftc.decompose(Wide(40, heads=5), rank=4, include=["first"], output_dir=tmp_path / "out")
    assert peftc.load(tmp_path / "out", allow_code=True).heads == 5


def test_a_network_may_count_its_steps(tmp_path: Path) -> None:
    network = Silent()
    network.steps, network.first.calls = 7, 3  # type: ignore[assignment]
    peftc.decompose(network, ratio=0.5, output_dir=tmp_path / "out")


def changed(network: Any, value: int) -> Any:
    network.blocks[0].attn.num_heads = value
    return network


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (lambda: Silent(80), r"`first.weight` has shape 80 x 48, and 64 x 48 when it is built again"),
        (lambda: nn.Sequential(nn.Linear(64, 64)), "has shape 64 x 64, and none"),
        (
            lambda: changed(timm.create_model("vit_tiny_patch16_224", **VIT), 4),
            r"`blocks.0.attn.head_dim` is 16, and 8",
        ),
    ],
    ids=["arguments", "container", "changed afterwards"],
)
def test_what_cannot_be_built_again_is_refused_with_the_first_difference(
    network: Any, why: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=f"cannot be stored so that it reloads(?s:.*){why}"):
        peftc.decompose(network(), ratio=0.5, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_class_of_the_program_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Silent, "__module__", "__main__")
    with pytest.raises(SourceError, match="written in this program or notebook itself"):
        peftc.decompose(Silent(), ratio=0.5, output_dir=tmp_path / "out")


def test_a_class_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    class Own(transformers.BertModel):
        pass

    with pytest.raises(SourceError, match="its class is none of transformers"):
        peftc.decompose(Own(transformers.BertConfig(**BERT, vocab_size=30)), ratio=0.5, output_dir=tmp_path / "out")


def test_a_network_of_transformers_is_built_by_its_config(tmp_path: Path) -> None:
    network = transformers.BertModel(transformers.BertConfig(**BERT, vocab_size=30))
    report = peftc.decompose(network, ratio=0.5, output_dir=tmp_path / "out")
    assert report.artifact is not None
    assert peftc.load(report.artifact).config.hidden_size == BERT["hidden_size"]
