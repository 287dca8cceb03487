"""A page is passed on: of where things lay on somebody's disk it has names alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftc.pages.places import without_places
from peftc.steps.report import report
from peftc.store import artifact
from tests.steps.test_compare import measure, quality, speed, write


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/photos", "photos"),
        ("/home/ann/my photos.zip@test", "my photos.zip@test"),
        ("/home/ann/t.csv?text=tweet&label=mood@train", "t.csv?text=tweet&label=mood@train"),
        ("~/data/photos", "photos"),
        ("split `train` of `/home/ann/my photos` (has `test`)", "split `train` of `my photos` (has `test`)"),
        ("finetune --data=/home/ann/a.zip -o small", "finetune --data=a.zip -o small"),
        ("in /home/ann/a.json, and /home/ann/b.json", "in a.json, and b.json"),
        ("photos@test", "photos@test"),
        ("data/photos", "data/photos"),
        ("../photos", "../photos"),
        ("./a/b/c", "./a/b/c"),
        ("hf:org/name", "hf:org/name"),
        ("timm/vit_tiny.augreg", "timm/vit_tiny.augreg"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("--ratio 1/2, 22.5 samples/s", "--ratio 1/2, 22.5 samples/s"),
        ("w / o and / or", "w / o and / or"),
    ],
)  # fmt: skip
def test_of_absolute_paths_the_last_name_stays(text: str, shown: str) -> None:
    assert without_places(text) == shown
    assert without_places({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


def test_no_absolute_path_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = "/home/ann/secret"
    small = write(tmp_path / "small", "decompose", source=f"{secret}/dense", data=f"{secret}/photos")
    measure(small, evaluate=[quality(0.8, of=f"{secret}/photos", against=0.9)], bench=[speed(1500)])
    result = json.loads((small / "result.json").read_text())
    result["report"] |= {"notes": [f"data: `{secret}/photos`"], "warnings": [f"{secret}/photos is small"]}
    artifact.write_json(small / "result.json", result)
    outcome = report([small])
    page = Path("report.html").read_text()
    assert secret not in page and str(tmp_path) not in page
    for text in ("small beside dense", "<code>photos@test</code>", "photos is small", "peftc decompose dense"):
        assert text in page
    assert "peftc show small --commands" in page, "where they stand whole"
    assert outcome.data["models"][-1]["artifact"] == str(small), "JSON is not passed on"


def test_folders_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "small", "decompose")
    report([tmp_path / "a/small", tmp_path / "b/small"])
    page = Path("report.html").read_text()
    assert str(tmp_path) not in page and "a/small" in page and "b/small" in page
