"""export --format hf-code: factors that transformers runs by the folder's own code, where peftc is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc.errors import ExportError
from peftc.formats import exported
from peftc.formats.exported import Exported
from peftc.formats.hf import hf
from peftc.formats.hf_code import hf_code
from peftc.formats.multiplied import multiplied
from peftc.models.load import load
from tests.forked import forked
from tests.formats.kinds import KINDS, factored, texts
from tests.networks import save_dual

QUICK: dict[str, Any] = {"rounds": 5, "batch_size": 2}
ALONE = """
import json, sys
from pathlib import Path
sys.modules["peftc"] = None
import torch, transformers
from safetensors.torch import load_file, save_file

def seen(network, inputs):
    with torch.inference_mode():
        value = network.eval()(**inputs)
        found = {"output": (value.logits if hasattr(value, "logits") else value[0]).contiguous()}
        if network.can_generate():
            options = {"max_new_tokens": 6, "do_sample": False}
            found["told"] = network.generate(**inputs, **options).contiguous()
            assert torch.equal(found["told"], network.generate(**inputs, **options, use_cache=False))
    return found

for line in sys.argv[1:]:
    auto, place = line.split("=", 1)
    auto, place = getattr(transformers, auto), Path(place)
    inputs = load_file(place / "inputs")
    for name in ("code", "again"):
        network, info = auto.from_pretrained(place / name, trust_remote_code=True, output_loading_info=True)
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        assert not wrong, wrong
        save_file(seen(network, inputs), place / f"{name}.seen")
        if name == "code":
            network.save_pretrained(place / "again")
            kinds = [type(module).__name__ for module in network.modules()]
            fresh = auto.from_config(network.config, trust_remote_code=True)
            assert [type(module).__name__ for module in fresh.modules()] == kinds
            assert [p.shape for p in fresh.parameters()] == [p.shape for p in network.parameters()]
            assert sum(kind.startswith("LowRank") for kind in kinds)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export one network of each kind, and load them all where peftc cannot be imported; return their places."""
    found, lines = {}, []
    for kind in KINDS:
        place = found[kind] = tmp_path_factory.mktemp("kind")
        auto = factored(kind, place)
        (place / "code").mkdir()
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # a process of its own for each takes long: one below loads them all
            patch.setattr(exported, "plain", lambda *_, **__: Exported("none", dict, dict))
            written = hf_code(load(place / "small"), {}, place / "code")
        (place / "factors").write_text(str(len(written.expected)))
        lines.append(f"{auto}={place}")
    modules = str(tmp_path_factory.mktemp("modules"))
    done = forked(*lines, code=ALONE, env={**os.environ, "HF_MODULES_CACHE": modules})
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_artifact_does_without_peftc(kind: str, places: dict[str, Path]) -> None:
    place = places[kind]
    inputs, network = load_file(place / "inputs"), peftc.load(place / "small")
    with torch.inference_mode():
        value = network(**inputs)
        expected = {"output": value.logits if hasattr(value, "logits") else value[0]}
        if getattr(network, "can_generate", bool)():
            expected["told"] = network.generate(**inputs, max_new_tokens=6, do_sample=False)
    for name in ("code", "again"):
        seen = load_file(place / f"{name}.seen")
        assert seen.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(seen[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_factors_and_nothing_else_also_when_saved_again(kind: str, places: dict[str, Path]) -> None:
    place = places[kind]
    names = {file: set(load_file(place / file / "model.safetensors")) for file in ("small", "code", "again")}
    older = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # as transformers 5.0 writes
    again = {re.sub("|".join(older), lambda found: older[found[0]], name) for name in names["again"]}
    assert names["small"] == names["code"] == again
    factors = [name for name in names["small"] if name.endswith((".up.weight", ".down.weight", ".core.weight"))]
    assert int((place / "factors").read_text()) == len(factors) > 0
    assert {"config.json", "modeling_factored.py"} <= {path.name for path in (place / "again").iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_multiplied_out_it_has_the_names_that_transformers_writes(
    kind: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported, "plain", lambda *_, **__: Exported("none", dict, dict))
    written = hf(multiplied(load(places[kind] / "small")), {}, tmp_path)
    assert any("before 5.0" in note for note in written.notes) == (kind == "causal, tied")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (places[kind] / "base", tmp_path))
    assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}


@pytest.mark.parametrize("is_factored", [True, False], ids=["a factored module", "another module"])
def test_a_transformers_with_other_modules_refuses_it_and_names_the_one_that_wrote_it(
    is_factored: bool, places: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    folder = shutil.copytree(places["vision"] / "code", tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    assert config["factored"]["transformers"] == transformers.__version__
    config["factored"]["transformers"] = "9.9"
    if is_factored:
        edits = config["factored"]["modules"]
        config["factored"]["modules"] = {f"{name}.other": edit for name, edit in edits.items()}
    else:
        weights = load_file(folder / "model.safetensors")
        save_file(
            {n: w for n, w in weights.items() if n != "classifier.bias"}, folder / "model.safetensors", {"format": "pt"}
        )
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"written with transformers 9\.9.*pip install transformers==9\.9"):
        transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)


def test_other_classes_do_not_fill_it_with_random_numbers(tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    peftc.decompose(tiny_bert, ratio=0.5, output_dir=tmp_path / "small")
    peftc.export(tmp_path / "small", format="hf-code", output_dir=tmp_path / "code", **QUICK)
    with pytest.raises((ValueError, OSError), match="low-rank factors|incorrect"):
        transformers.BertModel.from_pretrained(tmp_path / "code")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModel.from_pretrained(tmp_path / "code", trust_remote_code=False)
    again = peftc.load(peftc.Source(str(tmp_path / "code"), trust_remote_code=True))
    ids = texts()
    with torch.inference_mode():
        expected = peftc.load(tmp_path / "small")(**ids).last_hidden_state
        torch.testing.assert_close(again(**ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_peftc_is_named_in_the_code(kind: str, places: dict[str, Path]) -> None:
    text = (places[kind] / "code" / "modeling_factored.py").read_text()
    assert "import peftc" not in text and "from peftc" not in text
    assert max(map(len, text.splitlines())) <= 120
    words = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"]
    assert subprocess.run(words, input=text.encode(), stdout=sys.stderr).returncode == 0


def test_what_needs_no_code_or_cannot_have_it_is_refused(tiny_bert: Path, tiny_vit: Path, tmp_path: Path) -> None:
    cases = [(tiny_bert, "has no factors"), (tiny_vit, "use `--format timm`")]
    peftc.decompose(tiny_bert, ratio=0.5, output_dir=tmp_path / "small")
    for model, told in cases:
        with pytest.raises(ExportError) as caught:
            peftc.export(model, format="hf-code", output_dir=tmp_path / "code", **QUICK)
        assert told in str(caught.value)
    with pytest.raises(ExportError, match="its network is one of transformers") as caught:
        peftc.export(tmp_path / "small", format="timm", output_dir=tmp_path / "plain", **QUICK)
    assert "--format hf-code" in str(caught.value.hint)
    assert not (tmp_path / "code").exists()


@pytest.mark.usefixtures("quick_exports")
def test_a_dual_encoder_has_its_code_too(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    base = save_dual(tmp_path / "clip", "CLIPModel")
    peftc.decompose(base, ratio=0.5, output_dir=tmp_path / "small")
    report = peftc.export(tmp_path / "small", format="hf-code", output_dir=tmp_path / "code", **QUICK)
    assert report.data["deviation"] < 1e-4
