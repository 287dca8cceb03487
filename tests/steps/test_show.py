"""Show prints an artifact without torch, and its command lines rebuild it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import ArtifactError, PeftcError, SourceError
from peftc.report import span
from peftc.steps.decompose import decompose
from peftc.steps.show import show
from tests.conftest import promised

PROBE = """
import sys
from peftc.steps.show import show
report = show(sys.argv[1])
assert report.tables and report.data["commands"]
print(sorted({"torch", "timm", "transformers", "numpy", "safetensors"} & sys.modules.keys()))
"""


@pytest.fixture
def small(tiny_vit: Path, tmp_path: Path) -> Path:
    decompose(tiny_vit, output_dir=tmp_path / "small", ratio=0.5)
    return tmp_path / "small"


def test_show_imports_nothing_heavy(small: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, str(small)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_what_show_says_is_what_the_folder_holds(small: Path, tiny_vit: Path) -> None:
    from safetensors.torch import load_file

    report = show(small)
    stored = load_file(small / "model.safetensors")
    facts: dict[str, Any] = {row[0]: row[1] for row in report.tables[0].rows}
    assert report.data["tensors"] == len(stored) and str(len(stored)) in facts["weights"]
    assert facts["parameters"].replace(",", "") == str(sum(t.numel() for t in stored.values()))
    assert facts["from"] == str(tiny_vit) and "vit_tiny_patch16_224" in facts["base"]
    ranks = {n.removesuffix(".up.weight"): t.shape[1] for n, t in stored.items() if n.endswith("up.weight")}
    assert {name: edit["rank"] for name, edit in report.data["manifest"]["modules"].items()} == ranks
    kinds = {row[0]: row[1:] for row in report.tables[1].rows}
    qkv = sorted(rank for name, rank in ranks.items() if name.endswith("qkv"))
    assert kinds["blocks.*.attn.qkv"] == [len(qkv), "linear", span([str(rank) for rank in qkv])]


REQUESTS: dict[str, list[str]] = {
    "ratio": ["--ratio", "2/3", "--allocation", "uniform", "--skip", "blocks.0", "--seed", "3"],
    "rank": ["--rank", "4", "--include", "head", "--include", "patch_embed", "--conv-method", "channel"],
    "energy": ["--energy", "0.9"],
    "target": ["--target-params", "20k"],
    "macs": ["--target-macs", "400k", "--allocation", "energy"],
    "multiple": ["--ratio", "0.5", "--rank-multiple", "4"],
    "shards": ["--ratio", "0.5", "--max-shard-size", "20kB"],
}


@pytest.mark.parametrize("words", REQUESTS.values(), ids=REQUESTS)
def test_the_printed_commands_rebuild_the_artifact(
    peftc, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = peftc("decompose", tiny_vit, *words, "-o", "small")
    assert result.exit_code == 0, result.stderr
    for line in peftc("show", "small", "--commands").stdout.splitlines():
        again = peftc(*shlex.split(line)[1:])
        assert again.exit_code == 0, (line, again.stderr)
    assert promised(tmp_path / "01-decompose") == promised(tmp_path / "small")


def test_the_commands_of_two_steps_on_code_of_ones_own_rebuild_both(
    peftc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tests.networks import HERE, Perceptron

    monkeypatch.chdir(tmp_path)
    torch.save(Perceptron(width=80).state_dict(), tmp_path / "it's.pth")
    words = [f"{HERE}:Perceptron", "--arch-set", "width=80", "--weights", "it's.pth", "--allow-code"]
    assert peftc("decompose", *words, "--ratio", 0.5, "--skip", "first", "-o", "one").exit_code == 0
    assert peftc("decompose", "one", "--allow-code", "--ratio", 0.5, "-o", "two").exit_code == 0
    lines = peftc("show", "two", "--commands").stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        again = peftc(*shlex.split(line)[1:])
        assert again.exit_code == 0, (line, again.stderr)
    assert promised(tmp_path / "01-decompose") == promised(tmp_path / "one")
    assert promised(tmp_path / "02-decompose") == promised(tmp_path / "two")


def test_show_prints_facts_to_people_and_one_object_to_machines(peftc, small: Path) -> None:
    plain, machine = peftc("show", small), peftc("show", small, "--json")
    assert plain.stdout == f"{small}\n" and "blocks.*.attn.qkv" in plain.stderr
    told = json.loads(machine.stdout)
    assert told["manifest"]["parameters"] and told["commands"][0].startswith("peftc decompose ")


@pytest.mark.parametrize("model", ["nowhere", "timm/vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", "."])
def test_what_is_no_artifact_is_refused(peftc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ArtifactError, SourceError)):  # the second where a hub that cannot be asked might have one
        show(model)
    result = peftc("show", model)
    assert (result.exit_code, result.stdout) == (1, "") and "Traceback" not in result.stderr


def test_a_folder_with_files_that_do_not_fit_its_manifest_is_refused(small: Path) -> None:
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(PeftcError, match="its manifest says"):
        show(small)
    weights.unlink()
    with pytest.raises(PeftcError, match=r"lacks the file `model\.safetensors`"):
        show(small)
