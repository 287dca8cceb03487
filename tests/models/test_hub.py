"""What the hub would have given: one clear line where it cannot be asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import SourceError
from peftc.models.load import load
from peftc.store.source import Source


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("hf:nobody/nothing", "nobody/nothing"),
        ("nobody/nothing", "nobody/nothing"),
        ("nobody/nothing@v1", "nobody/nothing@v1"),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("timm:vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"),
    ],
)
def test_without_a_network_one_line_says_what_would_have_been_downloaded(spec: str, name: str, offline: bool) -> None:
    with pytest.raises(SourceError, match="would have downloaded") as caught:
        load(Source(spec, offline=offline))
    assert f"`{name}" in caught.value.what and "\n" not in caught.value.what
    assert ("--offline" in (caught.value.why or "")) == offline


def test_a_name_that_could_be_a_path_says_that_it_is_none() -> None:
    with pytest.raises(SourceError) as caught:
        load("runs/small")
    assert "no local path `runs/small`" in (caught.value.why or "")


@pytest.mark.parametrize("spec", ["hf:a b/c", "hf:x/y/z", "hf:", "hf:../../etc", "hf:a/" + "b" * 200])
def test_a_name_that_no_hub_takes_is_refused(spec: str) -> None:
    with pytest.raises(SourceError):
        load(spec)


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(SourceError, match="no architecture `vit_tiny_patch16_225`") as caught:
        load("timm:vit_tiny_patch16_225")
    assert "vit_tiny" in (caught.value.hint or "")


SHA = "a" * 40
INFO = {"_id": "1", "id": "me/model", "modelId": "me/model", "private": False, "gated": False, "tags": []}
ANSWERS: dict[str, bytes] = {
    "html": b"<!DOCTYPE html><html><body>Sign in to this network</body></html>",
    "nothing": b"",
    "truncated": json.dumps({**INFO, "sha": SHA, "siblings": [{"rfilename": "config.json"}]}).encode()[:-20],
    "a list": b"[]",
    "a number": b"3",
    "no siblings": json.dumps({**INFO, "sha": SHA}).encode(),
    "siblings of another type": json.dumps({**INFO, "sha": SHA, "siblings": "config.json"}).encode(),
    "siblings without names": json.dumps({**INFO, "sha": SHA, "siblings": [{"name": "x"}, 3]}).encode(),
    "names that climb": json.dumps({**INFO, "sha": SHA, "siblings": [{"rfilename": "../../../config.json"}]}).encode(),
    "no commit": json.dumps({**INFO, "siblings": [{"rfilename": "config.json"}]}).encode(),
    "a commit that climbs": json.dumps({**INFO, "sha": "../../../x", "siblings": [{"rfilename": "a.json"}]}).encode(),
    "a commit that is a number": json.dumps({**INFO, "sha": 3, "siblings": [{"rfilename": "a.json"}]}).encode(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_not_the_hubs_is_one_clear_error(
    hub: Any, peftc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    hub.add("me/model", {"config.json": b"{}"})
    monkeypatch.setattr("tests.hub_server.Handler.info", lambda *_: (200, {}, answer))
    home = tmp_path / "hub-home"
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(home)}
    done = peftc("analyze", "me/model", "--ratio", 0.5)
    assert done.exit_code == 1 and done.stderr.count("error: ") == 1, done.stderr
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(home)} == before
