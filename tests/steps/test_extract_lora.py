"""extract-lora: the difference of two checkpoints is a delta on the first."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc.errors import PeftcError, PlanError
from peftc.store import manifest
from tests.steps.test_finetune import few, tune  # noqa: F401


@pytest.fixture
def tuned(tiny_vit: Path, few: Path, tmp_path: Path) -> Path:  # noqa: F811
    tune(tiny_vit, few, tmp_path / "tuned", settings={"rank": 2})
    return tmp_path / "tuned"


def test_a_low_rank_difference_is_found_again(tuned: Path, tiny_vit: Path, tmp_path: Path) -> None:
    report = peftc.extract_lora(tuned, against=tiny_vit, output_dir=tmp_path / "delta", rank=2)
    assert min(report.data["energy"].values()) > 0.9999
    record = manifest.read(tmp_path / "delta")
    assert (
        len(record.adapters) == 8
        and record.delta["source"]["spec"] == str(tiny_vit)
        and record.labels == ["0", "1", "2"]
    )
    (line,) = peftc.show(tmp_path / "delta", commands=True).lines
    assert line == f"peftc extract-lora TUNED {tiny_vit} --rank 2 -o 01-extract-lora"
    held = load_file(tmp_path / "delta" / "model.safetensors")
    assert {name for name in held if ".update." not in name} == {"head.weight", "head.bias"}
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            peftc.load(tmp_path / "delta")(image), peftc.load(tuned)(image), atol=1e-4, rtol=1e-3
        )


def test_a_rank_too_small_is_said_and_other_tensors_come_whole(tiny_vit: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_vit, tmp_path / "other"))
    torch.manual_seed(0)
    state = load_file(other / "model.safetensors")
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"):
        state[name] = state[name] + 0.1 * torch.randn_like(state[name])
    save_file(state, other / "model.safetensors", {"format": "pt"})
    report = peftc.extract_lora(other, against=tiny_vit, output_dir=tmp_path / "delta", rank=1)
    assert set(report.data["energy"]) == {"blocks.0.attn.qkv"} and report.data["energy"]["blocks.0.attn.qkv"] < 0.5
    assert any("keeps less than half" in warning for warning in report.warnings)
    held = load_file(tmp_path / "delta" / "model.safetensors")
    assert {name for name in held if ".update." not in name} == {"blocks.0.norm1.weight"}
    assert torch.equal(held["blocks.0.norm1.weight"], state["blocks.0.norm1.weight"])


def test_models_of_two_architectures_are_refused(tiny_vit: Path, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not of one architecture"):
        peftc.extract_lora(tiny_vit, against=tiny_bert, output_dir=tmp_path / "delta")
    assert not list(tmp_path.glob("delta*"))


def test_the_command_takes_both_models(peftc: Any, tuned: Path, tiny_vit: Path, tmp_path: Path) -> None:
    done = peftc("extract-lora", tuned, tiny_vit, "--rank", 2, "-o", tmp_path / "delta")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "delta")


def test_equal_models_have_no_difference(tiny_vit: Path, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="do not differ"):
        peftc.extract_lora(tiny_vit, against=tiny_vit, output_dir=tmp_path / "delta")
