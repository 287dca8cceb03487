"""A data set that is read as it comes gives each step the same samples, whoever reads them and wherever it begins."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import peftc
from peftc.data import streamed
from peftc.errors import DataError, UsageError
from peftc.models.hub import failures
from peftc.models.load import load
from peftc.models.place import runnable
from peftc.options import Reading, Recipe
from peftc.training import endless, journal, loop, samples
from peftc.training.arrival import Stream
from peftc.training.imitation import Imitation
from tests.calibration.test_memory import alone, launch
from tests.networks import WORDS

ROWS, CLASSES = 200, ["negative", "neutral", "positive"]
FEW: dict[str, Any] = {"steps": 6, "batch_size": 8, "device": "cpu", "learning_rate": 1e-2, "evaluations": 2}


def text(at: int) -> str:
    """Return a text that no other row has."""
    digits = [at % 5, at // 5 % 5, at // 25 % 5, at // 125]
    return " ".join([*(WORDS[5 * place + digit] for place, digit in enumerate(digits)), *WORDS[: at % 7]])


def save(folder: Path, number: int, split: str = "train", files: int = 3, **more: Any) -> Path:
    """Write a data set as the hub holds it: numbered texts with named classes, in several files."""
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=CLASSES))
    rows = {"text": [text(at) for at in range(number)], "label": [at % 3 for at in range(number)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for at in range(files):
        whole.shard(files, at, contiguous=True).to_parquet(folder / "data" / f"{split}-{at:05}-of-{files:05}.parquet")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("texts"), ROWS)
    return save(save(folder, 40, "validation", files=1), 60, "test", files=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few steps and a short head."""
    monkeypatch.setattr(endless, "ROWS", 30)
    monkeypatch.setattr(endless, "STEPS", 2)
    monkeypatch.setattr(streamed, "HEAD", 20)


Read = Callable[..., list[Any]]


@pytest.fixture
def read(texts: Path, tiny_bert_classifier: Path) -> Read:
    """Read the inputs of steps as a training does."""
    model = runnable(load(tiny_bert_classifier), device="cpu")

    def steps(first: int = 0, last: int = 40, workers: int = 0, accumulate: int = 1, mark: Any = None) -> list[Any]:
        recipe = Recipe(steps=last, batch_size=8, seed=3, accumulate=accumulate)
        found = samples.read(
            model, f"hf:{texts}", Reading(streaming=True, seed=3), labels=True, held_out=0.1, step=recipe.batch_size
        )
        assert found.stream is not None
        stream = Stream(found.stream, recipe, found.stream.drawn, workers)
        stream.go_on(mark or {})
        marks, taken = [], []
        with stream.arriving(first, last) as arrivals:
            for _ in range(first, last):
                parts = [arrivals.take() for _ in range(accumulate)]
                taken.append([sorted(map(tuple, _unpadded(part))) for part in parts])
                marks.append(arrivals.mark)
        return [taken, marks]

    return steps


def _unpadded(batch: Any) -> list[list[int]]:
    mask, found = batch.inputs["attention_mask"].bool(), batch.inputs["input_ids"]
    return [[int(label), *row[own].tolist()] for row, own, label in zip(found, mask, batch.targets, strict=True)]


# which samples


def test_a_pass_reads_every_row_once_and_in_an_order_of_its_own(read: Read) -> None:
    taken, marks = read(last=50)
    rows = [row for (part,) in taken for row in part]
    assert len(set(rows[:ROWS])) == ROWS  # 8 divides 200, and 32 rows of a block
    assert set(rows[ROWS:]) == set(rows[:ROWS]) and rows[ROWS:] != rows[:ROWS]
    assert [mark["epoch"] for mark in marks] == [0] * 25 + [1] * 25
    blocks = [rows[at : at + 32] for at in range(0, ROWS, 32)]
    assert all(len(block) == 32 for block in blocks[:-1]) and marks[4]["place"] == 32


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_reads_the_same(read: Read, workers: int) -> None:
    assert read(workers=workers) == read(workers=0)


