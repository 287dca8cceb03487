"""What `--data` reads, what it picks, and what it refuses."""

import gzip
import io
import json
import os
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from peftc.data import open_data
from peftc.data.classes import match
from peftc.data.given import spec_of
from peftc.data.images import decode, transform, with_mode
from peftc.errors import DataError, UsageError
from peftc.options import Reading


def picture(shade: int, ending: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 100, 200 - shade)).save(file, ending)
    return file.getvalue()


def fill(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def zipped(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


SPLIT = ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png", "test/dog/5.png"]


# pixels


def stored(image: Any, **how: Any) -> Image.Image:
    """Return an image as it is read from a file."""
    file = io.BytesIO()
    image.save(file, **how)
    return with_mode(decode(file.getvalue(), "a"), "L", "a")


def test_sixteen_bits_are_scaled() -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    file = b"P5 16 16 65535\n" + (ramp * 257).astype(">u2").tobytes()  # older Pillows read such files, and write none
    assert np.array_equal(np.asarray(with_mode(decode(file, "a"), "L", "a")), ramp), "PPM"
    for ending in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(stored(Image.fromarray(ramp * 257), format=ending)), ramp), ending
    assert np.array_equal(np.asarray(with_mode(ramp * 257, "L", "a")), ramp), "an array too"


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_pixels_without_a_range_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="numbers .*per pixel"):
        stored(Image.fromarray(np.ones((4, 4), kind)), format="TIFF")


@pytest.mark.parametrize("way", range(1, 9))
def test_images_are_turned_as_their_exif_data_says(way: int) -> None:
    lying, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 9), Image.Exif()
    exif[0x0112] = way
    turned = np.asarray(stored(lying, format="PNG", exif=exif.tobytes()))
    pixels = np.asarray(lying)
    right = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.T,
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].T, 8: np.rot90(pixels),
    }  # fmt: skip
    assert np.array_equal(turned, right[way])


def test_exif_data_that_cannot_be_read_are_passed_over() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for exif in (bytes(range(1, 200)), b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"):
        assert stored(image, format="JPEG", exif=exif).size == (8, 8)


# class folders


def test_class_folders_give_sorted_classes_and_images(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path, ["dog/b.png", "cat/a.png", "cat/deep/c.png"])))
    assert (data.kind, data.classes, len(data)) == ("image", ["cat", "dog"], 3)
    image, label = data[0]
    assert (image.size, label) == ((12, 10), 0)


def test_test_is_preferred_and_the_note_says_so(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path, SPLIT)))
    assert (data.split, len(data)) == ("test", 3)
    assert "split `test`" in data.notes[0] and "`train`" in data.notes[0]


@pytest.mark.parametrize(
    ("there", "chosen"),
    [(["train", "val"], "val"), (["train", "dev"], "dev"), (["train"], "train"), (["test"], "test")],
)
def test_without_a_test_split_the_held_out_one_is_taken(tmp_path: Path, there: list[str], chosen: str) -> None:
    data = open_data(str(fill(tmp_path, [f"{split}/cat/1.png" for split in there])))
    assert data.split == chosen
    assert f"`{chosen}`" in data.notes[0]


@pytest.mark.parametrize("asked", ["train", "training"])
def test_a_split_is_picked_with_at(tmp_path: Path, asked: str) -> None:
    assert open_data(f"{fill(tmp_path, SPLIT)}@{asked}").split == "train"


def test_an_absent_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split `val`[\s\S]*`test`, `train`[\s\S]*@test"):
        open_data(f"{fill(tmp_path, SPLIT)}@val")


