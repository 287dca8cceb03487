"""export --format onnx of a sentence model: the graph gives the vectors of sentences as well."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peftc
from peftc.errors import ExportError
from peftc.formats import sentences
from tests.conftest import TEXTS
from tests.runtimes.test_sentences import MISSING, expected, save_sentences

onnxruntime = pytest.importorskip("onnxruntime")
QUICK: dict[str, Any] = {"format": "onnx", "rounds": 5, "batch_size": 1}
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])  # padded on either side
OLD = {mode: word for word, mode in sentences.OLD.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_sentences(tmp_path_factory.mktemp("sentences"))
    peftc.decompose(base, ratio=0.5, output_dir=base / "small")
    return base / "small"


def given(folder: Path) -> dict[str, np.ndarray]:
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="np", padding=True)
    return {**tokens, "token_type_ids": np.zeros_like(tokens["input_ids"])}


@pytest.mark.parametrize("settings", [{}, {"dtype": "fp16"}, {"quantize": "int8"}], ids=str)
def test_the_second_output_is_the_vector_of_a_sentence(settings: dict[str, Any], small: Path, tmp_path: Path) -> None:
    report = peftc.export(small, output_dir=tmp_path / "out", settings=settings, **QUICK)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert [each.name for each in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert session.get_outputs()[1].shape == ["batch", 8]
    (found,) = session.run(["sentence_embedding"], given(small))
    far = {"fp16": 1e-2, "int8": 0.2}.get(next(iter(settings.values()), ""), 1e-5)
    torch.testing.assert_close(torch.from_numpy(found), expected(small), rtol=0, atol=far)
    assert any("its second output `sentence_embedding`" in note for note in report.notes)
    assert json.loads((tmp_path / "out/export.json").read_text())["about"]["vectors"] == "sentence_embedding"
    if not settings:
        assert report.data["deviation"] < 1e-5


def test_vectors_that_differ_are_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison looks at both outputs."""
    from peftc.formats import onnx as written_by

    trace = written_by.traced.trace

    def other(model: Any, example: Any, ends: Any) -> Any:
        twice = sentences.Ends(["cls"], ends.rest)
        return trace(model, example, ends=twice)

    monkeypatch.setattr(written_by.traced, "trace", other)
    with pytest.raises(ExportError, match="computes something else"):
        peftc.export(small, output_dir=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason=MISSING)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modes", [*([mode] for mode in sentences.MODES), ["cls", "max", "mean"]], ids="+".join)
def test_it_pools_as_sentence_transformers_does(modes: list[str]) -> None:
    from sentence_transformers.models import Normalize, Pooling

    tokens = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    theirs = Pooling(6, pooling_mode=tuple(modes))({"token_embeddings": tokens, "attention_mask": MASK})
    ours = sentences.Ends(modes, torch.nn.Sequential(sentences.Normalised()))(tokens, MASK)
    torch.testing.assert_close(ours, Normalize()(theirs)["sentence_embedding"], rtol=1e-5, atol=1e-6)


def changed(small: Path, place: Path, part: str, config: dict[str, Any]) -> Path:
    shutil.copytree(small.parent, place, ignore=shutil.ignore_patterns("small"))
    (place / part / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("mode", OLD)
def test_a_config_says_how_in_old_words_and_new_ones(mode: str, small: Path, tmp_path: Path) -> None:
    for at, config in enumerate(({OLD[mode]: True, "word_embedding_dimension": 32}, {"pooling_mode": mode})):
        ends = sentences.of_folder(changed(small, tmp_path / str(at), "1_Pooling", config))
        assert ends is not None and ends.modes == [mode]


@pytest.mark.parametrize(
    ("part", "config", "says"),
    [
        ("1_Pooling", {"pooling_mode": "median"}, "it pools by median"),
        ("1_Pooling", {"pooling_mode": 3}, "it pools by 3"),
        ("1_Pooling", {"include_prompt": False}, "without the prompt"),
        ("2_Dense", {"activation_function": "mine.Own"}, "its dense layer"),
        ("2_Dense", {"activation_function": "torch.nn.modules.activation.MultiheadAttention"}, "its dense layer"),
        ("2_Dense", {"use_residual": True}, "its dense layer"),
    ],
)
def test_what_is_not_known_is_left_out_and_said(
    part: str, config: dict[str, Any], says: str, small: Path, tmp_path: Path
) -> None:
    folder = changed(small, tmp_path / "model", part, config)
    with pytest.raises(ValueError, match=says):
        sentences.of_folder(folder)
    report = peftc.export(folder, output_dir=tmp_path / "out", **QUICK)
    assert any("the graph ends with vectors of tokens" in note and says in note for note in report.notes)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert [each.name for each in session.get_outputs()] == ["last_hidden_state"]


@pytest.mark.parametrize("text", ["{", "3", '[{"path": "x"}]', "[]", '[{"type": "a.Router", "path": ""}]'])
def test_another_list_of_parts_is_left_alone(text: str, small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path / "model", "1_Pooling", {})
    (folder / "modules.json").write_text(text)
    with pytest.raises(ValueError):
        sentences.of_folder(folder)


def test_a_dense_layer_of_more_than_one_matrix_is_left_out(small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path / "model", "1_Pooling", {})
    weights = {"linear.weight": torch.ones(8, 32), "linear.bias": torch.zeros(8), "residual.weight": torch.ones(8, 32)}
    save_file(weights, folder / "2_Dense/model.safetensors")
    with pytest.raises(ValueError, match="other weights"):
        sentences.of_folder(folder)
    del weights["residual.weight"]
    save_file(weights, folder / "2_Dense/model.safetensors")
    assert sentences.of_folder(folder) is not None
