"""Every bad input ends with one clear error, exit 1 or 2, and nothing written."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc.data import open_data
from peftc.errors import DataError
from peftc.models.load import load
from peftc.models.tokenizer import tokenizer_of
from peftc.steps.decompose import decompose


@pytest.fixture(scope="module")
def artifact(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "small"
    decompose(tiny_vit, output_dir=folder, ratio=0.5, skip=["mlp"], max_shard_size="50kB")
    return folder


def refused(peftc, folder: Path, *words: object, commands: tuple[str, ...] = ("decompose", "analyze")) -> str:
    """Run commands that have to refuse, and return the last one's message."""
    stderr = ""
    before = sorted(folder.iterdir())
    for command in commands:
        extra = ("--ratio", 0.5, "-o", folder / "out") if command == "decompose" else ()
        result = peftc(command, *words, *extra)
        stderr = result.stderr
        assert result.exit_code in (1, 2) and result.stdout == "", (command, words, result.exit_code, stderr)
        assert stderr.count("error: ") == 1 and "Traceback" not in stderr and "bug in peftc" not in stderr, stderr
        assert sorted(folder.iterdir()) == before
    return stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere"], "nowhere"),
        (["./nowhere"], "does not exist"),
        (["/nowhere/at/all"], "does not exist"),
        (["nowhere.safetensors"], "does not exist"),
        ([""], ""),
        (["hf:nobody/nothing"], "would have downloaded"),
        (["timm/nothing"], "would have downloaded"),
        (["timm:nothing"], "no architecture"),
        (["python:nowhere"], "names no factory"),
        (["python:nowhere:Net"], "cannot import"),
        (["timm:vit_tiny_patch16_224", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["timm:vit_tiny_patch16_224", "--offline"], "--offline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_refused(peftc, tmp_path: Path, monkeypatch, words: list[str], text: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in refused(peftc, tmp_path, *words)


def header_of(length: int) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack("<Q", length) + content[8:]


SAFETENSORS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "header alone": lambda content: content[: 8 + struct.unpack("<Q", content[:8])[0]],
    "cut in half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte long": lambda content: content + b"x",
    "absurd header length": header_of(1 << 62),
    "header of zero": header_of(0),
    "header longer than the file": header_of(10_000_000),
    "no JSON": lambda content: content[:8] + b"{" * 100 + content[108:],
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "model.gguf"])
def test_weights_that_git_lfs_did_not_fetch_are_called_so(peftc, tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(POINTER)
    arch = [] if file.endswith("gguf") else ["--arch", "timm:resnet18"]
    done = peftc("decompose", tmp_path / file, *arch, "--ratio", 0.5, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert f"`{tmp_path / file}` is a pointer of Git LFS" in done.stderr and "`git lfs pull`" in done.stderr


@pytest.mark.parametrize("file", ["rows.csv", "rows.jsonl", "rows.parquet", "text.txt", "arrays.npz", "photos.zip"])
def test_data_that_git_lfs_did_not_fetch_are_called_so(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(DataError, match="is a pointer of Git LFS"):
        open_data(tmp_path / file)


def test_an_image_that_git_lfs_did_not_fetch_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "photos/cats").mkdir(parents=True)
    (tmp_path / "photos/cats/one.png").write_text(POINTER)
    with pytest.raises(DataError, match="one.png` is a pointer of Git LFS"):
        open_data(tmp_path / "photos")[0]


def test_an_artifact_and_a_tokenizer_that_git_lfs_did_not_fetch_are_called_so(
    peftc, artifact: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(artifact, tmp_path / "small")
    next(folder.glob("*-00002-*")).write_text(POINTER)
    assert "is a pointer of Git LFS" in peftc("bench", folder).stderr
    folder = shutil.copytree(tiny_bert, tmp_path / "bert")
    (folder / "tokenizer.json").write_text(POINTER)
    with pytest.raises(DataError, match="tokenizer.json` is a pointer of Git LFS"):
        tokenizer_of(load(folder))


@pytest.mark.parametrize("change", SAFETENSORS.values(), ids=SAFETENSORS)
def test_damaged_safetensors_are_refused(peftc, tiny_vit: Path, tmp_path: Path, change) -> None:
    folder = shutil.copytree(tiny_vit, tmp_path / "vit")
    weights = folder / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    assert "model.safetensors" in refused(peftc, tmp_path, folder)


PICKLES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "a list": lambda path: torch.save([torch.zeros(3)], path),
    "nothing": lambda path: torch.save({}, path),
    "numbered": lambda path: torch.save({1: torch.zeros(3)}, path),
    "code": lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path),
    "numbers": lambda path: torch.save({"head.weight": 3.0}, path),
    "cut": lambda path: (torch.save({"a": torch.zeros(9999)}, path), path.write_bytes(path.read_bytes()[:3000])),
}


@pytest.mark.parametrize("write", PICKLES.values(), ids=PICKLES)
def test_damaged_or_unsafe_pickles_are_refused(peftc, tmp_path: Path, write) -> None:
    write(tmp_path / "w.pth")
    text = refused(peftc, tmp_path, "timm:vit_tiny_patch16_224", "--weights", tmp_path / "w.pth")
    assert "w.pth" in text and "\x1b" not in text


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def text(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(content)


CONFIGS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no config": ("tiny_bert", lambda folder: (folder / "config.json").unlink()),
    "no weights": ("tiny_bert", lambda folder: (folder / "model.safetensors").unlink()),
    "not JSON": ("tiny_bert", text("{")),
    "a list": ("tiny_bert", text("[]")),
    "an empty object": ("tiny_bert", text("{}")),
    "unknown class": ("tiny_bert", config(architectures=["NopeModel"])),
    "no class": ("tiny_bert", config(architectures=["pipeline"])),
    "class of another family": ("tiny_bert", config(architectures=["LlamaForCausalLM"])),
    "a number for a class": ("tiny_bert", config(architectures=[3])),
    "text for classes": ("tiny_bert", config(architectures="BertModel")),
    "unknown type": ("tiny_bert", config(model_type="nope")),
    "text for a size": ("tiny_bert", config(hidden_size="wide")),
    "another size": ("tiny_bert", config(hidden_size=48)),
    "no heads": ("tiny_bert", config(num_attention_heads=0)),
    "a negative size": ("tiny_bert", config(vocab_size=-1)),
    "unknown architecture": ("tiny_vit", config(architecture="nope")),
    "a number for an architecture": ("tiny_vit", config(architecture=3)),
    "a list of settings": ("tiny_vit", config(pretrained_cfg=[1])),
    "a list of arguments": ("tiny_vit", config(model_args=[1])),
    "wrong arguments": ("tiny_vit", config(model_args={"depth": "deep"})),
    "other arguments": ("tiny_vit", config(model_args={})),
}


@pytest.mark.parametrize(("model", "change"), CONFIGS.values(), ids=CONFIGS)
def test_a_folder_that_is_no_sound_model_is_refused(peftc, request, tmp_path: Path, model: str, change) -> None:
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "model")
    change(folder)
    refused(peftc, tmp_path, folder)