def test_a_zip_reads_like_its_folder_with_or_without_a_folder_around_it(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", SPLIT)
    datas = [
        open_data(str(path))
        for path in (folder, zipped(folder, tmp_path / "a.zip"), zipped(folder, tmp_path / "b.zip", "set/"))
    ]
    assert {data.split for data in datas} == {"test"}
    assert [data[1][1] for data in datas] == [1, 1, 1]
    assert all(np.array_equal(np.array(data[2][0]), np.array(datas[0][2][0])) for data in datas)


def test_images_in_no_folder_have_no_labels(tmp_path: Path) -> None:
    flat = fill(tmp_path / "flat", ["1.png", "2.png", "3.png"])
    for path in (flat, zipped(flat, tmp_path / "flat.zip")):
        data = open_data(str(path), num_samples=2)
        assert (data.kind, data.labels, data.classes, data.split, len(data)) == ("image", None, None, "all", 2)
        assert data[0][0].size == (12, 10) and data[0][1] is None
    (flat / "empty").mkdir()
    with pytest.raises(DataError, match="3 images of .* outside class folders"):
        open_data(str(flat))


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path, ["train/ant/1.png", "train/bee/2.png", "test/bee/3.png"])))
    assert (data.classes, data[0][1]) == (["ant", "bee"], 1)


