"""What the hub would have given: one clear line where it cannot be asked."""

from pathlib import Path

import pytest

from peftc.errors import SourceError
from peftc.models.load import load
from peftc.source import Source


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