def test_a_step_is_read_from_the_mark_of_the_one_before_it(read: Read) -> None:
    """In the middle of a block, at its end, and at the end of a pass; the library does not begin at the start."""
    taken, marks = read()
    for first in (1, 3, 4, 5, 24, 25, 26, 31):
        assert read(first, mark=json.loads(json.dumps(marks[first - 1])))[0] == taken[first:], first
    assert read(26, workers=2, mark=marks[25])[0] == taken[26:]


def test_each_process_takes_its_share_of_a_step(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = read(last=9)
    shares = []
    for rank in range(2):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        shares.append(read(last=9, accumulate=2)[0])
    for step, (one, other) in enumerate(zip(*shares, strict=True)):
        assert sorted(row for part in [*one, *other] for row in part) == whole[step][0]


def test_what_is_held_out_is_not_learnt_from(tmp_path: Path, tiny_bert_classifier: Path) -> None:
    folder, model = save(tmp_path, 64), runnable(load(tiny_bert_classifier), device="cpu")
    found = samples.read(model, f"hf:{folder}", Reading(streaming=True), labels=True, held_out=0.1, step=4)
    assert found.held is not None and found.stream is not None
    held = {tuple(row) for row in _unpadded(found.held.batch(range(20)))}
    taken, marks = list[Any](), list[Any]()
    for at in range(0, 88, 4):
        taken.append(_unpadded(found.stream.batch(range(at, at + 4))))
        marks.append(found.stream.mark)
    learnt = [tuple(row) for each in taken[:11] for row in each]
    assert len(held) == 20 and len(set(learnt)) == 44 and not held & set(learnt)
    assert any("held out: 20 samples" in note for note in found.notes), found.notes
    for step in (3, 9, 11, 20):  # in the first block, the second, and those of the second pass
        found.stream.go_on(marks[step])
        assert _unpadded(found.stream.batch(range(4 * step, 4 * step + 4))) == taken[step]


def test_windows_of_text_fill_blocks_of_many_steps(texts: Path, tiny_llama: Path) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    reading = Reading(streaming=True, max_length=16)
    found = samples.read(model, f"hf:{texts}", reading, labels=True, held_out=0.1, step=4)
    assert found.stream is not None and found.stream.rows >= 2 * 4 * 20 // found.train.encoded.size
    taken = [found.stream.batch(range(at, at + 4)).inputs["input_ids"] for at in range(0, 24, 4)]
    assert all(each.shape == (4, 16) for each in taken)
    assert len({tuple(row.tolist()) for each in taken for row in each}) == 24


# trainings


def steps_of(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / journal.LOG).read_text().splitlines()]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["tiny_bert_classifier", "tiny_llama"])
def test_a_training_goes_on_to_the_same_bytes(
    kind: str, texts: Path, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(name: str, workers: int) -> Any:
        asked = {**FEW, "data": f"hf:{texts}", "streaming": True, "max_length": 16, "workers": workers}
        return peftc.finetune(request.getfixturevalue(kind), output_dir=tmp_path / name, **asked)

    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)  # a checkpoint after every step
    report = tune("whole", 0)
    assert any("in blocks of" in note for note in report.notes) and report.data["steps"] == 6
    with monkeypatch.context() as patch:
        calls, real = iter(range(100)), Imitation.loss

        def killed(self: Imitation, module: Any, given: Any, *more: Any) -> Any:
            if next(calls) == 5:
                raise Killed
            return real(self, module, given, *more)

        patch.setattr(Imitation, "loss", killed)
        with pytest.raises(Killed):
            tune("killed", 2)
    marks, go_on = list[Any](), endless.Endless.go_on
    monkeypatch.setattr(endless.Endless, "go_on", lambda self, mark: marks.append(mark) or go_on(self, mark))
    again = tune("killed", 1)
    assert any("resumed at step 5" in note for note in again.notes), again.notes
    assert kind == "tiny_llama" or marks[0]["place"] == 32
    for name in ("model.safetensors", "peftc.json", journal.LOG):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


