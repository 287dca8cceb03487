"""Layers are found by what they do, in networks of every make."""

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from peftc.models import layers, load
from tests.networks import VISION

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 40,
}  # fmt: skip


def found(network: nn.Module) -> list[str]:
    return layers.layers(load.load(network.eval()))


@pytest.mark.parametrize(
    ("name", "arguments", "first", "last", "number"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 32, "num_heads": 2}, "blocks.0", "blocks.11", 12),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24}, "layers.0.blocks.0", "layers.3.blocks.1", 12),
        ("convnext_atto", {}, "stages.0.blocks.0", "stages.3.blocks.1", 12),
        ("resnet18", {}, "layer1.0", "layer4.1", 8),
        ("eva02_tiny_patch14_224", {}, "blocks.0", "blocks.11", 12),
        ("regnetx_002", {}, "s3.b1", "s4.b7", 11),
        ("mobilenetv2_100", {}, "blocks.1.0", "blocks.5.2", 15),
    ],
)
def test_layers_of_timm(name: str, arguments: dict[str, Any], first: str, last: str, number: int) -> None:
    names = found(timm.create_model(name, **arguments))
    assert (names[0], names[-1], len(names)) == (first, last, number)


@pytest.mark.parametrize(
    ("config", "network", "expected"),
    [
        ("BertConfig", "BertModel", [f"encoder.layer.{n}" for n in range(3)]),
        ("LlamaConfig", "LlamaForCausalLM", [f"model.layers.{n}" for n in range(3)]),
        ("MixtralConfig", "MixtralForCausalLM", [f"model.layers.{n}" for n in range(3)]),
        ("ViTConfig", "ViTForImageClassification", [f"vit.layers.{n}" for n in range(3)]),
    ],
)
def test_layers_of_transformers(config: str, network: str, expected: list[str]) -> None:
    made = getattr(transformers, network)(getattr(transformers, config)(**SMALL, bos_token_id=1, eos_token_id=2))
    assert [name.replace("vit.encoder.layer.", "vit.layers.") for name in found(made)] == expected  # its older name


def test_layers_of_two_towers_and_of_fusion_within_one() -> None:
    text = {
        **SMALL,
        "encoder_hidden_size": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
        "pad_token_id": 0,
    }
    config = transformers.BlipConfig(text_config=text, vision_config=VISION)
    names = found(transformers.BlipForImageTextRetrieval(config))
    assert names == [f"vision_model.encoder.layers.{n}" for n in range(2)] + [
        f"text_encoder.encoder.layer.{n}" for n in range(3)
    ]


def test_blocks_of_transformers_resnet_are_layers_and_the_convolutions_in_them_are_not() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [3, 2], "layer_type": "basic"}
    made = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    assert found(made) == [
        f"resnet.encoder.stages.{stage}.layers.{n}" for stage, n in zip("00011", "01201", strict=True)
    ]


class Preactivated(nn.Module):
    """A layer whose first operation changes what it reads in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.relu(x))


def test_layers_of_a_frozen_network_that_works_in_place_are_found() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(Preactivated() for _ in range(3)))).requires_grad_(False)
    model = load.load(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftc.models.inputs.probe", lambda *_args, **_kwargs: torch.ones(2, 4))
        assert layers.layers(model) == ["1.0", "1.1", "1.2"]
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_network_without_a_stack_has_no_layers() -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))) == []


def test_what_is_watched_is_what_each_layer_gives() -> None:
    network = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=2, depth=3, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), layers.watched(network, ["blocks.0", "blocks.2"]) as features:
        network(x)
    with torch.no_grad():
        tokens: Tensor = network.forward_features(x)
    assert [list(each.shape) for each in features] == [[2, 5, 32]] * 2
    torch.testing.assert_close(network.norm(features[1]), tokens)  # before the final norm
    assert not any(module._forward_hooks for module in network.modules())
