"""Decompose keeps within its budget, whichever it is, and comes close to it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftc.errors import PlanError
from peftc.measure import costs
from peftc.models import load as models
from peftc.steps.analyze import analyze
from peftc.steps.decompose import decompose
from tests.networks import NETWORKS, perceptron, ranks


def test_more_budget_is_never_worse(made) -> None:
    for name in ("vit", "resnet-channel"):
        reports = [decompose(made(name)[0], ratio=ratio, dry_run=True) for ratio in ("1/5", "2/5", 0.6, 0.8, 1)]
        kept = [report.data["size"]["after"]["parameters"] for report in reports]
        assert kept == sorted(kept) and len(set(kept)) == len(kept)
        for report, ratio in zip(reports, (0.2, 0.4, 0.6, 0.8, 1), strict=True):
            assert report.data["ratio"]["eligible"] <= ratio


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("name", ["vit", "gpt2-embedding", "llama-head", "resnet-channel", "resnet-spatial"])
def test_a_target_of_macs_is_never_exceeded(made, tmp_path: Path, name: str, allocation: str) -> None:
    source, _, report = made(name)
    target = (report.data["size"]["before"]["macs"] + 2 * report.data["size"]["after"]["macs"]) // 3
    options = NETWORKS[name][3]
    report = decompose(source, output_dir=tmp_path / "out", target_macs=target, allocation=allocation, **options)
    found = costs.work(models.load(tmp_path / "out")).macs
    assert found == report.data["size"]["after"]["macs"]
    assert found <= target


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_target_of_parameters_is_reached_within_one_rank_and_never_exceeded(made, allocation: str) -> None:
    source, _, full = made("vit")
    smallest = decompose(source, rank=1, dry_run=True).data["size"]["after"]["parameters"]
    largest = full.data["size"]["before"]["parameters"]
    step = 128 if allocation == "global" else 2 * sum({"qkv": 128, "proj": 64, "fc1": 160, "fc2": 160}.values())
    for target in range(smallest + 1, largest * 2 // 3, (largest - smallest) // 5):
        after = decompose(source, target_params=target, allocation=allocation, dry_run=True).data["size"]["after"]
        assert target - step <= after["parameters"] <= target, (target, after)


def test_a_target_out_of_reach_says_what_is(tiny_vit: Path) -> None:
    for option in ("target_params", "target_macs"):
        with pytest.raises(PlanError, match="out of reach") as caught:
            decompose(tiny_vit, dry_run=True, **{option: 10})
        assert "ask for more than" in str(caught.value)


def test_a_target_out_of_reach_names_the_largest_modules_that_were_not_eligible(tiny_bert: Path) -> None:
    for step, how in ((decompose, {"dry_run": True}), (analyze, {})):
        with pytest.raises(PlanError, match="out of reach") as caught:
            step(tiny_bert, target_params=10, **how)
        assert "the largest that were not eligible: `--include embeddings." in str(caught.value)
    with pytest.raises(PlanError, match="out of reach") as caught:
        decompose(tiny_bert, target_params=10, skip=["embeddings", "pooler"], dry_run=True)
    assert "that were not" not in str(caught.value)


def test_an_embedding_that_is_cut_deep_without_data_is_said(tiny_bert: Path) -> None:
    words = {"include": ["word_embeddings"], "dry_run": True}
    least = decompose(tiny_bert, rank=1, **words).data["size"]["after"]["parameters"]
    deep = decompose(tiny_bert, target_params=least + 1, **words)
    (told,) = [text for text in deep.warnings if "embedding" in text]
    assert told.startswith("`embeddings.word_embeddings` keeps ") and "`--data DATA`" in told
    assert not decompose(tiny_bert, ratio=0.5, allocation="uniform", **words).warnings


def test_an_energy_is_kept_in_each_module_by_the_smallest_rank(tmp_path: Path) -> None:
    def steep(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t @ torch.diag(0.8 ** torch.arange(t.shape[1])) for n, t in state.items() if t.ndim == 2}

    source = perceptron(tmp_path, steep)
    report = decompose(source, output_dir=tmp_path / "out", energy=0.9)
    for row in report.data["modules"]:
        values = torch.linalg.svdvals(
            models.load(source).module.state_dict()[f"{row['name']}.weight"].double()
        ).square()
        kept = values.cumsum(0) / values.sum()
        assert kept[row["rank"] - 1] >= 0.9 > (kept[row["rank"] - 2] if row["rank"] > 1 else 0)


def test_ratio_one_leaves_everything_dense_and_says_so(tiny_vit: Path, tmp_path: Path) -> None:
    report = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=1)
    assert not any(ranks(report).values()) and any("no module was factored" in text for text in report.warnings)
    before, after = load_file(tiny_vit / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
