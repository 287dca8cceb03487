"""A large table lies on disk after the first time, and is read as a small one in every way."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import peftc as package
from peftc.data import jsonl, open_data, remembered, stored, tokenised
from peftc.errors import DataError
from peftc.models.load import load
from peftc.options import Reading
from peftc.tasks import unlabelled
from peftc.tasks.classes import encode_classified
from peftc.tasks.sentences import encode_pairs
from tests.data.large import treat_as_large
from tests.networks import WORDS

TEXTS = [" ".join(WORDS[(row + at * at) % len(WORDS)] for at in range(row % 9 + 1)) for row in range(60)]
TEXTS[7] += ' \u200bnaïve, "quoted" 日本'


@pytest.fixture(autouse=True)
def _large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small and young files as large and settled ones, in blocks of few rows."""
    treat_as_large(tmp_path, monkeypatch)
    monkeypatch.setattr(jsonl, "AT_ONCE", 7)
    monkeypatch.setattr(tokenised, "AT_ONCE", 7)


def columns(kind: str) -> dict[str, list[Any]]:
    if kind == "pairs":
        score = [row % 11 / 2 for row in range(60)]
        return {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "score": score}
    return {"text": TEXTS, "label": ["good" if row % 3 else "bad" for row in range(60)]}


def written(folder: Path, ending: str, kind: str = "texts") -> Path:
    path, table = folder / f"train{ending}", columns(kind)
    if ending == ".parquet":
        import datasets

        datasets.Dataset.from_dict(table).to_parquet(path)
    elif ending == ".jsonl":
        rows = zip(*table.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",")
            writer.writerows([list(table), *zip(*table.values(), strict=True)])
    return path


def both(path: Path, monkeypatch: pytest.MonkeyPatch, task: str | None = None) -> tuple[Any, Any]:
    """Return a data set as a small one is read, and as a large one."""
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "LARGE", 1 << 40)
        small = open_data(str(path), task=task)
    large = open_data(str(path), task=task)
    assert small.identity is None and large.identity is not None
    return small, large


ENDINGS = [".csv", ".tsv", ".jsonl", ".parquet"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_a_large_table_holds_what_a_small_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, kind: str
) -> None:
    path = written(tmp_path, ending, kind)
    for _ in range(2):
        small, large = both(path, monkeypatch)
        assert [small[row] for row in range(60)] == [large[row] for row in range(60)]
        assert (small.digest, small.sketch, small.classes) == (large.digest, large.sketch, large.classes)
        assert small.notes == large.notes and small.take(9, seed=1).digest == large.take(9, seed=1).digest


