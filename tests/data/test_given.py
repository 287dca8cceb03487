"""Samples that are given in Python: what each kind becomes, what a record says of it, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import peftc
from peftc.data import open_data, split_names
from peftc.data.dataset import Dataset
from peftc.data.given import spec_of
from peftc.errors import DataError, PeftcError, UsageError
from peftc.options import Reading

TEXTS = ["the cat sat", "a dog ran", "the bird sang", "a small house"]
ROWS = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
PIXELS = torch.arange(6 * 3 * 8 * 8).reshape(6, 3, 8, 8).remainder(251).to(torch.uint8)
NUMBERS = torch.linspace(-1, 1, 6 * 3 * 8 * 8).reshape(6, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def opened(data: Any, **options: Any) -> Dataset:
    return open_data(spec_of(data, Reading(**options)), task=options.get("task"))


def pictures() -> list[Image.Image]:
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in PIXELS]


def rows(data: Any, **options: Any) -> list[Any]:
    found = opened(data, **options)
    return [found[at] for at in range(len(found))]


class Words(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, at: int) -> Any:
        return TEXTS[at], at % 2


@pytest.mark.parametrize(
    "data",
    [
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list([*ROWS, *ROWS]).select(range(4)),
        ROWS,
        tuple(ROWS),
        [(row["text"], row["label"]) for row in ROWS],
        [[row["text"], torch.tensor(row["label"])] for row in ROWS],
        [(row["text"], np.int64(row["label"])) for row in ROWS],
        Words(),
        DataLoader(Words(), batch_size=3),
        DataLoader(Words(), batch_size=None),
        DataLoader(Words(), batch_size=2, collate_fn=list),
        DataLoader(ROWS, batch_size=2),
        DataLoader(datasets.Dataset.from_list(ROWS), batch_size=3),
    ],
    ids=["dataset", "selected", "dicts", "tuple", "pairs", "lists", "numpy", "torch", "loader", "unbatched", "collated",
         "loader of dicts", "loader of a dataset"],
)  # fmt: skip
def test_labelled_texts_are_the_same_however_they_are_given(data: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file, found = open_data(tmp_path / "rows.jsonl"), opened(data)
    assert found.kind == "text" and found.classes == ["0", "1"]
    assert [found[at] for at in range(4)] == [of_file[at] for at in range(4)]
    assert found.digest == of_file.digest, "so that samples are known again"


@pytest.mark.parametrize(
    "data",
    [
        (PIXELS, LABELS),
        (PIXELS.numpy(), LABELS.numpy()),
        (PIXELS.permute(0, 2, 3, 1), LABELS),
        (PIXELS.flip(0).flip(0), LABELS[:, None]),
        (PIXELS.repeat(2, 1, 1, 1)[::2].clone().copy_(PIXELS), LABELS.float()),
        list(zip(PIXELS, LABELS, strict=True)),
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4),
        [{"pixel_values": pixels.float(), "labels": label} for pixels, label in zip(PIXELS, LABELS, strict=True)],
    ],
    ids=["tensors", "arrays", "not contiguous", "a column", "float labels", "pairs", "loader", "numbers in dicts"],
)
def test_tensors_are_as_in_a_file_of_arrays(data: Any, tmp_path: Path) -> None:
    found = opened(data)
    assert found.classes == ["0", "1", "2"] and list(found.labels or []) == LABELS.tolist()
    if found.kind == "tensor":
        assert torch.equal(torch.stack([found[at][0] for at in range(6)]), PIXELS.float())
        return
    np.savez(tmp_path / "a.npz", x=PIXELS.numpy(), y=LABELS.numpy())
    assert found.kind == "image" and found.digest == open_data(tmp_path / "a.npz").digest


@pytest.mark.parametrize(
    "data",
    [
        list(zip(pictures(), ["c", "a", "b", "c", "a", "b"], strict=True)),
        [{"image": image, "label": label} for image, label in zip(pictures(), "cabcab", strict=True)],
        [{"image": pixels.permute(1, 2, 0), "label": label} for pixels, label in zip(PIXELS, "cabcab", strict=True)],
        list(zip(PIXELS, "cabcab", strict=True)),
    ],
    ids=["pairs", "dicts", "dicts of pixels", "pairs of pixels"],
)
def test_images_keep_their_pixels_and_the_names_of_their_classes(data: Any) -> None:
    found = opened(data)
    assert found.kind == "image" and found.classes == ["a", "b", "c"]
    assert list(found.labels or []) == [2, 0, 1, 2, 0, 1]
    for at in range(6):
        assert np.array_equal(np.asarray(found[at][0]), PIXELS[at].permute(1, 2, 0).numpy())


def test_images_of_different_sizes_and_modes_are_read() -> None:
    images = [
        Image.new(mode, (5 + at, 8)) for at, mode in enumerate(("RGB", "L", "P", "RGBA", "1", "LA", "CMYK", "HSV"))
    ]
    assert [value.size for value, _ in rows(images)] == [(5 + at, 8) for at in range(8)]
    assert [value.size for value, _ in rows([torch.zeros(3, 8, 5 + at, dtype=torch.uint8) for at in range(3)])] == [
        (5, 8), (6, 8), (7, 8),
    ]  # fmt: skip


def test_an_image_is_upright_and_keeps_what_is_transparent() -> None:
    turned = Image.new("RGB", (4, 8))
    turned.getexif()[0x0112] = 6
    assert rows([turned])[0][0].size == (8, 4)
    clear = Image.new("P", (4, 4))
    clear.info["transparency"] = 0
    assert rows([clear])[0][0].mode == "RGBA"


def test_what_has_no_labels_is_read_without() -> None:
    for data in (TEXTS, PIXELS, PIXELS.numpy(), pictures(), list(NUMBERS), DataLoader(TensorDataset(NUMBERS), 4)):
        assert opened(data).labels is None
    assert rows(TEXTS) == [(text, None) for text in TEXTS]


def test_halves_of_precision_and_gradients_are_no_matter() -> None:
    for numbers in (NUMBERS.bfloat16(), NUMBERS.half(), NUMBERS.clone().requires_grad_(), NUMBERS.double()):
        assert rows((numbers, LABELS))[0][0].dtype == torch.float32


def test_splits_are_those_of_a_dict() -> None:
    data = {"train": (PIXELS, LABELS), "test": (PIXELS[:2], LABELS[:2])}
    spec = spec_of(data, Reading())
    assert split_names(spec) == ["train", "test"]
    assert open_data(spec).split == "test" and open_data(spec, role="training").split == "train"
    assert "(it also has `train`; give that alone to choose it)" in open_data(spec).notes[0]
    assert open_data(spec).classes == ["0", "1", "2"], "those of all splits, as of a file"
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), validation=datasets.Dataset.from_list(ROWS[:2]))
    assert split_names(spec_of(both, Reading())) == ["train", "validation"]
    with pytest.raises(DataError, match="does not say which split") as caught:
        opened({"train": TEXTS, "train_more": TEXTS})
    assert "hint: give one split alone: `data['train']`" in str(caught.value)


# what a record says


def test_a_name_says_what_it_was_and_is_the_same_for_the_same_content() -> None:
    form = r"list of 4 rows given in Python, sha256 [0-9a-f]{16}"
    assert re.fullmatch(form, spec_of(ROWS, Reading()))
    assert spec_of(ROWS, Reading()) == spec_of([dict(row) for row in ROWS], Reading())
    others = [ROWS[:3], ROWS[::-1], [*ROWS[:3], {"text": "a small house", "label": 0}]]
    assert len({spec_of(each, Reading()) for each in (ROWS, *others)}) == 4
    assert spec_of((PIXELS, LABELS), Reading()) == spec_of((PIXELS.clone(), LABELS.clone()), Reading())
    assert spec_of((PIXELS, LABELS), Reading()) != spec_of((PIXELS, LABELS.flip(0)), Reading())
    assert spec_of(pictures(), Reading()) != spec_of(pictures()[::-1], Reading())
    assert spec_of(TEXTS, Reading()).startswith("list of 4 texts given")
    assert spec_of((PIXELS, LABELS), Reading()).startswith("pair of tensors of 6 x 3 x 8 x 8 given")


def test_a_shuffled_loader_gives_the_same_samples_each_time() -> None:
    loaders = [DataLoader(TensorDataset(NUMBERS, LABELS), 2, shuffle=True) for _ in range(2)]
    loaders.append(
        DataLoader(TensorDataset(NUMBERS, LABELS), 2, shuffle=True, generator=torch.Generator().manual_seed(5))
    )
    before = torch.random.get_rng_state()
    assert len({spec_of(loader, Reading()) for loader in loaders[:2]}) == 1
    assert spec_of(loaders[2], Reading()) == spec_of(loaders[2], Reading())
    assert torch.equal(before, torch.random.get_rng_state())


def test_columns_are_named_by_options() -> None:
    table = datasets.Dataset.from_list(
        [{"tweet": text, "mood": "ab"[at % 2], "more": 1.5} for at, text in enumerate(TEXTS)]
    )
    found = opened(table, text_column="tweet", label_column="mood")
    assert found.classes == ["a", "b"] and found[0][0] == TEXTS[0]
    assert "?text=tweet&label=mood" in found.name or "?" not in found.name
    with pytest.raises(DataError, match="no column of a usual name for text") as caught:
        opened(table)
    assert "hint: name it: `text_column=NAME`" in str(caught.value)
    with pytest.raises(DataError, match="has no column `twet`") as caught:
        opened(table, text_column="twet")
    assert "--data" not in str(caught.value), "nobody can type this data"


def test_a_transform_of_a_dataset_is_left_out_and_that_is_said() -> None:
    table = datasets.Dataset.from_list(ROWS).with_transform(lambda batch: {"x": [0] * len(batch["text"])})
    found = opened(table)
    assert found[0][0] == TEXTS[0] and any("transform" in note for note in found.notes)
    assert rows(datasets.Dataset.from_list(ROWS).with_format("torch", columns=["label"]))[0] == (TEXTS[0], 0)


def test_large_splits_of_one_dict_are_told_apart() -> None:
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {at} " * 9 for at in range(20_000)]})
        for name in ("train", "test")
    }
    found = {role: open_data(spec_of(splits, Reading()), role=role) for role in ("training", "evaluation")}
    again = {role: open_data(spec_of(splits, Reading()), role=role) for role in found}
    digests = [found[role].digest for role in found]
    assert len(set(digests)) == 2 and digests == [again[role].digest for role in found]


# what is refused

SPARSE = torch.eye(4).to_sparse()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ((text for text in TEXTS), "is a generator.*make a list of it"),
        (iter(TEXTS), "list_iterator.*make a list of it"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "IterableDataset.*make a list of it, or of a part"),
        (3, "`data` is a int"),
        (None, "`data` is a NoneType"),
        (b"bytes", "`data` is a bytes"),
        ([], "holds no samples"),
        ((), "holds no samples"),
        ({}, "not one of splits"),
        ({"text": TEXTS, "label": [0, 1, 0, 1]}, "`text` is no name of a split.*from_dict"),
        ({"train": []}, "holds no samples"),
        (DataLoader([]), "holds no samples"),
        (datasets.Dataset.from_dict({"text": []}), "has no rows"),
        ([TEXTS, [0, 1, 0, 1]], "sample 0 is a list of 4"),
        ([TEXTS[:2], [0, 1]], r"not of one kind.*list\(zip"),
        ([("a", "b")], "a pair of texts.*sentence1"),
        ([*TEXTS, 3], "not of one kind.*sample 4 is a int"),
        ([1, 2, 3], "sample 0 is a int"),
        ([("a", 0, 1)], "sample 0 is a tuple of 3"),
        ([("a", 0), ("b", None)], "the label of sample 1 of `data` is a NoneType"),
        ([("a", 0), ("b", "x")], "some labels of `data` are texts"),
        ([("a", 0), (PIXELS[0], 1)], "input of sample 1 is a Tensor, and input of sample 0 is a text"),
        ([(3, 0)], "input of sample 0 is a int"),
        ([(PIXELS[0], [0, 1])], "the label of sample 0 of `data` is a list of 2"),
        ([(PIXELS[0], torch.tensor([0.0, 1.0]))], "the label of sample 0"),
        ([NUMBERS[0], NUMBERS[0, :, :4]], "differ in shape.*3 x 4 x 8"),
        ((PIXELS, LABELS[:3]), "the labels of .* have shape"),
        ((PIXELS, LABELS * float("nan")), "contain NaN"),
        ((PIXELS.bool()[:, 0, 0, 0], LABELS), "samples of .* are none"),
        ((PIXELS[:0], LABELS[:0]), "samples of .* are none"),
        ((NUMBERS.to(torch.complex64), LABELS), "samples of .* are none"),
        ((torch.zeros(2, 2, device="meta"), LABELS[:2]), "no dense tensor of numbers"),
        ((SPARSE, LABELS[:4]), "no dense tensor of numbers"),
        ([{"input_ids": torch.tensor([1, 2]), "labels": 1}], "peftc makes tokens itself"),
        ([{"vector": torch.zeros(3), "labels": 1}], "are not read"),
        ([{"text": "a", "label": 0}, {"text": 3, "label": 0}], "`data` is no table"),
        ([{"text": "a", "label": 0}, {"words": "b"}], "row 1 of .* has no text"),
        ([{"text": "a", "label": None}], "has no label"),
        ([{"text": "a", "label": object()}], "`data` is no table"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)  # fmt: skip
def test_what_is_not_taken_is_refused_in_words(data: Any, text: str) -> None:
    with pytest.raises(PeftcError, match=f"(?s){text}") as caught:
        opened(data)
    assert "--data '" not in str(caught.value)


def test_numbers_that_are_none_are_refused_when_they_are_read() -> None:
    bad = NUMBERS.clone()
    bad[2, 0, 0, 0] = float("nan")
    found = opened((bad, LABELS))
    with pytest.raises(DataError, match="sample 2 of .* contains NaN"):
        [found[at] for at in range(6)]


def test_tensors_have_no_columns() -> None:
    with pytest.raises(DataError, match="has no columns"):
        opened((PIXELS, LABELS), label_column="y")


# through the steps


@pytest.fixture
def digits() -> dict[str, Any]:
    from sklearn.datasets import load_digits

    found = load_digits(n_class=5)
    pixels = torch.tensor(found.images * 15).to(torch.uint8)
    target = torch.tensor(found.target)
    return {"train": (pixels[:64], target[:64]), "test": (pixels[64:104], target[64:104])}


def test_a_chain_on_given_data_is_done_once_and_says_what_it_read(
    digits: Any, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = peftc.decompose(tiny_vit, ratio=0.5, data=digits, calibration_samples=32, output_dir="small")
    assert small.parameters
    tuned = peftc.finetune("small", data=digits, steps=2, batch_size=8, output_dir="tuned")
    again = peftc.finetune("small", data={**digits}, steps=2, batch_size=8, output_dir="tuned")
    assert any("already done" in note for note in again.notes)
    other = {**digits, "train": (digits["train"][0], digits["train"][1].flip(0))}
    with pytest.raises(PeftcError, match="another request"):
        peftc.finetune("small", data=other, steps=2, batch_size=8, output_dir="tuned")
    assert tuned.artifact is not None
    request = json.loads((tuned.artifact / "peftc.json").read_text())["steps"][-1]["request"]
    assert request["data"]["spec"] == spec_of(digits, Reading()) and len(request["data"]["digest"]) == 64
    lines = peftc.show("tuned", commands=True).lines
    assert "--data DATA" in lines[-1] and "sha256" not in "".join(lines)
    measured = peftc.evaluate("tuned", data=digits["train"])
    assert any("calibrated or taught the model" in text for text in measured.warnings), "known by its samples"
    assert type(measured.data["data"]["spec"]) is str
    json.dumps(measured.to_json())


def test_exports_of_other_data_are_other_exports(digits: Any, tiny_vit: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "safetensors", "rounds": 5, "output_dir": tmp_path / "out"}
    peftc.export(tiny_vit, data=digits["test"], **options)
    with pytest.raises(PeftcError, match="another request"):
        peftc.export(tiny_vit, data=(digits["test"][0].flip(0), digits["test"][1]), **options)
    report = peftc.export(tiny_vit, data=digits["test"], **options)
    assert any("already done" in note for note in report.notes)


def test_language_models_read_lists_of_texts(tiny_llama: Path) -> None:
    report = peftc.evaluate(tiny_llama, data=TEXTS * 8, max_length=8)
    assert report.quality_unit == "perplexity" and report.quality is not None and report.quality > 1


@pytest.mark.parametrize(
    "step", ["evaluate", "finetune", "distill", "decompose", "calibrate", "analyze", "prune_layers"]
)
def test_every_step_that_reads_data_refuses_what_is_none(step: str, tiny_vit: Path, tmp_path: Path) -> None:
    call: Callable[..., Any] = getattr(peftc, step)
    more = {"decompose": {"ratio": 0.5}, "finetune": {}, "distill": {"teacher": tiny_vit}}.get(step, {})
    with pytest.raises(DataError, match="is a generator"):
        call(tiny_vit, data=(each for each in TEXTS), **more)


def test_a_project_file_names_its_data(tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="a project file names its data"):
        peftc.init(tiny_vit, data=TEXTS)  # type: ignore[arg-type]


def test_labels_that_are_no_classes_are_refused_with_what_to_give(tiny_vit: Path) -> None:
    for labels in (torch.rand(6), None):
        data = NUMBERS if labels is None else (NUMBERS, labels)
        with pytest.raises(DataError, match="needs a class for each sample") as caught:
            peftc.evaluate(tiny_vit, data=data)
        assert "give labels as `(input, label)`" in str(caught.value) and "--data" not in str(caught.value)
