"""The artifact folder: write its weights from byte ranges, read its tensor table, without torch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftc.errors import ArtifactError, reason_of
from peftc.store import documents, results, verified
from peftc.store import manifest as manifests
from peftc.store.header import DTYPE_BITS, TensorInfo, encode_header, read_header
from peftc.store.manifest import Manifest

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
        entries = 1
        for side in self.shape:
            entries *= side
        return entries * DTYPE_BITS[self.dtype] // 8


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
    if len(shards) == 1:
        whole = f"{stem}.safetensors"
        return {whole: _write_shard(folder / whole, {name: pieces[name] for name in order}, identity)}
    files: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file] = _write_shard(folder / file, {name: pieces[name] for name in names}, identity)
        where.update(dict.fromkeys(names, file))
    total = sum(piece.size for piece in pieces.values())
    index = f"{stem}.safetensors.index.json"
    files[index] = write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": where})
    return files


def _write_shard(path: Path, pieces: dict[str, Piece], identity: str | None) -> dict[str, Any]:
    entries = {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}
    total, written = hashlib.sha256(), 0
    with path.open("wb") as file:
        start = encode_header(entries, {"format": "pt", **({"peftc": identity} if identity else {})})
        for block in _chain(start, pieces):
            file.write(block)
            total.update(block)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": total.hexdigest(), "bytes": written}


def _chain(start: bytes, pieces: dict[str, Piece]) -> Iterator[Any]:
    yield start
    for piece in pieces.values():
        yield from piece.blocks()


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a JSON file with sorted keys, whole or not at all, and return its sha256 and bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a small file durably, whole or not at all, and return its sha256 and bytes."""
    documents.write_whole(path, content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def tensor_table(folder: Path, manifest: Manifest, *, factors: bool = False) -> dict[str, TensorInfo]:
    """Return every tensor of an artifact by name, from the headers of the files that its manifest lists.

    Args:
        folder, manifest: of the artifact; all of its files are checked.
        factors: return the ordered factors beside the network, not the network's own tensors.

    Raises:
        ArtifactError: a file is missing, has another length, or was written for another artifact; of those that hold no
            tensors, it has other bytes than the manifest promises (of tensors, `verify` says that).
        WeightError: a file is damaged.
    """
    table: dict[str, TensorInfo] = {}
    small: dict[str, str] = {}
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"`{folder}` lacks the file `{name}`", why="its manifest lists it")
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"`{path}` has {path.stat().st_size:,} bytes", why=f"its manifest says {entry['bytes']:,}"
            )
        if not name.endswith(".safetensors"):
            small[name] = entry["sha256"]
            continue
        tensors, metadata = read_header(path)
        if metadata.get("peftc") != manifest.id:
            raise ArtifactError(
                f"`{path}` belongs to another artifact",
                why=f"it was written for `{metadata.get('peftc', 'none')}`, the manifest is `{manifest.id}`",
            )
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


def verify(folder: Path, manifest: Manifest, *, remembered: bool = True) -> None:
    """Compare every file of an artifact with the bytes that its manifest promises.

    Args:
        folder, manifest: of the artifact.
        remembered: believe of a file that nobody wrote to what was found before.

    Raises:
        ArtifactError: naming each file that differs.
    """
    verified.check(folder, {name: entry["sha256"] for name, entry in manifest.files.items()}, remembered=remembered)


def statistics_note(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what is known of the statistics that `calibrate` wrote.

    Raises:
        ArtifactError: the folder holds none, or is damaged.
    """
    name = f"{manifests.STATISTICS}.json"
    if not manifest.holds_statistics or name not in manifest.files:
        raise ArtifactError(
            f"`{folder}` holds no statistics",
            why=f"its manifest lists no `{manifests.STATISTICS}.safetensors`",
            hint="`peftc calibrate MODEL --data DATA -o stats` writes them",
        )
    try:
        note = documents.read_json(folder / name)
        why = documents.misfit(note, NOTE)
    except (OSError, ValueError) as error:
        why = str(error)
    if why:
        raise ArtifactError(f"cannot read `{folder / name}`", why=why, hint="collect them again")
    return dict(note)


def read_result(folder: Path) -> dict[str, Any]:
    """Return what an artifact's ``result.json`` holds; empty where it is gone or damaged."""
    try:
        found = documents.read_json(folder / RESULT)
    except (OSError, ValueError):
        return {}
    return {} if results.misfit(found) else dict(found)


def damaged_result(folder: Path) -> str | None:
    """Return a warning where a ``result.json`` is damaged, so that nothing of it is used; None where all is well."""
    if not (folder / RESULT).exists() or read_result(folder):
        return None
    try:
        why = results.misfit(documents.read_json(folder / RESULT)) or "it says nothing"
    except (OSError, ValueError) as error:
        why = reason_of(error)
    return f"`{folder / RESULT}` is damaged ({why}): what it says of figures is left out"


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
    asked = manifests.digest(question)
    measured = result.setdefault("measured", {})
    others = [entry for entry in measured.get(kind, []) if entry["question"] != asked]
    measured[kind] = [*others, {"question": asked, "at": round(time.time()), **figures}]
    write_json(folder / RESULT, result)


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return the names of files whose bytes are no longer those that the manifest promises."""
    return [
        name
        for name, entry in sorted(manifest.files.items())
        if not (folder / name).is_file() or manifests.file_digest(folder / name) != entry["sha256"]
    ]


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
