"""The artifact folder: write its weights from byte ranges, read its tensor table, without torch."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from peftc.errors import ArtifactError, reason_of
from peftc.store import documents, pointers, results, verified
from peftc.store.header import DTYPE_BITS, TensorInfo, encode_header, read_header
from peftc.store.manifest import STATISTICS, Manifest, digest

MODEL, FACTORS, RESULT = "model", "factors", "result.json"  # the first two are stems of safetensors files
BLOCK = 1 << 20
SEEN_AT = {"leader": str, "side": str, "form": str, "lookup": bool, "rows": int, "width": int}  # of one module
NOTE = {  # what `statistics.json` has to say
    "needs": [str],
    "method": str,
    "samples": int,
    "data": {"spec": str, "split": str},
    "eligible?": [str],
    "collected": {"command": str},
    "request": {"batch_size": int},
    "modules": {str: SEEN_AT},
}


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: its dtype, shape, and a function that yields its bytes."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Any]]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def from_file(info: TensorInfo) -> Piece:
    """Return a piece that copies a tensor's bytes out of another file, a block at a time."""

    def blocks() -> Iterator[bytes]:
        left = info.stop - info.start
        with info.path.open("rb") as file:
            file.seek(info.start)
            while left:
                block = file.read(min(left, BLOCK))
                if not block:
                    raise ArtifactError(f"`{info.path}` became shorter while it was read", hint="run the command again")
                left -= len(block)
                yield block

    return Piece(info.dtype, info.shape, blocks)


def write_weights(
    folder: Path, pieces: dict[str, Piece], identity: str | None, max_shard_bytes: int, stem: str = MODEL
) -> dict[str, dict[str, Any]]:
    """Write ``pieces`` as one safetensors file, or as shards with an index, and return sha256 and bytes per file.

    Tensors are laid out wide dtypes first, then by name, so that every one is aligned and equal content gives
    equal bytes. Only one block is in memory at a time.
    """
    order = sorted(pieces, key=lambda name: (-DTYPE_BITS[pieces[name].dtype], name))
    shards: list[list[str]] = [[]]
    filled = 0
    for name in order:
        if shards[-1] and filled + pieces[name].size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += pieces[name].size
    files: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{part}.safetensors"
        files[file] = _write_shard(folder / file, {name: pieces[name] for name in names}, identity)
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(piece.size for piece in pieces.values())
        index = f"{stem}.safetensors.index.json"
        files[index] = write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": where})
    return files


def _write_shard(path: Path, pieces: dict[str, Piece], identity: str | None) -> dict[str, Any]:
    entries = {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}
    header = encode_header(entries, {"format": "pt"} | ({"peftc": identity} if identity else {}))
    total, written = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in chain([header], *(piece.blocks() for piece in pieces.values())):
            file.write(block)
            total.update(block)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": total.hexdigest(), "bytes": written}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a JSON file with sorted keys, whole or not at all, and return its sha256 and bytes."""
    return write_bytes(path, documents.pretty(value).encode())


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a small file durably, whole or not at all, and return its sha256 and bytes."""
    documents.write_whole(path, content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def write_companion(path: Path, content: bytes) -> dict[str, Any]:
    """Write a small file as `write_bytes` does, in a folder of its own if it has one."""
    path.parent.mkdir(exist_ok=True)
    written = write_bytes(path, content)
    documents.sync(path.parent)
    return written


def tensor_table(folder: Path, manifest: Manifest, *, factors: bool = False) -> dict[str, TensorInfo]:
    """Return every tensor of an artifact by name, from the headers of the files that its manifest lists.

    Args:
        folder, manifest: of the artifact; all of its files are checked.
        factors: return the ordered factors beside the network, not the network's own tensors.

    Raises:
        ArtifactError: a file is missing, has another length, or was written for another artifact; of those that hold no
            tensors, it has other bytes than the manifest promises (of tensors, `verified.check` says that).
        WeightError: a file is damaged.
    """
    table: dict[str, TensorInfo] = {}
    small: dict[str, Any] = {}
    weights = set(manifest.weight_files)
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            what = f"`{folder}` lacks the file `{name}`"
            raise ArtifactError(what, why="its manifest lists it", hint=verified.again(folder))
        if path.stat().st_size != entry["bytes"]:
            pointers.refuse(path, ArtifactError)
            why = f"its manifest says {entry['bytes']:,}"
            raise ArtifactError(f"`{path}` has {path.stat().st_size:,} bytes", why=why, hint=verified.again(folder))
        if name not in weights:
            small[name] = entry
            continue
        tensors, metadata = read_header(path)
        if metadata.get("peftc") != manifest.id:
            why = f"it was written for `{metadata.get('peftc', 'none')}`, the manifest is `{manifest.id}`"
            raise ArtifactError(f"`{path}` belongs to another artifact", why=why, hint=verified.again(folder))
        if name.startswith(FACTORS) != factors:
            continue
        twice = sorted(table.keys() & tensors.keys())
        if twice:
            raise ArtifactError(f"`{twice[0]}` stands in two files of `{folder}`")
        table.update(tensors)
    verified.check(folder, small)
    if not table and not manifest.delta:
        what = "factors" if factors else "weights"
        raise ArtifactError(f"`{folder}` holds no {what}", why="its manifest lists no safetensors file of them")
    return table


def statistics_note(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what is known of the statistics in a folder; an `ArtifactError` where it holds none, or damaged ones."""
    name = f"{STATISTICS}.json"
    if not manifest.holds_statistics or name not in manifest.files:
        why = f"its manifest lists no `{STATISTICS}.safetensors`"
        hint = "`peftc calibrate MODEL --data DATA -o stats` writes them"
        raise ArtifactError(f"`{folder}` holds no statistics", why=why, hint=hint)
    return dict(documents.read_shaped(folder / name, NOTE, ArtifactError, "collect them again"))


def read_result(folder: Path) -> dict[str, Any]:
    """Return what an artifact's ``result.json`` holds; empty where it is gone or damaged."""
    return _result(folder)[0]


def damaged_result(folder: Path) -> str | None:
    """Return a warning where a ``result.json`` is damaged, so that nothing of it is used; None where all is well."""
    why = _result(folder)[1]
    return why and f"`{folder / RESULT}` is damaged ({why}): what it says of figures is left out"


def _result(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return what a ``result.json`` says, and why nothing of it is used."""
    try:
        found = documents.read_json(folder / RESULT)
        why = results.misfit(found) or (None if found else "it says nothing")
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, reason_of(error)
    return ({}, why) if why else (found, None)


def add_measured(folder: Path, kind: str, question: Any, figures: dict[str, Any]) -> None:
    """Keep in ``result.json`` what was measured of a finished artifact, in place of the last answer to the question.

    Args:
        folder: of the artifact.
        kind: the command that measured.
        question: JSON-ready: on what, where and against what.
        figures: JSON-ready.

    Raises:
        OSError: the file cannot be written.
    """
    result = read_result(folder)
    asked = digest(question)
    measured = result.setdefault("measured", {})
    others = [entry for entry in measured.get(kind, []) if entry["question"] != asked]
    measured[kind] = [*others, {"question": asked, "at": round(time.time()), **figures}]
    write_json(folder / RESULT, result)