def test_the_digest_depends_on_bytes_names_and_samples_only(tmp_path: Path) -> None:
    one, same = (fill(tmp_path / name, ["cat/a.png", "dog/b.png"]) for name in ("one", "same"))
    other = fill(tmp_path / "other", ["cat/a.png", "dog/c.png"])
    digests = [open_data(str(path)).digest for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert open_data(str(one), num_samples=1).digest != digests[0]
    (same / "cat/a.png").write_bytes(picture(99))
    assert open_data(str(same)).digest != digests[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "cat/2.png"], r"1 images of .* outside class folders[\s\S]*`1.png`"),
        ([], "holds no images"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(str(fill(tmp_path, names)))


def test_an_empty_class_folder_is_refused_by_name(tmp_path: Path) -> None:
    (fill(tmp_path, SPLIT) / "test" / "eel").mkdir()
    with pytest.raises(DataError, match=r"hold no image[\s\S]*`eel`"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no image", picture(1)[:50], picture(3, "JPEG", (90, 90))[:300]])
def test_a_damaged_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (fill(tmp_path, ["cat/a.png"]) / "cat" / "b.png").write_bytes(content)
    data = open_data(str(tmp_path))
    with pytest.raises(DataError, match=r"cat/b.png` is no whole image"):
        data[1]


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    whole = zipped(fill(tmp_path / "set", SPLIT), tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(DataError, match="no whole zip"):
        open_data(str(tmp_path / "b.zip"))


# subsets


def test_a_subset_is_seeded_and_balanced(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label, count in (("a", 9), ("b", 2), ("c", 5)) for number in range(count)]
    folder = str(fill(tmp_path, names))
    data = open_data(folder, num_samples=8, seed=3)
    assert Counter(data[index][1] for index in range(8)) == {0: 3, 1: 2, 2: 3}
    assert data.rows == open_data(folder, num_samples=8, seed=3).rows != open_data(folder, num_samples=8, seed=4).rows


def test_a_subset_larger_than_the_data_is_the_data(tmp_path: Path) -> None:
    assert len(open_data(str(fill(tmp_path, SPLIT)), num_samples=99)) == 3
    with pytest.raises(UsageError, match="`--num-samples` is 0"):
        open_data(str(tmp_path), num_samples=0)


# tables


def table(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows(data: Any) -> list[Any]:
    return [data[index] for index in range(len(data))]


def test_a_csv_with_a_header_gives_texts_and_classes(tmp_path: Path) -> None:
    data = open_data(table(tmp_path / "test.csv", 'text,category\n"hello, you",greet\nbye,leave\nNA,greet\n'))
    assert (data.kind, data.split, data.classes) == ("text", "test", ["greet", "leave"])
    assert rows(data) == [("hello, you", 0), ("bye", 1), ("NA", 0)]


def test_a_csv_without_a_header_loses_no_row(tmp_path: Path) -> None:
    data = open_data(table(tmp_path / "sts.csv", "A dog.,A cat.,2.5\nOne.,Two.,5.0\nUp.,Down.,0\n"))
    assert (data.kind, data.classes) == ("pairs", None)
    assert rows(data) == [(("A dog.", "A cat."), 2.5), (("One.", "Two."), 5.0), (("Up.", "Down."), 0.0)]
    assert any(note.startswith("guessed: the first row of `sts.csv` is data") for note in data.notes)


SMS = "".join(("spam" if at % 2 else "ham") + f",message number {at} for you\n" for at in range(40))


def test_a_header_of_unusual_names_is_recognised(tmp_path: Path) -> None:
    file = table(tmp_path / "sms.csv", "v1,v2\n" + SMS)
    with pytest.raises(DataError, match=r"no column of a usual name[\s\S]*`v1`, `v2`[\s\S]*sms.csv\?text=NAME'"):
        open_data(file)
    data = open_data(f"{file}?text=v2&label=v1")
    assert (len(data), data.classes, data[0]) == (40, ["ham", "spam"], ("message number 0 for you", 0))
    data = open_data(table(tmp_path / "bare.csv", SMS))
    assert (len(data), data.classes) == (40, ["ham", "spam"])
    assert any(note.startswith("guessed: ") and "`label`, `text`" in note for note in data.notes)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_label_is_refused_with_its_row(tmp_path: Path, name: str, empty: str | None) -> None:
    labels = ["pos", "neg", empty, "pos"]
    if name == "a.csv":
        text = "text,label\n" + "".join(f"film {at},{label or ''}\n" for at, label in enumerate(labels))
    else:
        text = "".join(json.dumps({"text": f"film {at}", "label": label}) + "\n" for at, label in enumerate(labels))
    with pytest.raises(DataError, match="row 2 of .* has no label in column `label`"):
        open_data(table(tmp_path / name, text))


def test_labels_that_are_one_number_stay_apart(tmp_path: Path) -> None:
    data = open_data(table(tmp_path / "a.csv", "text,label\na,01\nb,1\nc,002\nd,1\n"))
    assert data.classes == ["01", "1", "002"]
    assert [label for _, label in rows(data)] == [0, 1, 2, 1]
    assert match(["01", "1"], None, 2)[0] == [0, 1], "two outputs, and not twice the one numbered 1"
    assert match(["01", "1"], ["1", "01"], 2)[0] == [1, 0]
    assert open_data(table(tmp_path / "b.csv", "text,label\na,1.0\nb,0.0\n")).classes == ["0", "1"]


def test_a_table_of_semicolons_is_read(tmp_path: Path) -> None:
    data = open_data(table(tmp_path / "a.csv", 'text;label\n"well; then, yes";good\nno, thanks;bad\n'))
    assert rows(data) == [("well; then, yes", 1), ("no, thanks", 0)]
    assert any("separated by `;`" in note for note in data.notes)
    assert rows(open_data(table(tmp_path / "b.csv", "text\nyes; no\nwell; then\n"))) == [
        ("yes; no", None),
        ("well; then", None),
    ]


@pytest.mark.parametrize("spec", ["{0}/a.csv?text=t%40x&label=a b@test", "{0}/a.csv@test?text=t%40x&label=a b"])
def test_columns_and_split_stand_in_the_spec(tmp_path: Path, spec: str) -> None:
    (tmp_path / "a.csv").mkdir()
    for split in ("train", "test"):
        table(tmp_path / "a.csv" / f"{split}.csv", f"t@x,other,a b\n{split} one,k,yes\n{split} two,l,no\n")
    assert rows(open_data(spec.format(tmp_path))) == [("test one", 1), ("test two", 0)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0}?tweet=a", "unknown value `tweet`"),
        ("{0}?text=", "names no column"),
        ("{0}?text=nothing", "has no column `nothing`"),
        ("{0}?text=text&text=label", "names one again"),
        ("sklearn:digits?text=text", "`sklearn:digits` has no columns"),
    ],
)
def test_a_spec_that_names_no_column_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    file = table(tmp_path / "a.csv", "text,label\nx,y\n")
    with pytest.raises((DataError, UsageError), match=message):
        open_data(spec.format(file))


def test_a_column_is_named_once(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", "text,title,label\nx,z,y\n")
    assert rows(open_data(spec_of(f"{file}?text=title", Reading(text_column="title")))) == [("z", 0)]
    with pytest.raises(UsageError, match="names `title` as the text column, and `--text-column` names `text`"):
        spec_of(f"{file}?text=title", Reading(text_column="text"))


def test_a_file_may_be_called_as_a_spec_looks(tmp_path: Path) -> None:
    assert len(open_data(table(tmp_path / "a?text=b.csv", "text,label\nx,y\n"))) == 1


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.tsv", "sentence\tlabel\nit's \"5 o'clock\tgood\nbad film\tbad\n", "text"),
        ("a.tsv", "premise\thypothesis\tlabel\na\tb\t1\nc\td\t0\n", "pairs"),
        ("a.jsonl", '{"text": "x", "label": 3}\n{"text": "y", "label": 7}\n', "text"),
        ("a.csv", "I love it,good\nI hate it so much,bad\n", "text"),
        ("a.csv", "good,I love it\nbad,I hate it so much\n", "text"),
        ("a.csv", "one line without any label\n", "text"),
    ],
)
def test_columns_are_guessed(tmp_path: Path, name: str, text: str, kind: str) -> None:
    data = open_data(table(tmp_path / name, text))
    assert data.kind == kind
    assert len(data) == text.count("\n") - ("label" in text and "jsonl" not in name and "any" not in text)


def test_a_parquet_file_reads_like_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "test.parquet"
    datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, 1]}).to_parquet(str(file))
    assert rows(open_data(str(file))) == [("a", 1), ("b", 0), ("c", 1)]


