"""Decompose takes weights of every dtype, scale and rank, and refuses those that are no numbers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftc.errors import WeightError
from peftc.models import load as models
from peftc.models.inputs import outputs, probe
from peftc.steps.decompose import decompose
from peftc.store.source import Source
from tests.networks import HERE, Convolutions, perceptron, read


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = perceptron(tmp_path, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    dense = models.load(source).module.state_dict()
    for row in report.data["modules"]:
        name = row["name"]
        product = stored[f"{name}.up.weight"].double() @ stored[f"{name}.down.weight"].double()
        weight = dense[f"{name}.weight"].double()
        assert row["error"] == pytest.approx(float((weight - product).norm() / weight.norm()), rel=1e-3)


def test_half_weights_beside_float32_norms_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {k: t.half() if t.ndim > 1 else t for k, t in Convolutions().state_dict().items()}
    save_file(state, tmp_path / "c.safetensors")
    source = Source(f"{HERE}:Convolutions", weights=tmp_path / "c.safetensors", allow_code=True)
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["norm.running_var"].dtype == torch.float32
    assert {stored[name].dtype for name in stored if name.endswith(("up.weight", "down.weight"))} == {torch.float16}
    assert not report.warnings


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["first.weight", "last.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, bad: float) -> None:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        broken = state[name].clone()
        broken.view(-1)[3] = bad
        return {name: broken}

    with pytest.raises(WeightError, match=f"NaN or infinite numbers in `{name}`"):
        decompose(perceptron(tmp_path, change), output_dir=tmp_path / "out", ratio=0.5)
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("allocation", ["global", "energy", "uniform"])
@pytest.mark.parametrize("weight", ["zero", "rank 1", "rank 3"])
def test_weights_of_low_rank_are_exact(tmp_path: Path, weight: str, allocation: str) -> None:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        rank = {"zero": 0, "rank 1": 1, "rank 3": 3}[weight]
        low = {name: t for name, t in state.items() if t.ndim == 2 and name != "last.weight"}
        return {name: torch.randn(len(t), rank) @ torch.randn(rank, t.shape[1]) for name, t in low.items()}

    source = perceptron(tmp_path, change)
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5, allocation=allocation)
    assert all(row["error"] < 1e-5 for row in report.data["modules"])
    assert all(math.isfinite(row["error"]) for row in report.data["modules"])
    batch = probe(models.load(source))
    found, dense = models.load(read(tmp_path / "out")), models.load(source)
    torch.testing.assert_close(outputs(found, batch), outputs(dense, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_the_scale_of_a_weight_changes_no_error(tmp_path: Path, scale: float) -> None:
    plain = decompose(perceptron(tmp_path), output_dir=tmp_path / "plain", rank=8)
    source = perceptron(tmp_path, lambda state: {name: tensor * scale for name, tensor in state.items()})
    scaled = decompose(source, output_dir=tmp_path / "scaled", rank=8)
    for one, other in zip(plain.data["modules"], scaled.data["modules"], strict=True):
        assert other["error"] == pytest.approx(one["error"], rel=1e-3)
