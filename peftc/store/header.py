"""Read and write safetensors headers with the standard library alone.

The format (github.com/huggingface/safetensors): eight bytes of little-endian header length, a JSON object
from tensor name to dtype, shape and byte range, then the bytes. Every rule that the format states is checked
here, so that a damaged or hostile file is refused before anything is mapped.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftc.errors import WeightError
from peftc.store import pointers

NAMES = "U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 I64 U64 F64 C64".split()
DTYPE_BITS = {"BOOL": 8} | {name: int(re.findall(r"\d+", name)[0]) for name in NAMES}
HEADER_LIMIT = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype name, shape, and where its bytes lie in ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def _refuse(path: Path, why: str) -> WeightError:
    return WeightError(
        f"`{path}` is not a whole safetensors file",
        why=why,
        hint="download or write the file again; peftc reads nothing from a damaged one",
    )


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        WeightError: the file is truncated, a pointer to one that was not fetched, or its header breaks a rule of the
            format.
    """
    pointers.refuse(path, WeightError)
    end = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _refuse(path, f"it has {len(prefix)} bytes; the header length alone takes 8")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(end - 8, HEADER_LIMIT):
            raise _refuse(path, f"its header claims {length:,} bytes; the file has {end:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _refuse(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refuse(path, "its metadata is not a map of strings")
    position = 8 + length
    tensors = {name: _tensor_info(path, name, entry, position) for name, entry in header.items()}
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            raise _refuse(path, f"`{name}` starts at byte {info.start:,}, not at {position:,}: a hole or an overlap")
        position = info.stop
    if position != end:
        raise _refuse(path, f"its tensors end at byte {position:,}; the file has {end:,}")
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        raise ValueError("a name appears twice")
    return seen


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _refuse(path, f"`{name}` has no sound dtype, shape and byte range")
    if dtype not in DTYPE_BITS:
        raise _refuse(path, f"`{name}` has dtype `{dtype}`, which is not one of {', '.join(DTYPE_BITS)}")
    if stop - start != math.prod(shape) * DTYPE_BITS[dtype] // 8:
        raise _refuse(path, f"`{name}` has shape {list(shape)} but {stop - start:,} bytes")
    return TensorInfo(path, dtype, shape, base + start, base + stop)


def encode_header(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Return the bytes before the data of a file that holds ``entries`` (dtype, shape) in their order.

    Metadata keys are sorted and the header is padded to 8 bytes, so equal content gives equal files and
    every tensor is aligned for mapping.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, (dtype, shape) in entries.items():
        stop = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
