"""Damaged and hostile files of data: each is refused, names the limit that it passed, and takes little memory."""

import gzip
import io
import os
import random
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from peftc.data import limits, open_data
from peftc.data.images import reader
from peftc.errors import DataError, PeftcError, UsageError

PREPROCESS = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
MOST = 300 << 10  # kB that a refusal may cost


def read(spec: object, **options: Any) -> None:
    data = open_data(str(spec), **options)
    for index in {0, len(data) - 1}:
        data[index]
    if data.kind == "image":
        reader(data, PREPROCESS)([0, len(data) - 1])


def refused(spec: object, match: str, **options: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=match) as refusal:
        read(spec, **options)
    assert len(str(refusal.value)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST


def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), chunk(b"IDAT", zlib.compress(body)),
    ]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def grey(width: int, height: int) -> bytes:
    return png(width, height, bytes(width + 1) * height)


BMP = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
GIF = b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0)
IMAGES = {
    "a png of 3.6 billion pixels": (png(60000, 60000), "178956970 pixels"),
    "a bmp of 3.6 billion pixels": (BMP, "178956970 pixels"),
    "a gif of 3.6 billion pixels": (GIF + b"\x02\0;", "178956970 pixels"),
    "a ppm of 3.6 billion pixels": (b"P6 60000 60000 255\n" + bytes(99), "178956970 pixels"),
    "a png that is cut": (png(5000, 5000), "no whole image"),
    "an image that is a line": (grey(1, 60000), "500 times"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n", "no known"),
}


def folder(root: Path, content: bytes) -> Path:
    (root / "cat").mkdir(parents=True)
    (root / "cat/a.png").write_bytes(grey(3, 3))
    (root / "cat/b.png").write_bytes(content)
    return root


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("content", "match"), IMAGES.values(), ids=IMAGES)
def test_an_image_that_promises_more_than_there_is_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    refused(folder(tmp_path / "set", content), match)


def test_large_images_are_read_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftc.data.images.MANY_PIXELS", 50)
    content = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(content, "PNG")
    data = open_data(str(folder(tmp_path / "set", content.getvalue())))
    large = reader(data, PREPROCESS)([1, 0])
    monkeypatch.undo()
    assert torch.equal(large, reader(data, PREPROCESS)([1, 0]))
    monkeypatch.setattr("peftc.data.images.MANY_PIXELS", 50)
    with pytest.raises(DataError, match="no whole image"):
        read(folder(tmp_path / "cut", content.getvalue()[:300]))


def test_a_member_of_a_zip_that_unpacks_to_more_than_an_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftc.data.images.IMAGE_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.png", bytes(64 << 20))
    refused(tmp_path / "a.zip", r"a.zip/cat/a.png` is too large[\s\S]*1.05 MB")


def test_empty_parts_of_names_in_a_zip_are_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("train//cat/a.png", "train/dog//b.png", "/train/dog/c.png"):
            archive.writestr(name, grey(3, 3))
    read(tmp_path / "a.zip")
    assert open_data(str(tmp_path / "a.zip")).classes == ["cat", "dog"]


# arrays


def npz(path: Path, header: str, body: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + body)
    return path


HEADERS = {
    "a shape of terabytes": ("{'descr':'<f8','fortran_order':False,'shape':(99999999999,9),}", b"", "0 bytes follow"),
    "a negative shape": ("{'descr':'<f8','fortran_order':False,'shape':(-1,-9),}", bytes(72), "shape -1 x -9"),
    "objects": ("{'descr':'|O','fortran_order':False,'shape':(1,9),}", bytes(72), "dtype `object`"),
    "a record": ("{'descr':[('a','<i4')],'fortran_order':False,'shape':(2,1),}", bytes(8), "no plain array"),
    "nothing, often": ("{'descr':'|S0','fortran_order':False,'shape':(99999999999,9),}", b"", "no plain array"),
    "forty axes": (f"{{'descr':'<f8','fortran_order':False,'shape':({'1,' * 40}),}}", bytes(8), "40 axes"),
    "a deep literal": ("-" * 9000 + "1", b"", "too deep"),
    "brackets": ("(" * 9000, b"", "too deep|no whole"),
    "no shape": ("{'descr':'<f8','fortran_order':3,'shape':[1],}", bytes(8), "no whole"),
}


