"""Weight files of every habit are read by tensor name, mapped where that is possible, and no pickled code runs."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftc.errors import SourceError, WeightError
from peftc.models.weights import from_file, from_folder, from_infos

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def same(found: Any, expected: dict[str, Tensor]) -> bool:
    return sorted(found.names()) == sorted(expected) and all(
        torch.equal(found.read(name), tensor) for name, tensor in expected.items()
    )


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


def test_a_safetensors_file_is_mapped(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.safetensors")
    weights = from_file(tmp_path / "m.safetensors")
    assert weights.loaded == {}
    assert weights.files == [tmp_path / "m.safetensors"]
    assert same(weights, STATE)
    assert same(from_infos("x", weights.infos), STATE)


@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "th", "ckpt"])
@pytest.mark.parametrize(
    "nested",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"lr": 0.1}},
        {"model_state_dict": prefixed("module.")},
        {"state_dict": {"model": {"net": prefixed("module.module.")}}},
    ],
    ids=["plain", "state_dict", "model", "module.", "three deep"],
)
def test_a_pickle_is_unwrapped(tmp_path: Path, ending: str, nested: dict[str, Any]) -> None:
    torch.save(nested, tmp_path / f"w.{ending}")
    assert same(from_file(tmp_path / f"w.{ending}"), STATE)


def test_a_prefix_is_kept_unless_every_name_has_it(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "head": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    assert same(from_file(tmp_path / "w.pth"), state)


class Trap:
    """Something that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, save: Any) -> None:
    save({"state_dict": STATE, "args": Trap(tmp_path / "sprung")}, tmp_path / "w.pth")
    with pytest.raises(WeightError, match="holds more than tensors") as refusal:
        from_file(tmp_path / "w.pth")
    assert refusal.match("save the plain `state_dict\\(\\)`")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content", [{"a": torch.ones(1), "b": 3}, {}, [torch.ones(1)], {"state_dict": {}}, torch.ones(2)]
)
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightError, match="holds no state dict"):
        from_file(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 torn"])
def test_a_torn_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightError, match=r"w\.pth"):
        from_file(tmp_path / "w.pth")


def test_another_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.npz").touch()
    with pytest.raises(SourceError, match="is no weight file"):
        from_file(tmp_path / "w.npz")


def sharded(folder: Path, stem: str, suffix: str) -> Path:
    where = {}
    for number, (name, tensor) in enumerate(STATE.items(), 1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)({name: tensor}, folder / file)
        where[name] = file
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_are_read_by_their_index(tmp_path: Path, stem: str, suffix: str) -> None:
    sharded(tmp_path, stem, suffix)
    weights = from_folder(tmp_path)
    assert same(weights, STATE)
    assert len(weights.files) == 2


def test_safetensors_come_before_pickles_and_whole_files_before_shards(tmp_path: Path) -> None:
    torch.save({"from.pickle": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    sharded(tmp_path, "model", "safetensors")
    assert same(from_folder(tmp_path), STATE)
    save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert from_folder(tmp_path).names() == ["whole"]


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    sharded(tmp_path, "model", "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match="lacks the shard `model-00002-of-00002.safetensors`"):
        from_folder(tmp_path)


def test_a_shard_that_lacks_its_tensor_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, "model", "safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(SourceError, match="lack `b`"):
        from_folder(tmp_path)


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "a\\b.safetensors"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, tmp_path / "m.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": name}}))
    with pytest.raises(SourceError, match="lacks the shard"):
        from_folder(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SourceError, match="cannot read"):
        from_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no weights") as refusal:
        from_folder(tmp_path)
    assert refusal.match("`--weights FILE`")
