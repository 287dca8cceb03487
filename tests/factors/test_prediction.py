"""Predicted losses fall as more is kept, vanish at full size, and are those of the plan that decompose carries out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.calibration import prepared
from peftc.calibration.prepared import Request, prepare
from peftc.factors.prediction import anchors_of, predicted
from peftc.factors.spectra import Factorizer
from peftc.models import load as models
from peftc.steps.analyze import analyze
from peftc.steps.decompose import decompose
from peftc.steps.evaluate import evaluate
from peftc.tasks.unlabelled import divergence
from tests.steps.test_evaluate import fill

CALIBRATED: dict[str, Any] = {"calibration_samples": 24, "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fill(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    ("method", "allocation"), [("svd", "uniform"), ("svd", "energy"), ("kfac", "uniform"), ("kfac", "convex")]
)
def test_more_ratio_never_predicts_more_loss_and_all_of_it_none(
    tiny_vit: Path, images: str, method: str, allocation: str
) -> None:
    data = {"data": images, **CALIBRATED} if method == "kfac" else {}
    report = analyze(tiny_vit, method=method, allocation=allocation, **data)
    points = report.data["curve"]["points"]
    assert len(points) > 5 and [one["ratio"] for one in points] == sorted(one["ratio"] for one in points)
    losses = [one["predicted"] for one in points]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0 and losses[-1] == 0
    whole = models.load(tiny_vit).module
    assert points[-1]["parameters"] == sum(p.numel() for p in whole.parameters())
    for key in ("parameters", "macs"):
        sizes = [one[key] for one in points]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("method", ["svd", "whitened", "kfac"])
def test_the_curve_is_what_decompose_plans_and_then_does(
    tiny_vit: Path, images: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TRIED": 0, "FEWEST": 1000}.items():  # `analyze` calibrates on the samples of `decompose` then
        monkeypatch.setattr(prepared, name, value)
    data = {"data": images, **CALIBRATED} if method != "svd" else {}
    curve = analyze(tiny_vit, method=method, **data).data["curve"]
    for ratio in (0.5, 0.9):
        point = next(one for one in curve["points"] if one["ratio"] == ratio)
        dry = decompose(tiny_vit, method=method, ratio=str(ratio), dry_run=True, **data, sensitivity=0).data
        assert dry["size"]["after"]["parameters"] == point["parameters"]
        assert dry["size"]["after"]["macs"] == point["macs"]
        assert dry["predicted"]["unit"] == curve["unit"]
        assert dry["predicted"]["value"] == dry["predicted"]["apart"]  # nothing was tried
        assert dry["predicted"]["apart"] == pytest.approx(point["apart"], rel=2e-3)
    done = decompose(tiny_vit, method=method, ratio="0.9", output_dir=tmp_path / "out", **data, sensitivity=0).data
    assert done["predicted"]["value"] == pytest.approx(dry["predicted"]["value"], rel=2e-3)
    assert [row["rank"] for row in done["modules"]] == [row["rank"] for row in dry["modules"]]
    assert "estimate" in dry and "estimate" not in done


@pytest.mark.parametrize("allocation", ["uniform", "auto"])
def test_what_is_predicted_is_what_the_ranks_lose_together(
    tiny_vit: Path, images: str, tmp_path: Path, allocation: str
) -> None:
    """On the samples that it is predicted by; the sum over modules alone is something else."""
    asked: dict[str, Any] = {"ratio": "0.5", "data": images, "allocation": allocation, "sensitivity": 6, **CALIBRATED}
    dry = decompose(tiny_vit, dry_run=True, **asked).data["predicted"]
    made = decompose(tiny_vit, output_dir=tmp_path / "small", **asked).data["predicted"]
    assert made == dry and dry["unit"] == "nats per sample" and dry["samples"] == 6
    known = prepare(models.load(tiny_vit), Request(images, samples=24), "cpu", apart=True)
    inputs = known.tried.batch(range(6)).inputs
    dense, small = (peftc.load(each) for each in (tiny_vit, tmp_path / "small"))
    with torch.no_grad():
        lost = divergence(known.task, dense(inputs), small(inputs), inputs).mean()
    assert dry["value"] == pytest.approx(float(lost), rel=1e-3)
    assert abs(dry["apart"] / dry["value"] - 1) > 0.05
    assert dry["low"] < dry["value"] < dry["high"]


def test_a_dry_run_solves_each_module_once(tiny_vit: Path, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are corrected by measurements, tried in three forms as a whole, and predicted."""
    solved: list[str] = []
    solve = Factorizer.__call__

    def counting(self: Factorizer, weight: Any, target: Any) -> Any:
        solved.append(target.name)
        return solve(self, weight, target)

    monkeypatch.setattr(Factorizer, "__call__", counting)
    report = decompose(tiny_vit, ratio="0.5", data=images, dry_run=True, **CALIBRATED)
    assert report.data["predicted"]["samples"] == 6
    assert len(solved) == len(set(solved)) == len(report.data["modules"]) > 4


