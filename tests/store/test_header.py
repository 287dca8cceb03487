"""The standard-library reader agrees with the format, and refuses every damage by name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import WeightError
from peftc.store.header import DTYPE_BITS, encode_header, read_header


def file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_it_reads_what_the_library_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b.weight": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found, metadata = read_header(tmp_path / "m.safetensors")
    assert metadata == {"format": "pt"}
    assert {name: info.shape for name, info in found.items()} == {"a": (2, 3), "b.weight": (4,), "c": ()}
    assert {name: info.dtype for name, info in found.items()} == {"a": "F32", "b.weight": "BF16", "c": "I64"}
    content = (tmp_path / "m.safetensors").read_bytes()
    assert content[found["a"].start : found["a"].stop] == struct.pack("<6f", *range(6))
    assert found["a"].size == 6


def test_the_library_reads_what_it_writes(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    data = struct.pack("<4f", 1, 2, 3, 4)
    path = tmp_path / "m.safetensors"
    path.write_bytes(
        encode_header({"x": ("F32", (2, 2)), "e": ("F32", (0, 3))}, {"peftc": "id", "format": "pt"}) + data
    )
    assert load_file(path)["x"].tolist() == [[1, 2], [3, 4]]
    assert load_file(path)["e"].shape == (0, 3)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "peftc": "id"}


def test_equal_content_gives_equal_bytes_aligned_to_eight() -> None:
    entries = {"x": ("F32", (2, 2))}
    one, other = (encode_header(entries, dict(items)) for items in ([("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")]))
    assert one == other
    assert all(len(encode_header({"n" * k: ("F32", (1,))}, {})) % 8 == 0 for k in range(1, 9))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I8", "BOOL", "C64"])
def test_every_width_is_counted(tmp_path: Path, dtype: str) -> None:
    width = DTYPE_BITS[dtype] // 8
    info = read_header(file(tmp_path / "m", {"x": entry([3], 0, 3 * width, dtype)}, bytes(3 * width)))[0]["x"]
    assert info.stop - info.start == 3 * width


DAMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    ("it has 3 bytes", lambda path: path.write_bytes(b"abc")),
    ("it has 0 bytes", lambda path: path.write_bytes(b"")),
    ("claims 18,446,744,073,709,551,615 bytes", lambda path: path.write_bytes(b"\xff" * 8 + b"{}")),
    ("claims 100 bytes", lambda path: path.write_bytes(struct.pack("<Q", 100) + b"{}")),
    ("not JSON", lambda path: file(path, b"{'x'}")),
    ("not JSON", lambda path: file(path, b"[" * 100_000)),
    ("not JSON", lambda path: file(path, b"\xff\xfe")),
    ("a name appears twice", lambda path: file(path, b'{"x":{},"x":{}}')),
    ("not a JSON object", lambda path: file(path, [1])),
    ("metadata is not a map of strings", lambda path: file(path, {"__metadata__": {"a": 1}})),
    ("no sound dtype, shape and byte range", lambda path: file(path, {"x": 3})),
    ("no sound dtype", lambda path: file(path, {"x": entry([-1], 0, 4)}, bytes(4))),
    ("no sound dtype", lambda path: file(path, {"x": entry([True], 0, 4)}, bytes(4))),
    ("no sound dtype", lambda path: file(path, {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4))),
    ("dtype `X9`, which is not one of", lambda path: file(path, {"x": entry([1], 0, 4, "X9")}, bytes(4))),
    (r"shape \[2\] but 4 bytes", lambda path: file(path, {"x": entry([2], 0, 4)}, bytes(4))),
    ("starts at byte .* a hole or an overlap", lambda path: file(path, {"x": entry([1], 4, 8)}, bytes(8))),
    ("a hole or an overlap", lambda path: file(path, {"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, bytes(4))),
    ("its tensors end at byte", lambda path: file(path, {"x": entry([1], 0, 4)}, bytes(5))),
    ("its tensors end at byte", lambda path: file(path, {"x": entry([1], 0, 4)}, bytes(3))),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES, ids=[message for message, _ in DAMAGES])
def test_a_damaged_file_is_refused(tmp_path: Path, message: str, damage: Callable[[Path], Any]) -> None:
    damage(tmp_path / "m.safetensors")
    with pytest.raises(WeightError, match="is not a whole safetensors file") as refusal:
        read_header(tmp_path / "m.safetensors")
    assert refusal.match(message)
