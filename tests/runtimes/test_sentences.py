"""Folders of sentence-transformers: their parts travel, and the library encodes what peftc made smaller."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import peftc
from peftc.errors import ExportError, SourceError
from peftc.models.hub import SMALL
from peftc.steps.push import push_to_hub
from peftc.store import manifest
from peftc.tasks.sentences import sentence_vectors
from tests.conftest import TEXTS
from tests.hub_server import Hub
from tests.networks import BERT, save_transformers

QUICK: dict[str, Any] = {"rounds": 5, "batch_size": 1}
MISSING = "sentence-transformers is not installed: `pip install sentence-transformers`"
KIND = "sentence_transformers.models."
PARTS = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}


def save_sentences(folder: Path) -> Path:
    """Write a BERT that pools, multiplies with a matrix, and normalises."""
    save_transformers(folder, "BertModel", **BERT, initializer_range=0.2)
    names = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": KIND + kind}
        for at, (path, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    for part, config in {
        "1_Pooling": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "2_Dense": {
            "in_features": 32,
            "out_features": 8,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    }.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, folder / "2_Dense/model.safetensors")
    (folder / "2_Dense/notes.txt").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentences(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="module")
def small(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "small"
    peftc.decompose(base, ratio=0.5, output_dir=folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# parts travel


def test_the_parts_of_a_model_travel_with_each_step(base: Path, small: Path, tmp_path: Path) -> None:
    peftc.prune_layers(small, drop="0", output_dir=tmp_path / "shorter", device="cpu")
    for folder in (small, tmp_path / "shorter"):
        record = manifest.read(folder)
        assert (
            PARTS == {name for name in files(folder) if "/" in name} == {name for name in record.files if "/" in name}
        )
        for name in PARTS:
            assert (folder / name).read_bytes() == (base / name).read_bytes()
        assert record.weight_files == ["model.safetensors"]
    assert peftc.load(small).config.num_hidden_layers == 2
    (small / "1_Pooling/config.json").rename(small / "elsewhere")
    try:
        with pytest.raises(peftc.PeftcError, match="lacks the file `1_Pooling/config.json`"):
            peftc.load(small)
    finally:
        (small / "elsewhere").rename(small / "1_Pooling/config.json")


@pytest.mark.usefixtures("quick_exports")
def test_and_with_an_export(small: Path, tmp_path: Path) -> None:
    report = peftc.export(small, format="safetensors", output_dir=tmp_path / "out", **QUICK)
    assert files(tmp_path / "out") >= PARTS
    assert report.data["files"].keys() >= PARTS
    assert report.data["bytes"] == sum(
        (tmp_path / "out" / name).stat().st_size for name in files(tmp_path / "out") - {"export.json", "result.json"}
    )


@pytest.mark.filterwarnings("ignore:Use 'content=")
def test_to_a_hub_and_from_there(hub: Hub, base: Path, small: Path, tmp_path: Path) -> None:
    push_to_hub(small, "me/small")
    assert hub.repos["me/small"].commits[-1][1].keys() >= PARTS
    peftc.prune_layers("me/small", drop="0", output_dir=tmp_path / "again", device="cpu")
    assert files(tmp_path / "again") >= PARTS
    hub.add("me/base", {name: (base / name).read_bytes() for name in files(base)})
    peftc.decompose("me/base", ratio=0.5, output_dir=tmp_path / "small")
    assert files(tmp_path / "small") >= PARTS and "*.json" in SMALL


@pytest.mark.parametrize("part", ["..", "../secret", "/etc", "a/b"])
def test_a_part_outside_the_folder_is_refused(part: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/modules.json").write_text(json.dumps([{"path": part}]))
    with pytest.raises(SourceError, match="which is no folder beside it"):
        peftc.load(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", '{"path": ".."}', '["1_Pooling"]'])
def test_another_file_of_that_name_is_nobody_s_business(text: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/modules.json").write_text(text)
    peftc.decompose(tmp_path / "model", ratio=0.5, output_dir=tmp_path / "small")
    assert not any("/" in name for name in files(tmp_path / "small"))


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_part_that_is_a_link_to_somewhere_else_is_refused(is_folder: bool, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/config.json").write_text("{}")
    place = tmp_path / "model/1_Pooling"
    shutil.rmtree(place)
    if is_folder:
        place.symlink_to(tmp_path / "secret")
    else:
        place.mkdir()
        (place / "config.json").symlink_to(tmp_path / "secret/config.json")
    with pytest.raises(SourceError, match="a link that leaves its folder"):
        peftc.load(tmp_path / "model")


# sentence-transformers encodes

ENCODE = """
import json, sys
place, first = sys.argv[1:3]
folders = sys.argv[3:]
if first != "none":
    __import__(first)
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
texts = json.load(open(f"{place}/texts.json"))
found = {}
for at, folder in enumerate(folders):
    model = SentenceTransformer(folder, device="cpu")
    found[str(at)] = model.encode(texts, convert_to_tensor=True)
    if first != "none":
        model.save_pretrained(f"{place}/again{at}")
        again = SentenceTransformer(f"{place}/again{at}", device="cpu").encode(texts, convert_to_tensor=True)
        assert torch.equal(found[str(at)], again)