def test_a_parquet_file_of_images_gives_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "test.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    pictures = [{"bytes": picture(shade), "path": None} for shade in (1, 2)]
    datasets.Dataset.from_dict({"image": pictures, "label": [1, 0]}, features=features).to_parquet(str(file))
    data = open_data(str(file))
    assert (data.kind, data.classes, data[0][0].size, data[0][1]) == ("image", ["x", "y"], (12, 10), 1)


def test_columns_named_by_the_user_overrule(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", "text,title,label,topic\nlong,short,1,x\nlonger,shorter,2,y\n")
    assert rows(open_data(spec_of(file, Reading(text_column="title", label_column="topic")))) == [
        ("short", 0),
        ("shorter", 1),
    ]
    assert rows(open_data(spec_of(file, Reading(text_column="title,text"))))[0] == (("short", "long"), 0)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", "text,label\nx,y\n")
    with pytest.raises(DataError, match=r"no column `mood`[\s\S]*`text`, `label`"):
        open_data(f"{file}?label=mood")
    with pytest.raises(DataError, match=r"no column of a usual name[\s\S]*b.jsonl\?text=NAME'"):
        open_data(table(tmp_path / "b.jsonl", '{"foo": "x", "bar": "y"}\n'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,label\nx,y\n1,2,3,4\n", "cannot read"),
        ("a.jsonl", "not json\n", "cannot read"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "row 0 .* has no text"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "row 0 .* has no label"),
        ("a.parquet", "not parquet", "cannot read"),
        ("a.txt", "  \n", "is empty"),
        ("a.docx", "x", "cannot read data from"),
        ("a.npz", "x", "no whole .npz"),
        ("a.zip", "x", "no whole zip"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(table(tmp_path / name, content))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        open_data(str(tmp_path / "a.txt"))


def test_a_missing_path_is_refused_with_the_forms_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data at[\s\S]*sklearn:digits"):
        open_data(str(tmp_path / "gone"))


def test_a_folder_of_tables_has_a_split_per_file(tmp_path: Path) -> None:
    for split, label in (("train", "x"), ("dev", "y"), ("test", "z")):
        table(tmp_path / f"set-{split}.csv", f"text,label\nhello,{label}\n")
    assert open_data(str(tmp_path)).classes == ["z"]
    assert open_data(f"{tmp_path}@dev").classes == ["y"]


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", "sentence1,sentence2,score\na,b,1\nc,d,high\n")
    with pytest.raises(DataError, match=r"row 1 .* no finite score[\s\S]*'high'"):
        open_data(file, task="sentence-similarity")


def test_a_hub_data_set_reads_from_a_folder_of_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split, label in (("train", "x"), ("test", "z")):
        table(tmp_path / f"{split}.csv", f"text,label\nhello,{label}\n")
    data = open_data(f"hf:{tmp_path}")
    assert (data.split, rows(data), data.classes) == ("test", [("hello", 0)], ["z"])


def test_a_hub_data_set_that_is_out_of_reach_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data set `nobody/nothing`[\s\S]*downloaded"):
        open_data("hf:nobody/nothing")


# arrays


def test_an_npz_of_the_mnist_kind_gives_images(tmp_path: Path) -> None:
    x, y = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4), np.array([3, 7, 3, 7, 9, 3])
    np.savez(tmp_path / "a.npz", x_train=x[:4], y_train=y[:4], x_test=x[4:], y_test=y[4:])
    data = open_data(str(tmp_path / "a.npz"))
    assert (data.kind, data.split, data.classes) == ("image", "test", ["3", "7", "9"])
    assert np.array_equal(data[0][0], x[4]) and [data[0][1], data[1][1]] == [2, 0]


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (4, 3, 6, 5), (4, 6, 5, 1), (4, 6, 5)])
def test_colour_channels_may_stand_first_or_last(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8), labels=np.arange(4)[:, None])
    data = open_data(str(tmp_path / "a.npz"))
    assert transform({"mean": [0.5] * 3, "std": [0.5] * 3})(data[0][0], "x").shape == (3, 6, 5)