@pytest.mark.parametrize(("header", "body", "match"), HEADERS.values(), ids=HEADERS)
def test_an_npz_whose_header_is_not_what_follows_is_refused(
    tmp_path: Path, header: str, body: bytes, match: str
) -> None:
    refused(npz(tmp_path / "a.npz", header, body), match)


ARRAYS = {
    "no axes": ({"x": np.uint8(3)}, "shape \\[\\]"),
    "no samples": ({"x": np.zeros((0, 2))}, "shape \\[0, 2\\]"),
    "no pixels": ({"x": np.zeros((2, 0, 3), np.uint8)}, "shape \\[2, 0, 3\\]"),
    "lines": ({"x": np.zeros((2, 1, 9000), np.uint8)}, "500 times"),
    "words as labels": ({"x": np.zeros((2, 2)), "y": np.array(["a", "b"])}, "no plain array"),
    "complex numbers": ({"x": np.zeros((2, 2), complex)}, "no plain array"),
    "dates": ({"x": np.zeros((2, 2), "M8[s]")}, "no plain array"),
    "labels beyond 64 bits": ({"x": np.zeros((2, 2)), "y": np.array([2**63, 1], np.uint64)}, "too large"),
    "labels that are huge": ({"x": np.zeros((2, 2)), "y": np.array([1e300, 1])}, "too large"),
    "beyond float32": ({"x": np.full((2, 2), 1e300)}, "infinite"),
}


