"""MODEL is read from its form and from what lies on disk, and every misreading is refused with the way to write it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import SourceError, UsageError
from peftc.store.source import Located, Source, locate, read_json


def folder(path: Path, **files: Any) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_folder_is_known_by_what_it_holds(tmp_path: Path) -> None:
    timm = folder(tmp_path / "t", config={"architecture": "resnet18"})
    transformers = folder(tmp_path / "h", config={"architectures": ["BertModel"]})
    artifact = folder(tmp_path / "a", peftc={}, config={"architecture": "resnet18"})
    assert [locate(Source(str(path))).kind for path in (timm, transformers, artifact)] == [
        "timm",
        "transformers",
        "artifact",
    ]
    assert locate(Source(str(timm))).folder == timm


def test_a_path_beats_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(Source("org/name")).folder is None
    Path("org").mkdir()
    folder(Path("org/name"), config={})
    assert locate(Source("org/name")).folder == Path("org/name")


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("timm:resnet18.a1_in1k", Located("timm-arch", "resnet18.a1_in1k")),
        ("timm/vit_tiny_patch16_224", Located("timm", "timm/vit_tiny_patch16_224")),
        ("google/bert", Located("transformers", "google/bert")),
        ("google/bert@v2", Located("transformers", "google/bert", revision="v2")),
        ("hf:bert-base-uncased", Located("transformers", "bert-base-uncased")),
        ("hf:timm/resnet18@abc", Located("timm", "timm/resnet18", revision="abc")),
        ("python:my.nets:make", Located("python", "my.nets:make")),
    ],
)
def test_a_name_says_where_to_look(spec: str, found: Located) -> None:
    assert locate(Source(spec)) == found


def test_a_revision_in_the_name_beats_the_option() -> None:
    assert locate(Source("google/bert", revision="main")).revision == "main"
    assert locate(Source("google/bert@v2", revision="main")).revision == "v2"


def test_bare_weights_are_placed_by_their_architecture(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.touch()
    expected = Located("timm-arch", "resnet18", weights=weights)
    assert locate(Source(str(weights), arch="timm:resnet18")) == expected
    assert locate(Source("timm:resnet18", weights=weights)) == expected


REFUSALS: list[tuple[str, type[Exception], Callable[[Path], Source]]] = [
    ("there is no model at `./nowhere`", SourceError, lambda path: Source("./nowhere")),
    ("there is no model at `model.safetensors`", SourceError, lambda path: Source("model.safetensors")),
    ("there is no model at `bert`", SourceError, lambda path: Source("bert")),
    ("there is no model at `a/b/c`", SourceError, lambda path: Source("a/b/c")),
    ("is a folder, but no model", SourceError, lambda path: Source(str(path))),
    ("names no factory", UsageError, lambda path: Source("python:my.nets")),
    ("names no factory", UsageError, lambda path: Source("python::make")),
    ("unknown architecture", UsageError, lambda path: Source(str(path / "w.safetensors"))),
    ("`--arch resnet18` is not", UsageError, lambda path: Source(str(path / "w.safetensors"), arch="resnet18")),
    ("there is no weight file at", SourceError, lambda path: Source("timm:resnet18", weights=path / "none.pth")),
]  # fmt: skip


@pytest.mark.parametrize(("message", "kind", "source"), REFUSALS, ids=[message for message, *_ in REFUSALS])
def test_what_is_no_model_is_refused(
    tmp_path: Path, message: str, kind: type[Exception], source: Callable[[Path], Source]
) -> None:
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(kind, match=message) as refusal:
        locate(source(tmp_path))
    assert "hint: " in str(refusal.value)


def test_weights_without_a_config_are_told_with_the_words_to_type(tmp_path: Path) -> None:
    for name, arch in (("resnet18", "timm:resnet18"), ("mine", "timm:NAME")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        with pytest.raises(SourceError, match="is a folder, but no model") as refusal:
            locate(Source(str(tmp_path / name)))
        assert f"`{tmp_path / name / 'model.safetensors'} --arch {arch}`" in str(refusal.value.hint)


def test_an_export_is_called_one_and_the_model_that_it_is_of_is_named(tmp_path: Path) -> None:
    made = {"base": {"source": {"spec": "models/dense"}}, "steps": []}
    about: dict[str, Any] = {"format": "onnx", "made_from": made}
    (tmp_path / "export.json").write_text(json.dumps({"about": about}))
    with pytest.raises(SourceError, match=r"is an export for onnx[\s\S]*name `models/dense` in its place"):
        locate(Source(str(tmp_path)))
    about["made_from"] = {**made, "steps": [{"id": "1a"}]}
    (tmp_path / "export.json").write_text(json.dumps({"about": about}))
    (tmp_path / "result.json").write_text(json.dumps({"places": {"1a": {"spec": "healed"}}}))
    with pytest.raises(SourceError, match="`peftc export healed --data DATA --max-drop"):
        locate(Source(str(tmp_path)))
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(SourceError, match="is an export for other programs"):
        locate(Source(str(tmp_path)))


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b"[1]"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match="config.json"):
        read_json(tmp_path / "config.json")