def test_float_arrays_are_fed_as_they_are(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.full((2, 3, 4, 4), 0.25, np.float32), "y": np.array([0, 1])}, tmp_path / "a.safetensors")
    data = open_data(str(tmp_path / "a.safetensors"))
    assert data.kind == "tensor"
    assert torch.equal(data[0][0], torch.full((3, 4, 4), 0.25))
    assert any("as they are" in note for note in data.notes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"foo": np.zeros(3)}, r"no samples[\s\S]*`foo`"),
        ({"x": np.zeros((3, 2, 2), np.uint8), "y": np.zeros(2, int)}, r"shape \[2\][\s\S]*3 samples"),
        ({"x": np.zeros((3, 2), np.uint8), "y": np.zeros(3, int)}, r"uint8 values of shape \[3, 2\]"),
        ({"x": np.zeros((3, 2, 2), np.uint8), "y": np.array([0, 1, np.nan])}, "NaN"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path / "a.npz"))


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">2xBB{values.ndim}I", 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def test_idx_files_read_from_their_folder_or_by_name(tmp_path: Path) -> None:
    x = np.arange(3 * 4 * 4).reshape(3, 4, 4)
    y = np.array([2, 0, 1])
    for split, count in (("train", 3), ("t10k", 2)):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(x[:count]))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y[:count])))
    for spec in (str(tmp_path), str(tmp_path / "t10k-images-idx3-ubyte")):
        data = open_data(spec)
        assert (data.split, len(data), data[0][1]) == ("test", 2, data.classes.index("2") if data.classes else None)
        assert np.array_equal(data[1][0], x[1])
    assert len(open_data(f"{tmp_path}@train")) == 3


@pytest.mark.parametrize("content", [b"", b"\1\2\3\4", idx(np.zeros((3, 4, 4)))[:-1]])
def test_a_damaged_idx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="IDX file"):
        open_data(str(tmp_path))


def test_the_embedded_digits_are_split_once_and_for_all() -> None:
    train, test = open_data("sklearn:digits@train"), open_data("sklearn:digits")
    assert (len(train), len(test), test.split) == (1437, 360, "test")
    assert test.classes == [str(digit) for digit in range(10)]
    assert set(map(test.content, test.rows)) - set(map(train.content, train.rows))
    with pytest.raises(UsageError, match="unknown value `sklearn:iris`"):
        open_data("sklearn:iris")