@pytest.mark.parametrize(("arrays", "match"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", match)


def test_arrays_in_columns_and_of_half_precision_are_read(tmp_path: Path) -> None:
    x = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.array([True, False]), more=np.array([None], object))
    data = open_data(str(tmp_path / "a.npz"))
    assert data[1][0][0].tolist() == x[1].tolist() and "`more`" in data.notes[-2]
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool):
        save_file({"x": torch.ones(2, 3).to(dtype)}, tmp_path / "a.safetensors")
        assert open_data(str(tmp_path / "a.safetensors"))[1][0].tolist() == [1, 1, 1]
    try:
        save_file({"x": torch.ones(2, 3, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    except KeyError:
        pytest.skip("this safetensors has no complex numbers")
    refused(tmp_path / "a.safetensors", "are none|cannot read")


@pytest.mark.parametrize("packed", [np.savez_compressed, None], ids=["npz", "idx"])
def test_what_unpacks_to_a_hundred_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Any
) -> None:
    monkeypatch.setattr(limits, "UNPACKED", 1 << 20)
    path = tmp_path / "a.npz"
    if packed:
        packed(path, x=np.zeros((99, 300, 300), np.uint8))
    else:
        path = tmp_path / "t10k-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(idx_header(99, 300, 300) + bytes(99 * 300 * 300)))
    refused(path, r"would unpack to 8.91 MB[\s\S]*100 times that, or 1.05 MB")


def idx_header(*shape: int) -> bytes:
    return struct.pack(f">2xBB{len(shape)}I", 8, len(shape), *shape)


IDX = {
    "a shape of terabytes": (idx_header(60000, 60000, 60000), "216,000,000,000,000 bytes"),
    "255 axes": (b"\0\0\x08\xff" + b"\xff" * 1020, "no IDX"),
    "no axes": (b"\0\0\x08\0x", "no IDX"),
    "a shape that is cut": (b"\0\0\x08\3\0\0", "no whole IDX"),
    "no samples": (idx_header(0, 9, 9), "shape \\[0, 9, 9\\]"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("content", "match"), IDX.values(), ids=IDX)
def test_an_idx_header_that_is_not_what_follows_is_refused(
    tmp_path: Path, content: bytes, match: str, ending: str
) -> None:
    packed = gzip.compress(content) if ending else content
    (tmp_path / f"t10k-images-idx3-ubyte{ending}").write_bytes(packed)
    refused(tmp_path, match if not (ending and "bytes" in match) else "would unpack")


# tables


def deep(brackets: tuple[str, str]) -> str:
    return '{"text": "x", "label": ' + brackets[0] * 5000 + "1" + brackets[1] * 5000 + "}\n"


TABLES = {
    "deep lists": ("a.jsonl", deep(("[", "]")), "row 1 JSON lies in JSON more than 100 times"),
    "deep objects": ("a.jsonl", deep(('{"a":', "}")), "more than 100 times"),
    "brackets in a text": ("a.jsonl", '{"text": "' + "[" * 5000 + '"}\n', None),
    "a list of rows": ("a.jsonl", '[{"text": "x"},\n {"text": "y"}]\n', None),
    "mixed numbers and words": ("a.jsonl", '{"text": "x"}\n{"text": 1}\n', None),
    "mixed values in a column that is not read": ("a.jsonl", '{"text": "x", "z": [1, {}]}\n{"text": "y"}\n', None),
    "half a character": ("a.jsonl", '{"text": "x\\ud800"}\n', "row 0 .* has no text"),
    "no object": ("a.jsonl", "3\n", "row 1 is no object"),
    "no number": ("a.jsonl", '{"text": "x", "label": NaN}\n', "`NaN` is no number"),
    "a number of 5,000 digits": ("a.jsonl", '{"text": "x", "label": ' + "9" * 5000 + "}\n", "row 1: .*4300"),
    "a class of 5,000 digits": ("a.csv", "text,label\na," + "9" * 5000 + "\nb,1\n", None),
    "a key per row": ("a.jsonl", "".join(f'{{"k{at}": 1}}\n' for at in range(7000)), "would unpack to"),
    "a row of 10,001 keys": ("a.jsonl", "{" + ", ".join(f'"{at}": 1' for at in range(10001)) + "}\n", "10,000 columns"),
    "commas": ("a.csv", "," * 20000 + "\n", "more than 10,000 columns"),
    "zero bytes": ("a.csv", "te\0xt,label\na,b\n", "zero bytes"),
    "one row longer than the header": ("a.csv", "text,label\na,b,c\nd,e,f\n", "second has 3"),
    "images that are none": ("a.jsonl", '{"image": {"a": 1}, "label": "x"}\n', "no image"),
    "images that are numbers": ("a.jsonl", '{"image": 3, "label": "x"}\n', "holds no images"),
}


@pytest.mark.parametrize(("name", "text", "match"), TABLES.values(), ids=TABLES)
def test_a_table_is_read_or_refused(tmp_path: Path, name: str, text: str, match: str | None) -> None:
    (tmp_path / name).write_text(text)
    if match is None:
        read(tmp_path / name)
    else:
        refused(tmp_path / name, match)


def test_few_rows_of_many_columns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNPACKED", 1 << 20)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"k{at}": 1}}\n' for at in range(2000)))
    refused(tmp_path / "a.jsonl", "would unpack to 2.49 MB")


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_parquet_of_one_text_a_thousand_times_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_dictionary: bool
) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    monkeypatch.setattr(limits, "UNPACKED", 1 << 20)
    text = pyarrow.array(["x" * 10_000] * 1000)
    write_table(pyarrow.table({"text": text.dictionary_encode() if is_dictionary else text}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "would unpack to")


def test_names_that_look_like_patterns_are_names(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.csv").write_text("text,label\nx,y\n")
    read(tmp_path / "a[1]*.csv")


# folders


def test_links_that_go_round_are_refused(tmp_path: Path) -> None:
    there = folder(tmp_path / "set", grey(3, 3))
    (there / "cat/up").symlink_to("..")
    refused(there, r"has no end[\s\S]*cat/up")


def test_links_that_double_at_each_step_are_refused(tmp_path: Path) -> None:
    for step in range(30):
        (tmp_path / f"set/{step}").mkdir(parents=True)
        for name in ("a", "b") if step else ():
            (tmp_path / f"set/{step}/{name}").symlink_to(tmp_path / f"set/{step - 1}")
    folder(tmp_path / "set/0", grey(3, 3))
    refused(tmp_path / "set", "more than 16 times")


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    there = folder(tmp_path / "there", grey(3, 3))
    (tmp_path / "set/dog").mkdir(parents=True)
    (tmp_path / "set/cat").symlink_to(there / "cat")
    (tmp_path / "set/dog/c.png").symlink_to(there / "cat/a.png")
    data = open_data(str(tmp_path / "set"))
    assert (len(data), data.classes) == (3, ["cat", "dog"])


@pytest.mark.parametrize("name", ["cat/c.png", "train.csv", "train.txt", "train.parquet", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "a device"])
def test_what_would_never_end_is_not_read(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    there = folder(tmp_path / "set", grey(3, 3))
    make(there / name)
    refused(there, "a pipe or a device")
    with pytest.raises(PeftcError):
        read(there / name)


@pytest.mark.parametrize("spec", ["x" * 5000, "x" * 5000 + "@train", "~nobody-at-all/x", "a\0b", "/dev/null"])
def test_a_path_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(DataError):
        open_data(spec)


# names


def test_names_that_are_not_utf8_are_read_where_nothing_records_them(tmp_path: Path) -> None:
    there = folder(tmp_path / "set", grey(3, 3))
    (there / os.fsdecode(b"cat/caf\xe9.png")).write_bytes(grey(3, 3))
    (there / os.fsdecode(b"cat/caf\xea.png")).write_bytes(b"")
    data = open_data(str(there))
    assert len(data) == 4 and data[2][0].size == (3, 3)
    with pytest.raises(DataError, match=r"caf\\xea.png` is no whole image"):
        read(there)


def test_a_class_or_a_set_that_is_not_called_in_utf8_is_refused_by_name(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    there = folder(tmp_path / name, grey(3, 3))
    with pytest.raises(UsageError, match=r"caf\\xe9` is not UTF-8"):
        open_data(str(there))
    there = there.rename(tmp_path / "set")
    (there / "cat").rename(there / name)
    with pytest.raises(DataError, match=r"folder `caf\\xe9` is not UTF-8"):
        open_data(str(there))


# whatever comes


def forms(root: Path) -> dict[str, tuple[str, bytes]]:
    """One small file of each form."""
    noise, zipped, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(noise, "JPEG")
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.jpg", noise.getvalue())
        archive.writestr("dog/b.png", grey(3, 3))
    np.savez_compressed(arrays, x=pixels, y=np.arange(6))
    save_file({"x": torch.ones(4, 3, 6, 6), "y": torch.arange(4)}, root / "a.safetensors")
    found = {
        "jpg": ("set/cat/c.jpg", noise.getvalue()), "zip": ("a.zip", zipped.getvalue()),
        "npz": ("a.npz", arrays.getvalue()), "idx": ("t10k-images-idx3-ubyte", idx_header(6, 8, 8) + pixels.tobytes()),
        "safetensors": ("a.safetensors", (root / "a.safetensors").read_bytes()),
        "csv": ("a.csv", b'text,label\n"hello, you",a\nbye,b\n' * 3),
        "jsonl": ("a.jsonl", b'{"text": "x", "label": 1, "more": [{"a": null}]}\n' * 4),
    }  # fmt: skip
    for ending in ("PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        content = io.BytesIO()
        Image.fromarray(pixels[0]).convert("RGB").save(content, ending)
        found[ending] = (f"set/cat/c.{ending.lower()}", content.getvalue())
    return found


def changed(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, double or overwrite some of it."""
    kind, at = draw.randrange(4), draw.randrange(len(content))
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + content[max(0, at - draw.randrange(99)) :]
    wide = draw.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"[" * 300, b"\xed\xa0\x80", b"\r\0"])
    return content[:at] + wide + content[at + len(wide) :]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_whatever_is_done_to_a_file_it_is_read_or_refused(tmp_path: Path) -> None:
    whole = forms(tmp_path)
    folder(tmp_path / "set", grey(3, 3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(300):
        draw = random.Random(seed)
        name, content = whole[list(whole)[seed % len(whole)]]
        path = tmp_path / name
        path.write_bytes(changed(content, draw) if seed >= len(whole) else content)
        try:
            read(tmp_path / "set" if name.startswith("set/") else path)
        except PeftcError:
            assert seed >= len(whole), name
        path.unlink()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20
