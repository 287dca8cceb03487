"""The same request of decompose gives the same bytes, another is another, and what the user gave stays as it was."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftc.errors import ArtifactError, SourceError, UsageError
from peftc.models import load as models
from peftc.nn import lowrank
from peftc.steps.analyze import analyze
from peftc.steps.decompose import decompose
from tests.conftest import promised
from tests.networks import NETWORKS, SMALL_VIT, Perceptron, ranks, read


def test_the_same_request_gives_the_same_bytes_in_two_folders(made, tmp_path: Path) -> None:
    for name in ("vit", "resnet-channel", "llama-head"):
        source, artifact, _ = made(name)
        decompose(source, output_dir=tmp_path / name, ratio="1/2", **NETWORKS[name][3])
        assert promised(tmp_path / name) == promised(artifact)


def test_the_same_request_in_one_folder_is_already_done(tiny_vit: Path, tmp_path: Path) -> None:
    first = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    assert any("already done" in note for note in again.notes)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert again.data == first.data and not (tmp_path / "out.partial").exists()


def test_already_done_does_not_need_the_result_file(tiny_vit: Path, tmp_path: Path) -> None:
    first = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    (tmp_path / "out" / "result.json").unlink()
    again = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5, max_params=1)
    assert not again.passed and again.gates[0].value == first.data["size"]["after"]["parameters"]


def test_another_request_is_refused_unless_it_may_overwrite(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    before = promised(tmp_path / "out")
    with pytest.raises(ArtifactError, match="another request"):
        decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.6)
    assert promised(tmp_path / "out") == before
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.6, overwrite=True)
    assert promised(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_of_the_users_own_is_never_touched(tiny_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="in the way"):
            decompose(tiny_vit, output_dir=tmp_path, ratio=0.5, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_plan_of_analyze_gives_the_same_tensors_as_its_budget(made, tmp_path: Path) -> None:
    for name in ("vit", "resnet-spatial", "resnet-channel"):
        source, artifact, _ = made(name)
        options = NETWORKS[name][3]
        analyze(source, plan=tmp_path / "plan.json", ratio=0.5, **options)
        decompose(source, output_dir=tmp_path / name, plan=tmp_path / "plan.json", **options)
        one, other = load_file(artifact / "model.safetensors"), load_file(tmp_path / name / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_dry_run_plans_the_same_and_writes_nothing(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vit", "llama-head"):
        source, _, report = made(name)
        planned = decompose(source, ratio=0.5, dry_run=True, **NETWORKS[name][3])
        assert planned.artifact is None and ranks(planned) == ranks(report)
        assert decompose(source, ratio=0.5, allocation="uniform", dry_run=True, **NETWORKS[name][3]).data["modules"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({}, "give exactly one budget"),
        ({"ratio": 0.5, "rank": 3}, "contradict"),
        ({"ratio": 0}, "out of range"),
        ({"ratio": 1.5}, "out of range"),
        ({"ratio": -0.5}, "out of range"),
        ({"ratio": math.nan}, "out of range"),
        ({"ratio": "half"}, "out of range"),
        ({"ratio": "1/0"}, "out of range"),
        ({"rank": 0}, "out of range"),
        ({"rank": 2.5}, "out of range"),
        ({"rank": math.nan}, "out of range"),
        ({"energy": 0}, "out of range"),
        ({"energy": math.inf}, "out of range"),
        ({"target_params": -5}, "out of range"),
        ({"ratio": 0.5, "max_shard_size": "big"}, "max-shard-size"),
        ({"ratio": 0.5, "max_shard_size": 0}, "max-shard-size"),
        ({"ratio": 0.5, "allocation": "fair"}, "allocation"),
        ({"ratio": 0.5, "method": "magic"}, "--method"),
        ({"ratio": 0.5, "conv_method": "magic"}, "--conv-method"),
        ({"ratio": 0.5, "settings": {"alpha": 1}}, "alpha"),
        ({"ratio": 0.5, "device": "tpu"}, "--device"),
        ({"ratio": 0.5, "include": ["nowhere"]}, "nowhere"),
        ({"ratio": 0.5, "skip": ["nowhere"]}, "nowhere"),
        ({"ratio": 0.5, "max_drop": 0.1}, "--data"),
        ({"ratio": 0.5, "plan": "p.json"}, "--plan"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_request_is_refused_and_writes_nothing(
    tiny_vit: Path, tmp_path: Path, budget: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError) as caught:
        decompose(tiny_vit, output_dir=tmp_path / "out", **budget)
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_live_network_is_copied_and_keeps_its_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Perceptron().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    decompose(network, output_dir=tmp_path / "out", ratio=0.5)
    assert network.training and isinstance(network.first, nn.Linear)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert isinstance(models.load(read(tmp_path / "out")).module.first, lowrank.LowRankLinear)


def test_a_loaded_model_is_not_changed(tiny_vit: Path, tmp_path: Path) -> None:
    model = models.load(tiny_vit)
    names = list(model.module.state_dict())
    decompose(model, output_dir=tmp_path / "one", ratio=0.5)
    assert list(model.module.state_dict()) == names
    decompose(model, output_dir=tmp_path / "two", ratio=0.5)
    assert promised(tmp_path / "one") == promised(tmp_path / "two")


def test_a_live_timm_model_keeps_its_arguments_or_is_refused_at_once(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)
    try:
        decompose(network, output_dir=tmp_path / "out", ratio=0.5)
    except SourceError as refusal:
        assert "live" in str(refusal)
    else:
        assert models.load(tmp_path / "out").module.blocks[0].attn.qkv.up.out_features == 96  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    "network",
    [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), Perceptron(width=80)],
    ids=["container", "arguments"],
)
def test_a_live_network_that_cannot_be_built_again_is_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="live"):
        decompose(network, output_dir=tmp_path / "out", ratio=0.5)
    assert not list(tmp_path.iterdir())