save_file(found, f"{place}/vectors")
"""


def encoded(place: Path, first: str, *folders: Any, **how: Any) -> subprocess.CompletedProcess[str]:
    (place / "texts.json").write_text(json.dumps(TEXTS))
    line = [sys.executable, "-c", ENCODE, place, first, *map(str, folders)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"}, **how)


def vectors(place: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(place / "vectors")


def expected(folder: Path) -> torch.Tensor:
    """Return what peftc's network gives, pooled, multiplied and normalised by hand."""
    import transformers
    from safetensors.torch import load_file

    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        hidden = peftc.load(folder)(**tokens).last_hidden_state
    weights = tokens["attention_mask"][..., None].float()
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    matrix = load_file(folder / "2_Dense/model.safetensors")["linear.weight"]
    return torch.nn.functional.normalize(pooled @ matrix.T, dim=1)


needs_library = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason=MISSING)


@needs_library
def test_it_encodes_with_factors_after_the_import_and_not_before(small: Path, tmp_path: Path) -> None:
    peftc.export(small, format="hf", output_dir=tmp_path / "kept", **QUICK)
    done = encoded(tmp_path, "peftc.transformers", small, tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    for found in vectors(tmp_path).values():
        torch.testing.assert_close(found, expected(small), rtol=0, atol=1e-6)
    done = encoded(tmp_path, "none", small)
    assert done.returncode and "import peftc.transformers" in done.stderr


@needs_library
def test_it_encodes_a_dense_export_without_peftc(small: Path, tmp_path: Path) -> None:
    report = peftc.export(small, format="hf", dense=True, output_dir=tmp_path / "plain", **QUICK)
    (note,) = [note for note in report.notes if note.startswith("sentence-transformers")]
    assert "without peftc loads it too" in note
    done = encoded(tmp_path, "none", tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(vectors(tmp_path)["0"], expected(small), rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.filterwarnings("ignore:Use 'content=")
def test_it_encodes_by_the_id_of_a_hub(hub: Hub, small: Path, tmp_path: Path) -> None:
    push_to_hub(small, "me/small")
    done = encoded(tmp_path, "peftc.transformers", "me/small")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(vectors(tmp_path)["0"], expected(small), rtol=0, atol=1e-6)


@needs_library
def test_an_export_that_the_library_does_not_load_is_none(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/2_Dense/config.json").write_text('{"in_features": 31}')
    with pytest.raises(ExportError, match="sentence_transformers does not load what was written"):
        peftc.export(tmp_path / "model", format="hf", output_dir=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_exports")
def test_an_export_says_that_the_library_was_not_asked(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftc.formats import exported

    monkeypatch.setattr(
        exported, "find_spec", lambda name: None if name == "sentence_transformers" else find_spec(name)
    )
    report = peftc.export(small, format="hf", dense=True, output_dir=tmp_path / "plain", **QUICK)
    assert any("sentence-transformers, which is not installed" in note for note in report.notes)


@needs_library
@pytest.mark.real
def test_half_of_minilm_gives_there_what_it_gives_here(minilm: Path, tmp_path: Path) -> None:
    """So Spearman on STS-B is the same, too."""
    peftc.decompose(minilm, ratio=0.5, output_dir=tmp_path / "small")
    done = encoded(tmp_path, "peftc.transformers", tmp_path / "small")
    assert done.returncode == 0, done.stderr
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        hidden = peftc.load(tmp_path / "small")(**tokens).last_hidden_state
    own = sentence_vectors(hidden, tokens["attention_mask"])
    torch.testing.assert_close(vectors(tmp_path)["0"], own, rtol=0, atol=1e-6)
