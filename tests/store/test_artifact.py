"""Weights are written a block at a time, in one order, and read only when everything the manifest says is true."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peftc.errors import ArtifactError, WeightError
from peftc.store import artifact, verified
from peftc.store.artifact import Piece, from_file, tensor_table, write_weights
from peftc.store.header import DTYPE_BITS, read_header
from peftc.store.manifest import Manifest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def piece(*numbers: float, dtype: str = "F32") -> Piece:
    code = {"F32": "f", "F64": "d", "F16": "e", "U8": "B"}[dtype]
    return Piece(dtype, (len(numbers),), lambda: [struct.pack(f"<{len(numbers)}{code}", *numbers)])


def record(files: dict[str, dict[str, object]], identity: str = "id") -> Manifest:
    return Manifest(id=identity, base={}, steps=[], files=files, parameters=0)


def write(folder: Path, *, shard: int = 1 << 30, identity: str = "id") -> Manifest:
    pieces = {"b": piece(1, 2), "a": piece(3), "small": piece(7, dtype="U8"), "wide": piece(0.5, dtype="F64")}
    return record(write_weights(folder, pieces, identity, shard), identity)


def test_what_is_written_is_read_by_the_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path)
    loaded = load_file(tmp_path / WEIGHTS)
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        "a": [3], "b": [1, 2], "small": [7], "wide": [0.5],
    }  # fmt: skip


def test_equal_content_gives_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    pieces = {"b": piece(1), "a": piece(2), "c": piece(3, dtype="F64")}
    contents = []
    for number, names in enumerate(("abc", "cab", "bca")):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_weights(folder, {name: pieces[name] for name in names}, "id", 1 << 30)
        contents.append((folder / WEIGHTS).read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_metadata_is_sorted_and_names_the_artifact(tmp_path: Path) -> None:
    write(tmp_path, identity="0" * 64)
    content = (tmp_path / WEIGHTS).read_bytes()
    assert content[8:].startswith(b'{"__metadata__":{"format":"pt","peftc":"' + b"0" * 64 + b'"}')


@pytest.mark.parametrize("shard", [1, 8, 12, 1 << 30])
def test_every_tensor_is_aligned_to_its_own_width(tmp_path: Path, shard: int) -> None:
    for info in tensor_table(tmp_path, write(tmp_path, shard=shard)).values():
        assert info.start % (DTYPE_BITS[info.dtype] // 8) == 0, info


def test_shards_hold_every_tensor_once_and_no_more_bytes_than_asked(tmp_path: Path) -> None:
    manifest = write(tmp_path, shard=12)
    shards = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    assert shards == [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name in shards:
        infos = read_header(tmp_path / name)[0].values()
        assert sum(info.stop - info.start for info in infos) <= 12
    assert tensor_table(tmp_path, manifest).keys() == {"a", "b", "small", "wide"}
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 21}
    assert {name: tensor_table(tmp_path, manifest)[name].path.name for name in "ab"} == {
        name: index["weight_map"][name] for name in "ab"
    }


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    files = write_weights(tmp_path, {"large": piece(*range(9)), "x": piece(1), "y": piece(2)}, "id", 8)
    assert len([name for name in files if name.endswith(".safetensors")]) == 2


def test_sizes_and_digests_are_those_of_the_files(tmp_path: Path) -> None:
    manifest = write(tmp_path, shard=12)
    for name, entry in manifest.files.items():
        assert entry["bytes"] == (tmp_path / name).stat().st_size
    verified.check(tmp_path, manifest.files, remembered=False)


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    manifest = write(tmp_path, shard=12)
    name = next(iter(manifest.files))
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ArtifactError, match="was changed after it was written") as refusal:
        verified.check(tmp_path, manifest.files, remembered=False)
    assert f"`{name}`" in str(refusal.value) and f"`{INDEX}`" in str(refusal.value)


def test_bytes_are_copied_from_another_file_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "BLOCK", 5)
    source = write_weights(tmp_path, {"x": piece(1, 2, 3), "y": piece(4)}, "id", 1 << 30)
    copied = from_file(tensor_table(tmp_path, record(source))["x"])
    blocks = list(copied.blocks())
    assert b"".join(blocks) == struct.pack("<3f", 1, 2, 3)
    assert max(map(len, blocks)) <= 5
    assert copied.size == 12


def test_a_source_that_shrinks_is_refused(tmp_path: Path) -> None:
    copied = from_file(tensor_table(tmp_path, write(tmp_path))["small"])
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(ArtifactError, match="became shorter while it was read"):
        list(copied.blocks())


def test_blocks_are_not_held_together(tmp_path: Path) -> None:
    alive: list[int] = []

    def blocks() -> Iterator[bytes]:
        for number in range(50):
            alive.append(number)
            yield b"\0" * 4

    write_weights(tmp_path, {"x": Piece("F32", (50,), blocks)}, "id", 1 << 30)
    assert len(alive) == 50
    assert read_header(tmp_path / WEIGHTS)[0]["x"].size == 50


def foreign(folder: Path, manifest: Manifest) -> None:
    write(folder, identity="jd")


def longer(folder: Path, manifest: Manifest) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")


def twice(folder: Path, manifest: Manifest) -> None:
    (folder / "again.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    manifest.files["again.safetensors"] = dict(manifest.files[WEIGHTS])


def missing(folder: Path, manifest: Manifest) -> None:
    (folder / WEIGHTS).unlink()


def a_folder(folder: Path, manifest: Manifest) -> None:
    missing(folder, manifest)
    (folder / WEIGHTS).mkdir()


def empty(folder: Path, manifest: Manifest) -> None:
    manifest.files.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign, "belongs to another artifact"),
        (longer, "has .* bytes"),
        (twice, "`a` stands in two files"),
        (missing, "lacks the file `model.safetensors`"),
        (a_folder, "lacks the file `model.safetensors`"),
        (empty, "holds no weights"),
    ],
)
def test_a_folder_that_breaks_its_manifest_is_refused(
    tmp_path: Path, damage: Callable[[Path, Manifest], None], message: str
) -> None:
    manifest = write(tmp_path)
    damage(tmp_path, manifest)
    with pytest.raises(ArtifactError, match=message):
        tensor_table(tmp_path, manifest)


def test_a_file_without_peftc_in_its_metadata_is_foreign(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    manifest = write(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    manifest.files[WEIGHTS]["bytes"] = (tmp_path / WEIGHTS).stat().st_size
    with pytest.raises(ArtifactError, match="belongs to another artifact") as refusal:
        tensor_table(tmp_path, manifest)
    assert refusal.match("written for `none`, the manifest is `id`")


def test_damage_of_equal_length_is_refused_by_the_header(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\xff" * int(manifest.files[WEIGHTS]["bytes"]))
    with pytest.raises(WeightError, match="is not a whole safetensors file"):
        tensor_table(tmp_path, manifest)