SMALL = """
import sys
from peftc.data import streamed
from peftc.training import endless
endless.ROWS, endless.STEPS, streamed.HEAD = 30, 2, 20
from peftc.cli.app import main
sys.argv[0] = "peftc"
main()
"""


def test_two_processes_learn_what_one_does(texts: Path, tiny_bert_classifier: Path, tmp_path: Path) -> None:
    words = ["finetune", tiny_bert_classifier, "--data", f"hf:{texts}", "--streaming", "--steps", 6, "--batch-size", 8]
    words += ["--device", "cpu", "--learning-rate", 0.01, "--max-length", 16]
    one = alone(*words, "-o", tmp_path / "one")
    first, second = launch(*words, "-o", tmp_path / "two", code=SMALL)
    assert (one[0], first[0], second[0]) == (0, 0, 0), one[2] + first[2] + second[2]
    losses = [[each["loss"] for each in steps_of(tmp_path / name) if "loss" in each] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_student_is_taught_from_a_stream(texts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    peftc.decompose(tiny_llama, output_dir=tmp_path / "small", ratio=0.6, method="svd", device="cpu")
    asked = {**FEW, "data": f"hf:{texts}", "streaming": True, "max_length": 16}
    report = peftc.distill(tmp_path / "small", output_dir=tmp_path / "out", **asked)
    assert report.data["steps"] == 6 and np.isfinite(report.data["losses"]).all()
    line = peftc.show(tmp_path / "out", commands=True)
    assert "--streaming" in str(line.data) + str(line.notes)


def test_layers_are_scored_on_the_head_and_trained_again_from_the_stream(
    texts: Path, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"data": f"hf:{texts}", "streaming": True, "drop": "1", "device": "cpu", "batch_size": 4}
    with pytest.raises(UsageError, match="`--streaming` does not say how long to train"):
        peftc.prune_layers(tiny_bert_classifier, output_dir=tmp_path / "out", retrain=True, **asked)
    report = peftc.prune_layers(tiny_bert_classifier, output_dir=tmp_path / "out", retrain=True, steps=3, **asked)
    assert report.data["retrain"]["steps"] == 3


# what measures


def test_figures_are_of_so_many_rows_as_are_asked_for(texts: Path, tiny_bert_classifier: Path) -> None:
    asked: dict[str, Any] = {"data": f"hf:{texts}", "device": "cpu", "streaming": True}
    report = peftc.evaluate(tiny_bert_classifier, num_samples=50, **asked)
    assert report.data["data"]["samples"] == 50
    assert any("its first 50 rows stand for split `test`" in note for note in report.notes), report.notes
    assert peftc.evaluate(tiny_bert_classifier, **asked).data["data"]["samples"] == 20
    one, other = (
        peftc.evaluate(tiny_bert_classifier, **asked | {"num_samples": 60, "streaming": way}) for way in (True, False)
    )
    assert one.data["metrics"] == other.data["metrics"] and one.data["data"] == other.data["data"]


@pytest.mark.parametrize("kind", ["tiny_bert_classifier", "tiny_llama"])
def test_statistics_are_of_samples_of_the_first_rows(kind: str, texts: Path, request: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"data": f"hf:{texts}", "device": "cpu", "max_length": 16, "calibration_samples": 24}
    found = []
    for streaming in (True, False):
        output = tmp_path / str(streaming)
        peftc.calibrate(request.getfixturevalue(kind), output_dir=output, streaming=streaming, **asked)
        found.append(load_file(output / "statistics.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # all rows are among the first


# what is refused


def test_what_a_stream_cannot_give_is_refused_by_name(texts: Path, tiny_bert_classifier: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"data": f"hf:{texts}", "streaming": True, "device": "cpu", "output_dir": tmp_path / "out"}
    for option, value in (("epochs", 2), ("minutes", 1), ("num_samples", 9)):
        with pytest.raises(UsageError, match=f"`--streaming` does not go with `--{option.replace('_', '-')}`"):
            peftc.finetune(tiny_bert_classifier, **asked | {option: value})
    with pytest.raises(UsageError, match="does not say how long"):
        peftc.finetune(tiny_bert_classifier, **asked)
    for option, value in (("cache_teacher", True), ("cache_top", 4)):
        with pytest.raises(UsageError, match=f"`--streaming` does not go with `--{option.replace('_', '-')}`"):
            peftc.distill(tiny_bert_classifier, steps=2, **asked | {option: value})
    with pytest.raises(UsageError, match="`--streaming` reads data sets of the hub"):
        peftc.finetune(tiny_bert_classifier, steps=2, **asked | {"data": str(texts)})
    assert not list(tmp_path.glob("out*"))


def test_classes_that_no_column_names_are_refused(tmp_path: Path, tiny_bert_classifier: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(f"the cat,{CLASSES[at % 3]}" for at in range(60)))
    with pytest.raises(DataError, match=r"`--streaming` cannot tell the classes of `hf:[\s\S]*no `ClassLabel`"):
        peftc.finetune(tiny_bert_classifier, data=f"hf:{tmp_path}", streaming=True, output_dir=tmp_path / "out", **FEW)


def test_a_stream_that_is_not_enough_for_a_step_is_refused(tmp_path: Path, tiny_bert_classifier: Path) -> None:
    for number, held_out in ((20, 0.1), (24, 0.1), (7, 0.0)):
        folder = save(tmp_path / str(number), number)
        asked = {**FEW, "data": f"hf:{folder}", "held_out": held_out, "streaming": True}
        with pytest.raises(DataError, match="is too small to be learnt from as it comes"):
            peftc.finetune(tiny_bert_classifier, output_dir=tmp_path / "out", **asked)


@pytest.mark.parametrize("kind", ["connection", "client"])
def test_a_hub_that_is_gone_in_the_middle_is_one_error(
    kind: str, texts: Path, tiny_bert_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = datasets.IterableDataset.iter

    def gone(self: Any, batch_size: int, *more: Any) -> Any:
        yield from itertools.islice(real(self, batch_size, *more), 1)
        raise ConnectionError("no route") if kind == "connection" else failures()[0]("no route")

    monkeypatch.setattr(datasets.IterableDataset, "iter", gone)
    asked = {**FEW, "data": f"hf:{texts}", "streaming": True, "workers": 1}
    with pytest.raises(DataError, match=r"cannot read `hf:[\s\S]*no route"):
        peftc.finetune(tiny_bert_classifier, output_dir=tmp_path / "out", **asked)


def test_pairs_of_images_and_texts_are_refused(captioned: Path, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`--streaming` reads no images with captions"):
        peftc.finetune(tiny_clip, data=f"hf:{captioned}", streaming=True, output_dir=tmp_path / "out", **FEW)


# images


def test_images_are_changed_alike_whoever_reads_them(tiny_vit: Path, tmp_path: Path) -> None:
    draw, pixels = np.random.default_rng(0), []
    for at in range(64):
        image = draw.integers(0, 160, (40, 40, 3), dtype=np.uint8)
        image[..., at % 3] += 90
        pixels.append(image)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[*"0123456789"]))
    rows = {"image": pixels, "label": [at % 10 for at in range(64)]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    found = []
    for workers in (0, 2):
        output = tmp_path / str(workers)
        asked = {**FEW, "data": f"hf:{tmp_path}", "streaming": True, "workers": workers}
        peftc.finetune(tiny_vit, output_dir=output, augment="rand-m9-mstd0.5", mixup=0.8, **asked)
        found.append([(output / name).read_bytes() for name in ("model.safetensors", "peftc.json", journal.LOG)])
    assert found[0] == found[1]
