"""The ranks and parameter counts that PELA's formula gives on well-known networks (papers notes, section 1.2)."""

from typing import Any

import pytest

import peftc
from peftc.models.skeleton import parameters_on_meta

VIT = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SWIN = "swin_base_patch4_window7_224"


def decomposed(architecture: str, ratio: Any) -> dict[str, Any]:
    """Return the report of a dry run on a network whose parameters take no memory."""
    import timm

    with parameters_on_meta():
        network = timm.create_model(architecture, pretrained=False)
    return peftc.decompose(network, ratio=ratio, allocation="uniform", dry_run=True).data


def ranks(data: dict[str, Any]) -> dict[str, set[int | None]]:
    found: dict[str, set[int | None]] = {}
    for row in data["modules"]:
        found.setdefault(".".join(row["name"].split(".")[-2:]), set()).add(row["rank"])
    return found


def parameters(data: dict[str, Any]) -> tuple[int, int]:
    return data["size"]["before"]["parameters"], data["size"]["after"]["parameters"]


@pytest.mark.parametrize(
    ("architecture", "ratio", "expected", "before", "after"),
    [
        ("vit_base_patch16_224", "1/2", (288, 192, 307), 86_567_656, 44_081_896),
        ("vit_base_patch16_224", 2 / 3, (384, 256, 409), 86_567_656, 58_200_808),
        ("vit_base_patch16_224", "1/3", (192, 128, 204), 86_567_656, 29_870_824),
        ("vit_small_patch16_224", 0.5, (144, 96, 153), 22_050_664, 11_406_184),
        ("vit_tiny_patch16_224", 0.5, (72, 48, 76), 5_717_416, 3_044_776),
        ("deit3_large_patch16_224", 0.5, (384, 256, 409), 304_374_760, 153_232_360),
    ],
)
def test_a_vision_transformer_has_pelas_ranks_and_parameters(
    architecture: str, ratio: Any, expected: tuple[int, ...], before: int, after: int
) -> None:
    data = decomposed(architecture, ratio)
    qkv, projection, hidden = expected
    assert ranks(data) == dict(zip(VIT, ({qkv}, {projection}, {hidden}, {hidden}), strict=True))
    assert parameters(data) == (before, after)


def test_the_multiply_adds_of_vit_b_fall_as_pela_says() -> None:
    size = decomposed("vit_base_patch16_224", 0.5)["size"]
    assert size["before"]["macs"] / 1e9 == pytest.approx(17.56, abs=0.01)
    assert size["after"]["macs"] / 1e9 == pytest.approx(9.19, abs=0.01)


def test_swin_b_has_pelas_ranks_and_keeps_its_attention_projections_dense() -> None:
    data = decomposed(SWIN, "2/3")
    stages: dict[int, dict[str, int]] = {}
    for row in data["modules"]:
        _, stage, *_, kind = row["name"].split(".")
        assert stages.setdefault(int(stage), {}).setdefault(kind, row["rank"]) == row["rank"]
    assert [stages[stage]["qkv"] for stage in range(4)] == [64, 128, 256, 512]
    assert [stages[stage]["fc1"] for stage in range(4)] == [68, 136, 273, 546]
    assert [stages[stage]["fc2"] for stage in range(4)] == [68, 136, 273, 546]
    assert parameters(data) == (87_768_224, 62_164_128)
    dense = {row["name"]: row["reason"] for row in data["dense"]}
    assert sum(name.endswith("attn.proj") for name in dense) == 24
    assert sum(name.endswith("downsample.reduction") for name in dense) == 3
    assert any("head" in name for name in dense)


def test_what_pela_never_touches_stays_dense() -> None:
    dense = {row["name"]: row["reason"] for row in decomposed("vit_tiny_patch16_224", 0.5)["dense"]}
    assert dense.keys() == {"head", "patch_embed.proj"}
    assert dense["head"] == "output head"
