"""The generator of composed images says what it shows, and writes the same bytes for the same seed."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from peftc.data import open_data
from peftc.steps.evaluate import evaluate

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SIZES = {"train": 50, "validation": 11, "test": 20}  # of 81 arrangements


@pytest.fixture(scope="module")
def compose() -> Any:
    file = Path(__file__).parents[1] / "benchmarks" / "compose.py"
    spec = importlib.util.spec_from_file_location("compose", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(compose: Any, tmp_path: Path) -> Path:
    return compose.compose(tmp_path / "made", tiles(), SIZES)


def tiles() -> Any:
    shades = {name: [Image.new("RGB", (16, 16), colour)] * 2 for name, colour in COLOURS.items()}
    return {split: shades for split in SIZES}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_caption_is_another_and_says_what_its_image_shows(made: Path) -> None:
    seen = []
    for split, size in SIZES.items():
        with (made / f"{split}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == size
        for row in rows:
            image = Image.open(made / row["file_name"])
            for part, corner in zip(row["caption"].split(", "), ((0, 0), (31, 0), (0, 31), (31, 31)), strict=True):
                assert image.getpixel(corner) == COLOURS[part.split()[0]]
            assert row["caption"].split(", ")[1].endswith("top right")
            seen.append(row["caption"])
    assert len(set(seen)) == sum(SIZES.values())


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(compose: Any, made: Path, tmp_path: Path) -> None:
    assert content(compose.compose(tmp_path / "again", tiles(), SIZES)) == content(made)
    assert content(compose.compose(tmp_path / "other", tiles(), SIZES, seed=1)) != content(made)


@pytest.mark.parametrize("kind", ["clip", "blip"])
def test_an_untrained_network_reads_what_was_composed(compose: Any, made: Path, tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    folder = compose.network(tmp_path / kind, kind, side=32, labels=list(COLOURS), **sizes)
    assert evaluate(folder, data=made).data["data"]["samples"] == 20
    ids = AutoTokenizer.from_pretrained(folder)(open_data(made, task="image-text-retrieval")[0][0][1])["input_ids"]
    assert 1 not in ids[1:-1]  # the token of unknown words


@pytest.mark.real
@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_the_tiles_of_validation_are_not_learnt_from(compose: Any, data_folder: Path, name: str) -> None:
    found = compose.tiles(name)
    assert {len(by_label) for by_label in found.values()} == {10}
    sizes = {split: sum(map(len, by_label.values())) for split, by_label in found.items()}
    assert sizes["train"] == pytest.approx(9 * sizes["validation"], rel=0.01)
    assert sizes["test"] == 2000
    assert not {id(image) for images in found["train"].values() for image in images} & {
        id(image) for images in found["validation"].values() for image in images
    }
