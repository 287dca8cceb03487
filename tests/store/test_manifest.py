"""The manifest is sorted, strict, and the same in Python and in its published schema."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import ArtifactError
from peftc.store import manifest
from peftc.store.manifest import FIELDS, OPTIONAL, Manifest
from tests.conftest import rewritten

SCHEMA = json.loads((Path(manifest.__file__).parents[1] / "manifest.schema.json").read_text(encoding="utf-8"))
SHA = "a" * 64


def example(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "id": SHA,
        "base": {"library": "timm", "architecture": "resnet18", "files": {"model.safetensors": SHA}},
        "steps": [{"id": SHA, "request": {"command": "decompose", "seed": 0}}],
        "files": {"model.safetensors": {"sha256": SHA, "bytes": 8}},
        "parameters": 2,
        "modules": {"fc": {"form": "linear", "rank": 3, "shares": "fc"}, "conv": {"form": "tucker2", "rank": [2, 3]}},
        "labels": ["cat", "größer"],
        "ordered": {"head": {"form": "linear", "rank": 0}},
    }
    return Manifest(**{**fields, **changes})


def written(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    example().write(folder)
    return rewritten(folder / "peftc.json", change).parent


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    example().write(tmp_path)
    assert manifest.read(tmp_path) == example()


def test_a_manifest_from_before_ordered_factors_is_read(tmp_path: Path) -> None:
    assert manifest.read(written(tmp_path, lambda value: value.pop("ordered"))) == example(ordered={})


def test_equal_manifests_are_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for modules in ({"a": {"form": "linear", "rank": 1}, "b": {"form": "linear", "rank": 2}},) * 2:
        example(modules=dict(reversed(modules.items())) if contents else modules).write(tmp_path)
        contents.append((tmp_path / "peftc.json").read_bytes())
    assert contents[0] == contents[1]
    keys = list(json.loads(contents[0]))
    assert keys == sorted(keys)


def test_a_manifest_never_holds_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        example(preprocess={"crop_pct": float("nan")}).write(tmp_path)


DAMAGES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("schema version 2; this peftc reads 1", lambda value: value.update(schema_version=2)),
    ("schema version None", lambda value: value.pop("schema_version")),
    *[
        (f"`{name}` is missing", lambda value, name=name: value.pop(name))
        for name in FIELDS
        if name != "schema_version"
    ],
    *[
        (f"`{name}` is `1.5`, not ", lambda value, name=name: value.update({name: 1.5}))
        for name in [*FIELDS, *OPTIONAL]
        if name not in ("schema_version", "digest")
    ],
    ("unknown fields: more, other", lambda value: value.update(other=1, more=2)),
    ("`files.model.safetensors.bytes` is missing", lambda value: value["files"]["model.safetensors"].pop("bytes")),
    ("safetensors.bytes` is `\"8\"`, not a whole", lambda value: value["files"]["model.safetensors"].update(bytes="8")),
    ("`files.x` is `3`, not a map", lambda value: value["files"].update(x=3)),
    ("`modules.fc.form` is missing", lambda value: value["modules"]["fc"].pop("form")),
    (r"`modules.fc` is `\[\]`, not a map", lambda value: value["modules"].update(fc=[])),
    ("module `fc` has the rank 0", lambda value: value["modules"]["fc"].update(rank=0)),
    ("`modules.fc.rank` is `\"9\"`", lambda value: value["modules"]["fc"].update(rank="9")),
    (r"module `conv` has the rank \[1, 2, 3\]", lambda value: value["modules"]["conv"].update(rank=[1, 2, 3])),
    ("`ordered.head.form` is missing", lambda value: value["ordered"]["head"].pop("form")),
    ("factors of `head` have the rank -1", lambda value: value["ordered"]["head"].update(rank=-1)),
    ("`ordered.head.rank` is", lambda value: value["ordered"]["head"].update(rank=[1, 2])),
    (r"`ordered` is `\[\]`, not a map", lambda value: value.update(ordered=[])),
    ("`base.library` is missing", lambda value: value["base"].pop("library")),
    (r"`steps\[1\].request` is missing", lambda value: value["steps"].append({"id": SHA})),
    (r"`steps\[1\].request.command` is missing", lambda value: value["steps"].append({"id": SHA, "request": {}})),
    (r"`steps\[1\]` is `3`, not a map", lambda value: value["steps"].append(3)),
    (r"request.budget` is `3`, not", lambda value: value["steps"][0]["request"].update(budget=3)),
    (r"`steps\[0\].id` is missing", lambda value: value["steps"][0].pop("id")),
    ("schema version True", lambda value: value.update(schema_version=True)),
    (r"`tied.a` is `\[\"b\"\]`, not a text", lambda value: value["tied"].update(a=["b"])),
    (r"`labels\[1\]` is `7`, not a text", lambda value: value.update(labels=["cat", 7])),
    (r"input_size` is \[3, 224\]", lambda value: value["preprocess"].update(input_size=[3, 224])),
    ("as a delta, `files` is missing", lambda value: value.update(delta={"source": {"spec": "x"}})),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), DAMAGES)
def test_a_damaged_manifest_is_refused(tmp_path: Path, message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ArtifactError, match=r"peftc\.json`") as refusal:
        manifest.read(written(tmp_path, change))
    assert refusal.match(message)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "a/../../b", "/etc/passwd", "..", "", "a\\b", "C:x", "a\0b", "./../x"]
)
def test_a_file_name_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    entry = {"sha256": SHA, "bytes": 1}
    with pytest.raises(ArtifactError, match="not a manifest") as refusal:
        manifest.read(written(tmp_path, lambda value: value["files"].update({name: entry})))
    assert refusal.match("not inside the folder")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "peftc.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"peftc\.json"):
        manifest.read(tmp_path)


def test_a_folder_without_one_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not an artifact") as refusal:
        manifest.read(tmp_path)
    assert refusal.match("it has no `peftc.json`")


def test_a_digest_depends_on_values_not_on_their_order() -> None:
    assert manifest.digest({"a": 1, "b": [1, 2]}) == manifest.digest({"b": [1, 2], "a": 1})
    assert manifest.digest({"a": 1}) != manifest.digest({"a": 1.5})
    assert manifest.digest([1, 2]) != manifest.digest([2, 1])


def test_a_file_digest_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert manifest.file_digest(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_the_schema_names_the_fields_that_python_checks() -> None:
    assert SCHEMA["properties"].keys() == FIELDS.keys() | OPTIONAL.keys()
    assert FIELDS.keys() == set(SCHEMA["required"])
    assert SCHEMA["properties"]["schema_version"]["const"] == manifest.SCHEMA_VERSION


def test_an_edit_is_noticed_and_accepted_where_the_digest_is_taken_out(tmp_path: Path) -> None:
    example().write(tmp_path)
    path = tmp_path / "peftc.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'), encoding="utf-8")
    with pytest.raises(ArtifactError, match="was changed after peftc wrote it") as refusal:
        manifest.read(tmp_path)
    assert refusal.match("take the field `digest` out")
    rewritten(path, lambda value: None)
    assert manifest.read(tmp_path).steps[0]["request"]["seed"] == 1


def test_the_schema_is_a_schema_and_knows_every_form() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from peftc.nn.lowrank import FORMS

    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["modules"]["additionalProperties"]["properties"]["form"]["enum"] == list(FORMS)


def valid(value: dict[str, Any]) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(value))


def test_the_schema_refuses_what_python_refuses(tmp_path: Path) -> None:
    for message, change in DAMAGES:
        value = json.loads((written(tmp_path, lambda value: None) / "peftc.json").read_text(encoding="utf-8"))
        assert valid(value)
        change(value)
        assert not valid(value), message


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny_vit", {}),
        ("tiny_resnet", {"conv_method": "channel"}),
        ("tiny_bert_classifier", {}),
        ("tiny_llama", {"include": ["embed_tokens"]}),
    ],
)
def test_a_real_manifest_fits_the_schema(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, options: dict[str, Any]
) -> None:
    import peftc

    jsonschema = pytest.importorskip("jsonschema")
    folder = request.getfixturevalue(model)
    peftc.decompose(folder, output_dir=tmp_path / "out", ratio=0.5, allocation="uniform", **options)
    value = json.loads((tmp_path / "out" / "peftc.json").read_text(encoding="utf-8"))
    assert value["modules"]
    jsonschema.validate(value, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_the_manifest_of_a_chain_fits_the_schema_too(tiny_vit: Path, tmp_path: Path) -> None:
    import peftc

    jsonschema = pytest.importorskip("jsonschema")
    peftc.decompose(tiny_vit, output_dir=tmp_path / "one", rank=4, skip=["mlp"])
    peftc.decompose(tmp_path / "one", output_dir=tmp_path / "two", rank=4)
    value = json.loads((tmp_path / "two" / "peftc.json").read_text(encoding="utf-8"))
    assert len(value["steps"]) == 2
    jsonschema.validate(value, SCHEMA, cls=jsonschema.Draft202012Validator)
