"""Analyze measures what torch's own decomposition says, plans what decompose does, and never holds the model."""

import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftc.errors import PlanError, UsageError, WeightError
from peftc.models import load as models
from peftc.nn import lowrank
from peftc.steps.analyze import analyze
from peftc.steps.decompose import decompose
from peftc.store.source import Source

HERE = "python:tests.steps.test_analyze"
PNG = b"\x89PNG\r\n\x1a\n"


class Norm(nn.Module):
    """Nothing to factor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Tables(nn.Module):
    """Many tables: large, but quick to analyze."""

    def __init__(self, words: int = 40_000, count: int = 40) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(words, 16) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([table(x) for table in self.tables]).sum(0)


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_resnet", "tiny_bert", "tiny_llama"])
@pytest.mark.parametrize("conv_method", ["channel", "spatial"])
def test_every_figure_is_that_of_torchs_own_decomposition(request, model: str, conv_method: str) -> None:
    if conv_method == "spatial" and model != "tiny_resnet":
        pytest.skip("it has no convolution that differs")
    folder = request.getfixturevalue(model)
    report = analyze(folder, conv_method=conv_method)
    network = models.load(folder).module
    for row in report.data["modules"]:
        weight = network.get_submodule(row["name"]).weight
        matrix = lowrank.matrix(weight.detach().double(), row["form"])  # type: ignore[arg-type, union-attr]
        values = torch.linalg.svdvals(matrix)
        energy, share = values.square(), values / values.sum()
        kept = energy.cumsum(0) / energy.sum()
        out, in_ = matrix.shape
        assert row["parameters"] == weight.numel() and row["shape"] == list(weight.shape)  # type: ignore[union-attr, operator]
        assert row["max_rank"] == min(out, in_) == len(values)
        assert row["break_even_rank"] * (out + in_) < out * in_ or row["max_rank"] == row["break_even_rank"]
        assert (row["break_even_rank"] + 1) * (out + in_) >= out * in_ or row["max_rank"] == row["break_even_rank"]
        assert row["effective_rank"] == pytest.approx(
            float((-(share * share.clamp_min(1e-300).log()).sum()).exp()), rel=1e-3
        )
        assert row["stable_rank"] == pytest.approx(float(energy.sum() / energy[0]), rel=1e-5)
        assert row["largest"] == pytest.approx(float(values[0]), rel=1e-6)
        assert abs(row["smallest"] ** 2 - float(energy[-1])) <= 64 * torch.finfo(torch.float32).eps * float(energy[0])
        for level in (90, 95, 99):
            rank = row[f"rank_{level}"]
            assert kept[rank - 1] >= level / 100 - 1e-9
            assert rank == 1 or kept[rank - 2] < level / 100 + 1e-9
    assert report.data["parameters"] == sum(p.numel() for p in network.parameters())


def test_every_linear_conv_and_embedding_is_there_once(tiny_llama: Path, tiny_resnet: Path) -> None:
    for folder in (tiny_llama, tiny_resnet):
        network = models.load(folder).module
        kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
        weights = {id(m.weight) for m in network.modules() if isinstance(m, kinds)}
        rows = analyze(folder).data["modules"]
        assert len(rows) == len({row["name"] for row in rows}) == len(weights)
        assert sum(row["share"] for row in rows) <= 1
        assert any(row["eligible"] for row in rows)
        assert all(row["eligible"] == (row["reason"] is None) for row in rows)


def test_the_plan_says_what_decompose_does(tiny_vit: Path, tiny_resnet: Path, tmp_path: Path) -> None:
    for model, options in (
        (tiny_vit, {}),
        (tiny_resnet, {"conv_method": "channel"}),
        (tiny_vit, {"allocation": "uniform"}),
    ):
        plan, out = (
            tmp_path / f"{model.name}{len(options)}{len(str(options))}.json",
            tmp_path / f"{model.name}{options}",
        )
        report = analyze(model, plan=plan, ratio="3/5", **options)  # type: ignore[arg-type]
        assert report.artifact == plan
        done = decompose(model, output_dir=out, ratio="3/5", **options)  # type: ignore[arg-type]
        assert json.loads(plan.read_text())["ranks"] == {row["name"]: row["rank"] for row in done.data["modules"]}
        assert report.data["plan"]["parameters"] == done.data["size"]["after"]["parameters"]


def test_a_plan_without_a_budget_keeps_half_and_says_so(tiny_vit: Path, tmp_path: Path) -> None:
    report = analyze(tiny_vit, plan=tmp_path / "plan.json")
    assert any("--ratio 0.5" in note for note in report.notes)
    assert 0.4 < report.data["plan"]["eligible"] <= 0.5
    assert "plan" not in analyze(tiny_vit).data


def test_an_edited_plan_is_followed_and_a_wrong_one_refused(tiny_vit: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    analyze(tiny_vit, plan=path, rank=4)
    plan = json.loads(path.read_text())
    plan["ranks"]["blocks.0.attn.qkv"], plan["ranks"]["blocks.1.mlp.fc1"] = 7, None
    path.write_text(json.dumps(plan))
    decompose(tiny_vit, output_dir=tmp_path / "out", plan=path)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["blocks.0.attn.qkv.down.weight"].shape == (7, 32) and "blocks.1.mlp.fc1.weight" in stored
    for name, rank, text in (
        ("nowhere", 3, "`nowhere`"),
        ("blocks.0.attn.qkv", 1000, "rank 1000"),
        ("blocks.0.attn.qkv", "x", "rank 'x'"),
    ):
        path.write_text(json.dumps({**plan, "ranks": {name: rank}}))
        with pytest.raises(PlanError, match=text):
            decompose(tiny_vit, output_dir=tmp_path / "no", plan=path)
    assert not (tmp_path / "no").exists()


def test_spectra_are_drawn(tiny_vit: Path, tmp_path: Path) -> None:
    analyze(tiny_vit, plot=tmp_path / "spectra.svg")
    pytest.importorskip("matplotlib")
    analyze(tiny_vit, plot=tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(PNG)
    assert "<svg" in (tmp_path / "spectra.svg").read_text()[:1000]


def test_pixels_alone_need_matplotlib(tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    analyze(tiny_vit, plot=tmp_path / "spectra.svg")
    with pytest.raises(UsageError, match=r"need matplotlib(?s:.*)peftc\[report\]"):
        analyze(tiny_vit, plot=tmp_path / "spectra.png")


def test_a_picture_shows_the_curve_below_the_spectra(tiny_vit: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    analyze(tiny_vit, ratio=0.5, plot=tmp_path / "both.svg")
    analyze(tiny_vit, ratio=0.5, plot=tmp_path / "both.png")
    words = (tmp_path / "both.svg").read_text()
    assert ">plan</text>" in words and ">multiply-adds of one sample (linear)</text>" in words
    below = imread(tmp_path / "both.png")[-400:, :, :3]  # where the curve is
    assert float(below.std()) > 0.05 and len({tuple(p) for p in below.reshape(-1, 3).tolist()}) > 50


def test_data_that_calibrate_nothing_are_refused(tiny_vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`--method svd` takes the weights alone"):
        analyze(tiny_vit, method="svd", data=str(tmp_path))
    with pytest.raises(UsageError, match="needs second_moment"):
        analyze(tiny_vit, method="kfac")
    with pytest.raises(UsageError, match="of no use here"):
        analyze(tiny_vit, method="svd", statistics=tmp_path)


def test_analysis_holds_no_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"tables.{i}.weight": torch.randn(40_000, 16) for i in range(40)}  # 102 MB
    save_file(state, tmp_path / "tables.safetensors")
    del state
    source = Source(f"{HERE}:Tables", weights=tmp_path / "tables.safetensors", allow_code=True)
    analyze(source)  # what it imports is not counted
    peaks, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks.append(_anonymous())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert len(analyze(source).data["modules"]) == 40
    finally:
        done.set()
        watcher.join()
    assert max(peaks) - peaks[0] < 40_000_000


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell how much memory is anonymous")


@pytest.mark.parametrize("weight", ["zero", "rank 2"])
def test_weights_of_low_rank_have_sound_figures(tmp_path: Path, weight: str) -> None:
    torch.manual_seed(0)
    low = torch.zeros(16, 40) if weight == "zero" else torch.randn(16, 2) @ torch.randn(2, 40)
    save_file({f"tables.{i}.weight": low.T.contiguous() for i in range(2)}, tmp_path / "low.safetensors")
    source = Source(f"{HERE}:Tables", weights=tmp_path / "low.safetensors", arch_set={"words": 40, "count": 2})
    rows = analyze(source).data["modules"]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    expected = 0 if weight == "zero" else 2
    assert all(row["rank_99"] <= expected and row["effective_rank"] <= expected + 1e-3 for row in rows)


def test_a_network_without_any_matrix_gives_an_empty_table() -> None:
    report = analyze(Source(f"{HERE}:Norm"))
    assert report.data["modules"] == [] and report.data["parameters"] == 16


def test_nothing_is_written_when_it_is_refused(tiny_vit: Path, tmp_path: Path) -> None:
    plan, plot = tmp_path / "plan.json", tmp_path / "s.png"
    refused: list[dict[str, Any]] = [
        {"ratio": 0},
        {"ratio": 1.5},
        {"ratio": math.nan},
        {"ratio": 0.5, "rank": 3},
        {"allocation": "fair"},
        {"include": ["nowhere"]},
        {"plot": tmp_path / "s.gif"},
        {"plot": tmp_path / "no" / "s.png"},
        {"plan": tmp_path / "no" / "p.json"},
    ]
    for options in refused:
        with pytest.raises(UsageError):
            analyze(tiny_vit, **{"plan": plan, "plot": plot, **options})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    broken = torch.zeros(40, 16)
    broken[3, 3] = math.inf
    save_file({"tables.0.weight": broken}, tmp_path / "b.safetensors")
    source = Source(f"{HERE}:Tables", weights=tmp_path / "b.safetensors", arch_set={"words": 40, "count": 1})
    with pytest.raises(WeightError, match=r"`tables\.0\.weight`"):
        analyze(source)


def test_the_command_prints_a_table_and_json(peftc, tiny_resnet: Path) -> None:
    plain, machine = peftc("analyze", tiny_resnet), peftc("analyze", tiny_resnet, "--json")
    assert plain.exit_code == machine.exit_code == 0
    assert "break-even" in plain.stderr and "depthwise" not in plain.stderr
    assert json.loads(machine.stdout)["modules"][0]["name"] == "conv1"