# -- artifacts --------------------------------------------------------------------------------------------------------


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "peftc.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return apply


QKV = "blocks.0.attn.qkv"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "text for a manifest": lambda folder: (folder / "peftc.json").write_text("hello"),
    "deep nesting": lambda folder: (folder / "peftc.json").write_text("[" * 100_000),
    "an older schema": manifest(lambda m: m.update(schema_version=0)),
    "a newer schema": manifest(lambda m: m.update(schema_version=2)),
    "a schema that is true": manifest(lambda m: m.update(schema_version=True)),
    "no id": manifest(lambda m: m.pop("id")),
    "an unknown field": manifest(lambda m: m.update(extra=1)),
    "a file above": manifest(lambda m: m["files"].update({"../x": {"sha256": "0", "bytes": 1}})),
    "a file above a folder": manifest(lambda m: m["files"].update({"a/../../x": {"sha256": "0", "bytes": 1}})),
    "an absolute file": manifest(lambda m: m["files"].update({"/etc/passwd": {"sha256": "0", "bytes": 1}})),
    "a size of text": manifest(lambda m: m["files"]["config.json"].update(bytes="many")),
    "another size": manifest(lambda m: m["files"]["config.json"].update(bytes=3)),
    "no files": manifest(lambda m: m.update(files={})),
    "no base": manifest(lambda m: m.update(base={})),
    "a base of an unknown library": manifest(lambda m: m["base"].update(library="keras")),
    "an unknown module": manifest(lambda m: m["modules"].update({"nowhere": {"form": "linear", "rank": 3}})),
    "a module that is none": manifest(lambda m: m["modules"].update({"blocks.0": {"form": "linear", "rank": 3}})),
    "an unknown form": manifest(lambda m: m["modules"][QKV].update(form="cube")),
    "a negative rank": manifest(lambda m: m["modules"][QKV].update(rank=-3)),
    "another rank": manifest(lambda m: m["modules"][QKV].update(rank=2)),
    "a rank of text": manifest(lambda m: m["modules"][QKV].update(rank="x")),
    "a pair of ranks": manifest(lambda m: m["modules"][QKV].update(rank=[3, 3])),
    "a module left out": manifest(lambda m: m["modules"].pop(QKV)),
    "an unknown tie": manifest(lambda m: m["tied"].update({"a.b": "c.d"})),
    "a mean of text": manifest(lambda m: m["preprocess"].update(mean="abc")),
    "a config that is gone": lambda folder: (folder / "config.json").unlink(),
    "a shard that is gone": lambda folder: next(folder.glob("*-00002-*")).unlink(),
    "a shard that is cut": lambda folder: (p := next(folder.glob("*-00002-*"))).write_bytes(p.read_bytes()[:-8]),
    "an absurd header": lambda folder: (p := next(folder.glob("*-00002-*"))).write_bytes(
        header_of(1 << 60)(p.read_bytes())
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_artifact_is_refused(peftc, artifact: Path, tmp_path: Path, damage) -> None:
    folder = shutil.copytree(artifact, tmp_path / "small")
    damage(folder)
    refused(peftc, tmp_path, folder)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if "module" not in name and "rank" not in name])
