"""The trained models of the data folder: published figures are met, and every artifact reloads elsewhere as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc import Source
from peftc.models import load as models
from peftc.models.inputs import outputs, probe
from peftc.models.place import runnable
from peftc.steps.decompose import decompose
from peftc.steps.evaluate import evaluate
from tests.forked import forked

pytestmark = pytest.mark.real
EXAMPLES = Path(__file__).parents[2] / "examples"


def sources(data: Path, minilm: Path) -> dict[str, Source]:
    weights = data / "weights"
    resnet = {"arch_set": {"depth": 20}, "weights": weights / "resnet_cifar10/resnet20-12fca82f.th", "allow_code": True}
    mobilenet: dict[str, Any] = {"arch": "timm:mobilenetv2_100", "arch_set": {"pad_type": "same", "bn_eps": 1e-3}}
    return {
        "vit": Source(str(weights / "vit_tiny_patch16_224/model.safetensors"), arch="timm:vit_tiny_patch16_224"),
        "mobilenet": Source(str(weights / "mobilenetv2_100/model.safetensors"), **mobilenet),
        "resnet": Source("python:cifar_resnet:CifarResNet", **resnet),
        "llama": Source(str(weights / "stories260K")),
        "minilm": Source(str(minilm)),
    }


@pytest.mark.parametrize(
    ("allocation", "ratio", "expected"),
    [("uniform", "0.5", 0.731), ("uniform", "0.75", 0.786), ("global", "0.5", 0.746), ("global", "0.75", 0.801)],
)
def test_minilm_keeps_the_spearman_that_was_measured_independently(
    allocation: str, ratio: str, expected: float, data_folder: Path, minilm: Path, tmp_path: Path
) -> None:
    made = decompose(minilm, output_dir=tmp_path / "small", ratio=ratio, allocation=allocation)
    assert len(made.data["modules"]) == 36
    seen = evaluate(tmp_path / "small", data=str(data_folder / "sets/stsb_en/stsb-en-test.csv"))
    assert seen.data["metrics"]["spearman"]["value"] == pytest.approx(expected, abs=0.01)


RELOAD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from peftc import Source
from peftc.models import load as models
from peftc.models.inputs import outputs, probe
from peftc.models.place import runnable
digests = {}
for folder in sys.argv[2:]:
    model = runnable(models.load(Source(folder, allow_code=True)), device="cpu")
    digests[folder] = outputs(model, probe(model)).double().flatten()[:64].tolist()
print(json.dumps(digests))
"""


def test_every_trained_model_reloads_in_a_fresh_process_with_identical_outputs(
    data_folder: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    expected = {}
    for name, source in sources(data_folder, minilm).items():
        folder = tmp_path / name
        report = decompose(source, output_dir=folder, ratio=0.5)
        assert report.data["ratio"]["eligible"] <= 0.5
        assert all(row["excess"] is None or row["excess"] <= 1e-6 for row in report.data["modules"])
        assert report.data["size"]["after"]["bytes"] < report.data["size"]["before"]["bytes"]
        model = runnable(models.load(Source(str(folder), allow_code=True)), device="cpu")
        expected[str(folder)] = outputs(model, probe(model)).double().flatten()[:64].tolist()
    threads = str(torch.get_num_threads())
    run = forked(EXAMPLES, *expected, code=RELOAD, env={**os.environ, "OMP_NUM_THREADS": threads})
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == expected
