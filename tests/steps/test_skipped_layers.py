"""prune-layers where no config leaves the layers out: they keep their places and hand on what they read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from peftc.errors import ArtifactError, ExportError, SourceError
from peftc.models import load
from peftc.nn.skipped import Skipped
from peftc.store import manifest
from peftc.training import imitation
from tests.conftest import rewritten
from tests.networks import save_timm, save_transformers

SWIN = {"embed_dim": 24, "img_size": 112, "depths": (2, 2, 2, 2), "num_classes": 5}
INPUT = {"input_size": [3, 112, 112], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
CPU: dict[str, Any] = {"device": "cpu"}
FIRST = "layers.0.blocks.0"


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers shift their windows in turn, so one without its first layer is none that timm builds."""
    return save_timm(tmp_path_factory.mktemp("swin"), "swin_tiny_patch4_window7_224", SWIN, INPUT)


@pytest.fixture(scope="module")
def shorter(swin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "shorter"
    report = peftc.prune_layers(swin, drop="0", output_dir=folder, **CPU)
    assert any("no library builds such a network without peftc" in note for note in report.notes)
    size = report.data["size"]
    assert size["after"]["parameters"] < size["before"]["parameters"]
    assert size["after"]["macs"] < size["before"]["macs"]
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 5
    pixels = np.clip(rng.normal(size=(20, 112, 112, 3)) * 20 + 40 * labels[:, None, None, None], 0, 255)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, x_train=pixels.astype("uint8"), y_train=labels)
    return path


def given(model: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(2, 3, 112, 112))  # type: ignore[no-any-return]


def test_the_layer_is_gone_and_the_others_compute_what_they_did(swin: Path, shorter: Path) -> None:
    by_hand = peftc.load(swin)
    by_hand.layers[0].blocks[0] = nn.Identity()
    written = peftc.load(shorter)
    torch.testing.assert_close(given(written), given(by_hand))
    assert not any(name.startswith(f"{FIRST}.") for name in written.state_dict())
    record = manifest.read(shorter)
    assert record.skipped == {FIRST: []}
    assert record.kept_layers[0] == "layers.0.blocks.1"
    assert len(record.kept_layers) == 7


def test_the_next_steps_take_it(swin: Path, shorter: Path, images: Path, tmp_path: Path) -> None:
    peftc.prune_layers(shorter, drop="3", output_dir=tmp_path / "six", **CPU)
    assert manifest.read(tmp_path / "six").skipped == {FIRST: [], "layers.2.blocks.0": []}
    student, base = load.load(tmp_path / "six"), load.load(swin)
    names = manifest.read(tmp_path / "six").kept_layers
    assert imitation.pair(student, base) == [(name, name) for name in names]
    peftc.decompose(tmp_path / "six", ratio=0.5, output_dir=tmp_path / "small", **CPU)
    tuning: dict[str, Any] = {"data": str(images), "method": "lora", "steps": 2, "held_out": 0, **CPU}
    peftc.finetune(tmp_path / "small", output_dir=tmp_path / "delta", delta=True, **tuning)
    peftc.finetune(tmp_path / "small", output_dir=tmp_path / "tuned", **tuning)
    assert isinstance(peftc.load(tmp_path / "tuned").layers[0].blocks[0], Skipped)
    torch.testing.assert_close(given(peftc.load(tmp_path / "delta")), given(peftc.load(tmp_path / "tuned")))


def test_a_shorter_delta_stays_one(swin: Path, images: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": str(images), "method": "bitfit", "steps": 1, "held_out": 0, "delta": True, **CPU}
    peftc.finetune(swin, output_dir=tmp_path / "delta", **how)
    peftc.prune_layers(tmp_path / "delta", drop="0", output_dir=tmp_path / "shorter", **CPU)
    peftc.merge(tmp_path / "shorter", output_dir=tmp_path / "whole")
    assert manifest.read(tmp_path / "whole").skipped == {FIRST: []}
    torch.testing.assert_close(given(peftc.load(tmp_path / "whole")), given(peftc.load(tmp_path / "shorter")))


def test_timm_loads_it_after_the_import_alone(shorter: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"`{FIRST}` was dropped in its place") as caught:
        peftc.export(shorter, format="timm", dense=True, output_dir=tmp_path / "plain")
    assert caught.value.hint == "leave `--dense` out, and use `--format onnx`"
    assert not (tmp_path / "plain").exists()
    for word in ("timm", "torch-export"):
        report = peftc.export(shorter, format=word, output_dir=tmp_path / word, rounds=5, batch_size=1)
        assert report.data["deviation"] < 1e-5


def test_transformers_does_not_fill_the_gap_with_random_numbers(tmp_path: Path) -> None:
    sizes = {
        "image_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 2],
    }
    folder = save_transformers(tmp_path / "swin", "SwinForImageClassification", **sizes, num_labels=3)
    peftc.prune_layers(folder, drop="0", output_dir=tmp_path / "shorter", **CPU)
    ((layer, given),) = manifest.read(tmp_path / "shorter").skipped.items()
    assert layer == "swin.encoder.layers.0.blocks.0" and given in ([1], [2])  # one thing fewer in transformers 5.0
    with pytest.raises(ValueError, match="peftc.load"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "shorter")


class Block(nn.Module):
    """A layer that gives a tuple, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x + self.linear(x).relu(), more


class Own(nn.Module):
    """A user's own network, whose code says how many layers there are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return self.head(x)


def test_a_network_of_your_own_loses_layers_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Own().eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftc.models.inputs.probe", lambda *_args, **_kwargs: torch.ones(2, 4))
        patch.setattr("peftc.models.inputs.probe", lambda *_args, **_kwargs: torch.ones(2, 4))
        peftc.prune_layers(network, drop="1,2", output_dir=tmp_path / "shorter", **CPU)
    assert manifest.read(tmp_path / "shorter").skipped == {"blocks.1": [2], "blocks.2": [2]}
    written = peftc.load(tmp_path / "shorter", allow_code=True)
    x = torch.randn(3, 4)
    by_hand = network.head(network.blocks[3](network.blocks[0](x)[0])[0])
    torch.testing.assert_close(written(x), by_hand)


@pytest.mark.parametrize(
    ("skipped", "text"),
    [({FIRST: [0]}, "does not say what it gave"), ({"layers.9": []}, "which its base network does not have")],
)
def test_a_damaged_manifest_is_refused(shorter: Path, tmp_path: Path, skipped: dict[str, int], text: str) -> None:
    for path in shorter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewritten(tmp_path / "peftc.json", lambda record: record.update(skipped=skipped))
    with pytest.raises(ArtifactError, match="skip|manifest") as caught:
        peftc.load(tmp_path)
    assert text in str(caught.value)


def test_a_network_that_does_not_run_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = save_transformers(tmp_path / "bert", "BertForSequenceClassification", **sizes, max_position_embeddings=2)
    with pytest.raises(SourceError, match="does not run on a random input"):
        peftc.prune_layers(folder, drop="0", output_dir=tmp_path / "out", **CPU)