def test_the_curve_goes_through_what_was_measured(tiny_vit: Path, images: str) -> None:
    curve = analyze(tiny_vit, data=images, **CALIBRATED).data["curve"]
    tried = [one for one in curve["points"] if "measured" in one]
    assert [one["ratio"] for one in tried] == [0.3, 0.5, 0.75, 0.9] and curve["samples"] == 6
    for before, one in zip([None, *tried], tried, strict=False):
        rising = before is None or one["measured"] <= before["measured"]
        assert one["predicted"] == pytest.approx(one["measured"], rel=1e-3) or not rising


def test_between_trials_and_beyond_them() -> None:
    anchors = anchors_of([(1.0, 4.0), (0.01, 0.02), (0.1, 0.3), (0.0, 0.0), (0.2, 0.2)])
    assert anchors == [(0.01, 0.02), (0.1, 0.3), (0.2, 0.3), (1.0, 4.0)]
    assert predicted(anchors, 0) == 0
    assert predicted(anchors, 0.001) == pytest.approx(0.002)  # in proportion
    assert predicted(anchors, 2.0) == pytest.approx(8.0)
    assert predicted(anchors, 0.01 * 10**0.5) == pytest.approx((0.02 * 0.3) ** 0.5)
    assert predicted([], 0.5) == 0.5


@pytest.mark.parametrize(("samples", "calibrated", "tried"), [(24, 24, 6), (512, 24, 6), (4, 4, 26), (30, 24, 6)])
def test_plans_are_tried_on_samples_that_nothing_is_calibrated_on(
    tiny_vit: Path, images: str, samples: int, calibrated: int, tried: int
) -> None:
    known = prepare(models.load(tiny_vit), Request(images, samples=samples), "cpu", apart=True)
    parts = [each.batch(range(each.size)).inputs for each in (known.encoded, known.tried)]
    assert [len(part) for part in parts] == [calibrated, tried]
    there = {tuple(image.flatten().tolist()) for image in parts[0]}
    assert len(there) == calibrated
    assert not there & {tuple(image.flatten().tolist()) for image in parts[1]}
    whole = prepare(models.load(tiny_vit), Request(images, samples=samples), "cpu")
    assert whole.tried is whole.encoded and whole.encoded.size == min(samples, 30)


class Noisy(nn.Module):
    """One matrix whose outputs are the logits: the second order of the divergence is all there is to know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(3 * 8 * 8, 48, bias=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x.flatten(1)))


def test_the_share_of_svd_is_the_mean_of_the_modules_squared_errors(tiny_vit: Path, tmp_path: Path) -> None:
    done = decompose(tiny_vit, ratio="0.5", method="svd", output_dir=tmp_path / "out").data
    errors = [row["error"] ** 2 for row in done["modules"]]
    assert done["predicted"]["unit"] == "relative squared error"
    assert done["predicted"]["value"] == pytest.approx(sum(errors) / len(errors), rel=1e-3)


def test_half_the_squared_losses_are_about_the_measured_divergence(images: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from peftc.store.source import Source

    save_file(Noisy().state_dict(), tmp_path / "noisy.safetensors")
    source = Source(
        "python:tests.factors.test_prediction:Noisy", weights=tmp_path / "noisy.safetensors", allow_code=True,
        preprocess={"input_size": [3, 8, 8], "mean": 0.5, "std": 0.5},
    )  # fmt: skip
    options: dict[str, Any] = {
        "include": ["mix"],
        "skip": ["head"],
        "settings": {"damping": 0.0},
        "task": "image-classification",
    }
    made = decompose(source, rank=2, data=images, output_dir=tmp_path / "small", **options, **CALIBRATED)
    predicted = made.data["predicted"]
    small = Source(str(tmp_path / "small"), allow_code=True)
    measured = evaluate(small, data=images, against=source, device="cpu").data["against"]["divergence"]["value"]
    assert predicted["unit"] == "nats per sample" and measured > 0
    assert 1 / 2 < predicted["apart"] / measured < 2


def test_a_dry_run_without_weights_predicts_nothing_and_says_so(tiny_vit: Path) -> None:
    report = decompose(tiny_vit, rank=4, dry_run=True)
    assert report.data["predicted"] is None
    assert any("without reading a weight" in note for note in report.notes)
    assert report.data["estimate"]["seconds"] > 0


def test_a_dry_run_estimates_more_for_more_work(tiny_vit: Path, images: str) -> None:
    plain = decompose(tiny_vit, ratio="0.5", dry_run=True).data["estimate"]
    calibrated = decompose(tiny_vit, ratio="0.5", dry_run=True, data=images, **CALIBRATED).data["estimate"]
    assert set(plain) == {"peak_memory_bytes", "seconds"}
    assert calibrated["peak_memory_bytes"] > plain["peak_memory_bytes"] > 0


def test_reports_are_json_and_say_that_it_is_a_prediction(peftc, tiny_vit: Path) -> None:
    found = peftc("analyze", tiny_vit, "--ratio", 0.5, "--json")
    assert found.exit_code == 0
    read = json.loads(found.stdout)
    assert read["curve"]["points"][-1]["predicted"] == 0 and read["plan"]["predicted"] > 0
    dry = peftc("decompose", tiny_vit, "--ratio", 0.5, "--dry-run", "--json")
    assert any("predicted loss, not measured" in note for note in json.loads(dry.stdout)["notes"])
