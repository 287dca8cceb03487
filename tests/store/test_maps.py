"""What an artifact keeps of t-SNE maps: few points, the same samples everywhere, and nothing that harms a reader."""

import json
import random
from pathlib import Path

import pytest

from peftc.store import maps as layer_maps


def drawn(number: int, layers: int = 2) -> dict[str, list[tuple[float, float]]]:
    draw = random.Random(0)
    return {f"b.{at}": [(draw.random(), draw.random()) for _ in range(number)] for at in range(layers)}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    maps, labels = drawn(40), [at % 3 * 2 for at in range(40)]
    layer_maps.write(tmp_path, maps, labels, ["ant", "bee", "cat", "dog", "eel"])
    found = layer_maps.read(tmp_path)
    assert found is not None
    assert (found.samples, found.classes) == (40, ["ant", "cat", "eel"])
    for name, points in maps.items():
        expected = {(round(x, 2), round(y, 2), label) for (x, y), label in zip(points, labels, strict=True)}
        assert len(found.points[name]) == len(found.labels) == 40
        for (x, y), label in zip(found.points[name], found.labels, strict=True):
            assert any(abs(x - a) < 0.006 and abs(y - b) < 0.006 and 2 * label == c for a, b, c in expected)


def test_few_samples_are_kept_and_the_same_in_every_layer(tmp_path: Path) -> None:
    one = [(at / 1999, 0.5) for at in range(2000)]
    layer_maps.write(tmp_path, {f"blocks.{at}": one for at in range(12)}, [at % 10 for at in range(2000)], None)
    found = layer_maps.read(tmp_path)
    assert found is not None
    assert (found.samples, found.classes) == (2000, [str(at) for at in range(10)])
    assert {len(points) for points in found.points.values()} == {layer_maps.POINTS}
    assert len({tuple(points) for points in found.points.values()}) == 1
    for (x, _), label in zip(found.points["blocks.0"], found.labels, strict=True):
        assert any(at % 10 == label and abs(at / 1999 - x) < 1e-3 for at in range(2000))
    assert (tmp_path / layer_maps.FILE).stat().st_size < 35_000
    before = (tmp_path / layer_maps.FILE).read_bytes()
    layer_maps.write(tmp_path, {f"blocks.{at}": one for at in range(12)}, [at % 10 for at in range(2000)], None)
    assert (tmp_path / layer_maps.FILE).read_bytes() == before


GOOD = {"samples": 2, "classes": ["a"], "labels": [0, 0], "maps": {"b.0": [[1, 2], [3, 4]]}}


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [0, 1]}, {"labels": [0]}, {"labels": []}, {"labels": None}, {"classes": 3}, {"samples": "many"},
        {"maps": {"b.0": [[1, 2]]}}, {"maps": {"b.0": [[1, 2], [3]]}}, {"maps": {"b.0": [[1, "x"], [3, 4]]}},
        {"maps": {"b.0": [[1, float("inf")], [3, 4]]}}, {"maps": []},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_maps_are_none(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / layer_maps.FILE).write_text(json.dumps(GOOD))
    assert layer_maps.read(tmp_path) is not None
    (tmp_path / layer_maps.FILE).write_text(json.dumps({**GOOD, **change}))
    assert layer_maps.read(tmp_path) is None


@pytest.mark.parametrize("text", [None, "", "[1]", "null", '{"maps": ', "[" * 10_000], ids=lambda text: str(text)[:9])
def test_no_maps_are_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / layer_maps.FILE).write_text(text)
    assert layer_maps.read(tmp_path) is None


def test_points_stay_inside_the_picture(tmp_path: Path) -> None:
    (tmp_path / layer_maps.FILE).write_text(json.dumps({**GOOD, "maps": {"b.0": [[-5, 10**9], [0, 999]]}}))
    found = layer_maps.read(tmp_path)
    assert found is not None and found.points["b.0"] == [(0, 0), (1, 1)]