def test_show_never_ends_in_a_traceback(peftc, artifact: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(artifact, tmp_path / "small")
    DAMAGE[damage](folder)
    result = peftc("show", folder)
    assert result.exit_code in (0, 1) and "Traceback" not in result.stderr, result.stderr


def test_a_shard_of_another_artifact_is_refused(peftc, artifact: Path, tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "other", ratio=0.5, skip=["mlp"], max_shard_size="50kB", seed=1)
    folder = shutil.copytree(artifact, tmp_path / "small")
    name = next(folder.glob("*-00002-*")).name
    assert (tmp_path / "other" / name).stat().st_size == (folder / name).stat().st_size
    shutil.copy(tmp_path / "other" / name, folder / name)
    assert "belongs to another artifact" in refused(peftc, tmp_path, folder)
    assert peftc("show", folder).exit_code == 1


def test_one_flipped_bit_is_refused_before_the_next_step(peftc, artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact, tmp_path / "small")
    path = next(folder.glob("*-00002-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert path.name in refused(peftc, tmp_path, folder, commands=("decompose",))


@pytest.mark.parametrize(
    "words",
    [
        "--ratio 0",
        "--ratio 1.5",
        "--ratio nan",
        "--ratio 1e-9",
        "--ratio 0.001",
        "--rank 0",
        "--energy 2",
        "--target-params 10",
        "--target-macs 10",
        "--speedup 1",
        "--ratio 0.5 --speedup 2",
        "--ratio 0.5 --rank-multiple 0",
        "",
        "--ratio 0.5 --rank 3",
        "--ratio 0.5 --allocation fair",
        "--ratio 0.5 --method magic",
        "--ratio 0.5 --include nowhere",
        "--ratio 0.5 --skip *",
        "--ratio 0.5 --set alpha=1",
        "--ratio 0.5 --max-shard-size big",
        "--plan nowhere.json",
        "--ratio 0.5 --preprocess mean=abc",
        "--ratio 0.5 --preprocess size=3",
        "--ratio 0.5 --device cuda:99",
    ],
)
def test_a_wrong_request_is_refused(peftc, tiny_vit: Path, tmp_path: Path, words: str) -> None:
    result = peftc("decompose", tiny_vit, *words.split(), "-o", tmp_path / "deep" / "out")
    assert result.exit_code in (1, 2) and result.stdout == "", result.stderr
    assert "error: " in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