# images to tensors


def test_images_are_read_as_the_model_was_trained_to_see_them() -> None:
    from timm.data import create_transform

    preprocess = {"input_size": [3, 16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_pct": 0.875}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    theirs = create_transform(
        (3, 16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop_pct=0.875, interpolation="bicubic"
    )
    assert torch.allclose(transform({**preprocess, "interpolation": "bicubic"})(image, "x"), theirs(image), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_image_gets_the_channels_the_model_reads(channels: int, mode: str) -> None:
    read = transform({"input_size": [channels, 8, 8], "mean": [0.5] * channels, "std": [0.5] * channels})
    assert read(Image.new(mode, (9, 12)), "x").shape == (channels, 8, 8)


def test_an_image_size_overrules_the_model_and_none_keeps_the_image() -> None:
    image = Image.new("RGB", (20, 30))
    assert transform({"input_size": [3, 8, 8]}, 16)(image, "x").shape == (3, 16, 16)
    assert transform({})(image, "x").shape == (3, 30, 20)


# classes


def test_wordnet_ids_find_their_imagenet_outputs() -> None:
    assert match(["n01440764", "n01443537", "n15075141"], None, 1000)[0] == [0, 1, 999]


@pytest.mark.parametrize("name", ["great white shark", "Great_White-Shark", "white shark", "carcharodon carcharias"])
def test_imagenet_names_and_synonyms_find_their_outputs(name: str) -> None:
    assert match([name], None, 1000)[0] == [2]


def test_class_names_of_the_model_come_before_order() -> None:
    assert match(["cat", "dog"], ["Dog", "CAT", "bird"], 3)[0] == [1, 0]


def test_class_indices_are_read_as_such() -> None:
    assert match(["1", "10", "2"], None, 11)[0] == [1, 10, 2]
    assert match(["0", "1", "2"], ["a", "b", "c"], 3)[0] == [0, 1, 2]


def test_a_model_without_names_is_matched_in_sorted_order_with_a_note() -> None:
    indices, note = match(["ant", "bee"], None, 2)
    assert indices == [0, 1]
    assert "sorted order" in note


@pytest.mark.parametrize(
    ("classes", "labels", "outputs", "message"),
    [
        (["cat", "zorb"], ["cat", "dog"], 2, "1 of 2 classes .* `zorb`"),
        (["n01440764", "n99999999"], None, 1000, "`n99999999`"),
        (["ant", "bee"], ["cat", "dog"], 2, "2 of 2 classes .* `ant`, `bee`"),
        (["ant", "bee"], None, 3, "cannot match 2 classes with a model of 3 outputs"),
        ([str(digit) for digit in range(10)], None, 1000, "cannot match 10 classes"),
        (["crane"], None, 1000, "ambiguous"),
        (["tench", "tinca_tinca"], None, 1000, "same output"),
    ],
)
def test_a_mismatch_is_refused_naming_the_classes(
    classes: list[str], labels: list[str] | None, outputs: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        match(classes, labels, outputs)


@pytest.mark.real
@pytest.mark.parametrize(
    ("spec", "kind", "split", "samples", "classes"),
    [
        ("imagenet_sample/imagenet_sample_150.zip", "image", "test", 150, 150),
        ("cifar10_jpg/cifar10_jpg_5k2k.zip", "image", "test", 2000, 10),
        ("sign_digits/sign_digits_dev.zip@train", "image", "train", 827, 10),
        ("mnist/mnist_10k2k.npz", "image", "test", 2000, 10),
        ("banking77", "text", "test", 3080, 77),
        ("stsb_en/stsb-en-dev.csv", "pairs", "dev", 1500, None),
    ],
)
def test_real_data_is_read_whole(
    data_folder: Path, spec: str, kind: str, split: str, samples: int, classes: int | None
) -> None:
    data = open_data(os.fspath(data_folder / "sets" / spec))
    assert (data.kind, len(data), data.classes and len(data.classes)) == (kind, samples, classes)
    assert data.split in (split, "validation")