@pytest.mark.parametrize("ending", ENDINGS)
def test_texts_have_the_same_tokens(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    model, reading = load(tiny_bert), Reading(max_length=9)
    texts = both(written(tmp_path, ending), monkeypatch)
    pairs = both(written(tmp_path, ending, "pairs"), monkeypatch, "sentence-similarity")
    cases: list[tuple[Any, Callable[[Any], Any]]] = [
        (texts, lambda data: encode_classified(model, data, reading)),
        (texts, lambda data: unlabelled.encode(model, data, None, Reading(num_samples=11))),
        (pairs, lambda data: encode_pairs(model, data, reading)),
        (pairs, lambda data: unlabelled.encode(model, data, None, reading)),
    ]
    for (small, large), encode in cases:
        one, *others = encode(small), encode(large), encode(large)
        for other in others:
            assert (one.key, one.size, one.lengths, one.notes) == (other.key, other.size, other.lengths, other.notes)
            for rows in ([0], [5, 2, one.size - 1]):
                ours, theirs = one.batch(rows), other.batch(rows)
                assert torch.equal(ours.targets, theirs.targets) and ours.inputs.keys() == theirs.inputs.keys()
                assert all(torch.equal(ours.inputs[key], theirs.inputs[key]) for key in ours.inputs)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_second_start_reads_no_file_again(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path, model = written(tmp_path, ending), load(tiny_bert)
    first = encode_classified(model, open_data(str(path)), Reading()).key
    digest = open_data(str(path)).digest

    def again(*given: Any, **more: Any) -> None:
        pytest.fail("it was read again")

    def kept() -> dict[Path, int]:
        return {file: file.stat().st_ino for file in stored.home().rglob("*.arrow")}

    before = kept()
    monkeypatch.setattr("pandas.read_csv", again)
    monkeypatch.setattr(jsonl, "json", SimpleNamespace(loads=again))
    data = open_data(str(path))
    data.content = again  # type: ignore[assignment]
    assert encode_classified(model, data, Reading()).key == first and data.digest == digest
    assert kept() == before and len(before) == 2


@pytest.mark.parametrize("ending", ENDINGS)
def test_another_cell_is_noticed_and_damage_only_costs_time(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, ending)
    before = open_data(str(path)).digest
    for file in stored.home().rglob("*.arrow"):
        os.truncate(file, file.stat().st_size // 2)
    shutil.rmtree(tmp_path / "cache")
    assert open_data(str(path)).digest == before
    for file in stored.home().rglob("*.arrow"):
        file.unlink()
    shutil.rmtree(tmp_path / "cache")
    assert open_data(str(path)).digest == before
    TEXTS[3], kept = TEXTS[3][::-1], TEXTS[3]
    try:
        written(tmp_path, ending)
    finally:
        TEXTS[3] = kept
    assert open_data(str(path)).digest != before


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "train.csv" / "no folder")
    for ending in ENDINGS:
        path = written(tmp_path, ending)
        assert len(open_data(str(path))) == 60
        path.unlink()


ROWS = [
    [{"text": "a", "label": 1}] * 20 + [{"text": "b", "label": 2.5}] * 20,
    [{"text": "a", "label": 1}] * 20 + [{"text": "b", "label": "two"}] * 20,
    [{"text": "a"}] * 20 + [{"text": "b", "label": 1}] * 20,
    [{"text": "a", "label": None}] * 20 + [{"text": "b", "label": "x"}] * 20,
    [{"label": 2, "text": 1 << 70}] * 20 + [{"text": "b", "label": 1}] * 20,
    [{}] * 20 + [{"text": "b", "label": 1}] * 20,
    [{"text": "a", "more": {"x": 1}}] * 20 + [{"text": "b", "more": {"y": [1]}}] * 20,
]


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_json_that_differ_are_read_as_in_memory(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    one = jsonl.table(path)
    other = jsonl.table(path, lambda: remembered.identity(path))
    assert one.column_names == other.column_names and one.features == other.features
    assert one.to_dict() == other.to_dict()


@pytest.mark.parametrize("content", ["", "\n", "{", '{"text": "a"}\n[1]\n', '{"text": NaN}'])
def test_a_damaged_file_is_refused_as_a_small_one_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as small:
        jsonl.table(path)
    with pytest.raises(DataError) as large:
        jsonl.table(path, lambda: remembered.identity(path))
    assert str(small.value) == str(large.value)
    for ending in (".csv", ".parquet"):
        other = tmp_path / f"test{ending}"
        other.write_bytes(b"\x00\xff damaged" * 9)
        with pytest.raises(DataError, match="cannot read"):
            open_data(str(other))


def test_images_in_a_table_are_known_again_with_the_table(tmp_path: Path) -> None:
    import datasets

    from tests.data.test_data import picture

    cells = [{"bytes": picture(row), "path": None} for row in range(6)]
    made = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 3})
    path = tmp_path / "train.parquet"
    made.cast_column("image", datasets.Image()).to_parquet(path)
    one, two = open_data(str(path)), open_data(str(path))
    digest = one.digest
    two.content = lambda row: pytest.fail("it is known")
    assert two.digest == digest


def test_a_model_learns_the_same_from_a_large_table_as_from_a_small_one(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, ".jsonl", "pairs")
    found = []
    for size in (1 << 40, 1):
        monkeypatch.setattr(remembered, "LARGE", size)
        out = tmp_path / f"out-{size}"
        package.distill(
            tiny_bert, teacher=tiny_bert, data=str(path), steps=3, batch_size=4, output_dir=out, device="cpu"
        )
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
