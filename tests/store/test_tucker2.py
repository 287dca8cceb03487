"""Artifacts that earlier versions wrote with `--conv-method tucker2`, which is gone, are models like any other.

`tucker2/` was written by the last version that had it, at `--ratio 0.5 --method svd`, of a small ResNet of transformers
that is not there any more.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftc
from peftc.errors import PlanError, UsageError
from peftc.models.load import load
from peftc.nn import lowrank

WRITTEN = Path(__file__).parent / "tucker2"
OUTPUTS = [  # of the version that wrote it
    [0.002432788, -0.104273468, 0.266310424, 0.385366440, -0.812211633, 0.105312124, -0.227328032, 0.039476506,
     0.382070035, -0.186356798],
    [0.144164741, 0.130130604, 0.436771840, 0.559433043, -0.409136117, 0.142464459, -0.335072219, 0.228683889,
     0.440099031, 0.047982287],
]  # fmt: skip


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def outputs(network: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return network(images()).logits


def test_it_gives_what_it_gave() -> None:
    network = peftc.load(WRITTEN)
    factored = [module for module in network.modules() if isinstance(module, lowrank.LowRankConv2d)]
    assert len(factored) == 3 and all(hasattr(module, "core") for module in factored)
    torch.testing.assert_close(outputs(network), torch.tensor(OUTPUTS), rtol=1e-5, atol=1e-6)


def test_it_is_shown_with_its_pairs_of_ranks(peftc) -> None:
    shown = peftc("show", WRITTEN)
    assert shown.exit_code == 0 and "tucker2" in shown.stderr and "2x2" in shown.stderr
    assert "--conv-method tucker2" in peftc("show", WRITTEN, "--commands").stdout


def test_it_is_evaluated(tmp_path: Path) -> None:
    copied = shutil.copytree(WRITTEN, tmp_path / "tucker2")  # what was measured is kept beside the model
    found = peftc.evaluate(copied, data="sklearn:digits", num_samples=100, device="cpu").data
    assert found["metrics"]["top5"]["value"] == 0.46


def test_it_is_exported_as_it_is_and_multiplied_out(tmp_path: Path) -> None:
    peftc.export(WRITTEN, format="safetensors", output_dir=tmp_path / "tensors")
    peftc.export(WRITTEN, format="torch-export", output_dir=tmp_path / "graph", rounds=5, image_size=32)
    peftc.export(WRITTEN, format="hf", dense=True, output_dir=tmp_path / "dense")
    tensors = load_file(tmp_path / "tensors" / "model.safetensors")
    assert sum(name.endswith(".core.weight") for name in tensors) == 3
    program = torch.export.load(next((tmp_path / "graph").glob("*.pt2"))).module()
    torch.testing.assert_close(program(images()[:1]), torch.tensor(OUTPUTS[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(load(tmp_path / "dense").module), torch.tensor(OUTPUTS), rtol=1e-4, atol=1e-5)


def test_nothing_is_made_as_tucker2_any_more(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown value `tucker2` for `--conv-method`"):
        peftc.decompose(WRITTEN, ratio=0.5, conv_method="tucker2", output_dir=tmp_path / "out")
    plan = {"schema_version": 1, "ranks": {"conv": [2, 3]}, "forms": {"conv": "tucker2"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=r"gives `conv` the rank \[2, 3\]"):
        peftc.decompose(WRITTEN, plan=tmp_path / "plan.json", output_dir=tmp_path / "out")


def test_a_core_that_is_damaged_is_refused(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN, tmp_path / "bad")
    content = bytearray((tmp_path / "bad" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "bad" / "model.safetensors").write_bytes(content)
    with pytest.raises(peftc.PeftcError):
        peftc.load(tmp_path / "bad")
