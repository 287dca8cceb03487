"""Nothing runs that was not asked for, and altered bytes are noticed before anything is computed from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import peftc as package
from peftc.errors import PeftcError
from tests.conftest import rewritten

CODE = "from pathlib import Path\nPath('RAN').write_text('x')\ndef go(**_):\n    Path('RAN').write_text('x')\n"
SPEC = "python:payload:go"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which `payload.py` lies, whose import already tells of itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "payload.py").write_text(CODE)
    return tmp_path


def refused(done: Any, place: Path) -> None:
    assert done.exit_code in (1, 2), done.stderr
    assert "allow-code" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (place / "RAN").exists(), "code ran"


@pytest.fixture
def small(tiny_vit: Path, place: Path) -> Path:
    package.decompose(tiny_vit, ratio=0.6, output_dir="small")
    return place / "small"


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "small", "--data", "sklearn:digits", "--against", "base"],
        ["bench", "small", "--against", "base", "--rounds", 5],
        ["distill", "small", "--data", "sklearn:digits", "--steps", 1, "-o", "out"],
    ],
    ids=lambda words: words[0],
)
def test_the_base_of_a_manifest_runs_no_code(peftc, place: Path, small: Path, words: list[Any]) -> None:
    rewritten(small / "peftc.json", lambda value: value["base"]["source"].update(spec=SPEC))
    refused(peftc(*words, "-q"), place)


def test_the_model_beneath_a_delta_runs_no_code(peftc, place: Path, tiny_vit: Path) -> None:
    few = {"data": "sklearn:digits", "steps": 1, "num_samples": 20, "held_out": 0}
    package.finetune(tiny_vit, output_dir="delta", delta=True, **few)
    rewritten(place / "delta" / "peftc.json", lambda value: value["delta"]["source"].update(spec=SPEC))
    refused(peftc("merge", "delta", "-o", "out"), place)
    with pytest.raises(PeftcError, match="is code that a file names"):
        package.load("delta")
    with pytest.raises(PeftcError, match="returned a NoneType"):
        package.load("delta", allow_code=True)
    assert (place / "RAN").exists(), "what was allowed runs"


def test_the_base_of_an_adapter_runs_no_code(peftc, place: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = place / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["x"], "base_model_name_or_path": SPEC}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.zeros(1, 4), "lora_B": torch.zeros(4, 1)}
    save_file({f"base_model.model.x.{name}.weight": each for name, each in factors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    refused(peftc("analyze", "adapter", "--ratio", 0.5), place)


@pytest.mark.parametrize("toml", [f'model = "{SPEC}"', f'model = "{SPEC}"\n[decompose]\nratio = 0.5'])
@pytest.mark.parametrize("words", [["decompose", "--ratio", 0.5], ["bench"]], ids=lambda words: words[0])
def test_the_model_of_a_project_file_runs_no_code(peftc, place: Path, toml: str, words: list[Any]) -> None:
    (place / "peftc.toml").write_text(toml)
    refused(peftc(*words), place)


def test_the_teacher_of_a_project_file_runs_no_code(peftc, place: Path, small: Path) -> None:
    (place / "peftc.toml").write_text(f'model = "small"\ndata = "sklearn:digits"\nteacher = "{SPEC}"')
    refused(peftc("distill", "--steps", 1), place)


def test_a_recipe_and_the_list_of_a_chain_run_no_code(peftc, place: Path) -> None:
    (place / "peftc.toml").write_text(f'model = "{SPEC}"\nchain = ["decompose"]\n[decompose]\nratio = 0.5')
    refused(peftc("run"), place)
    (place / "peftc.toml").write_text('model = "small"')
    (place / "runs").mkdir()
    (place / "runs/chain.json").write_text(json.dumps([{"step": "decompose", "folder": SPEC}]))
    done = peftc("bench")
    assert done.exit_code == 1 and not (place / "RAN").exists(), done.stderr


def test_what_is_typed_or_set_needs_no_flag(peftc, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "returned a NoneType" in peftc("analyze", SPEC, "--ratio", 0.5).stderr
    (place / "RAN").unlink()
    (place / "peftc.toml").write_text(f'model = "{SPEC}"')
    monkeypatch.setenv("PEFTC_ALLOW_CODE", "1")
    assert "returned a NoneType" in peftc("analyze", "--ratio", 0.5).stderr
    assert (place / "RAN").exists()


@pytest.mark.parametrize("name", ["allow-code", "allow_code", "trust-remote-code"])
@pytest.mark.parametrize("where", ["", "[decompose]\n"], ids=["top", "table"])
def test_trust_is_not_taken_from_a_file(peftc, place: Path, name: str, where: str) -> None:
    (place / "peftc.toml").write_text(f'model = "m"\n{where}{name} = true\n')
    done = peftc("decompose", "--ratio", 0.5)
    assert done.exit_code == 2 and "is not taken from a file" in done.stderr and "PEFTC_" in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["x; touch RAN;", "rm", "run", "decompose\ntouch RAN"])
def test_a_command_that_is_none_of_ours_is_not_printed(peftc, small: Path, command: str) -> None:
    rewritten(
        small / "peftc.json", lambda value: value["steps"][0]["request"].update(command=command, plan={"ranks": {}})
    )
    done = peftc("show", small, "--commands")
    assert done.exit_code == 1 and done.stdout == "" and "is no command of peftc" in done.stderr, done.stderr


def test_no_control_code_of_a_file_reaches_a_terminal(peftc, small: Path) -> None:
    rewritten(small / "peftc.json", lambda value: value["base"].update(architecture="\x1b[2Jvit\x9b\u202e"))
    done = peftc("show", small)
    assert done.exit_code == 0 and "\\x1b[2Jvit" in done.stderr
    assert not set(done.stderr) & {"\x1b", "\x9b", "\u202e"}
    rewritten(small / "peftc.json", lambda value: value["base"]["source"].update(spec="a\x1b[2J"))
    done = peftc("show", small, "--commands")
    assert done.exit_code == 1 and "control characters" in done.stderr and "\x1b" not in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "config.json", "modeling_x.py"])
def test_a_link_that_leaves_its_folder_is_refused(peftc, tiny_bert: Path, place: Path, name: str) -> None:
    shutil.copytree(tiny_bert, place / "bert")
    (place / "secret").write_text((place / "bert" / name).read_text() if (place / "bert" / name).exists() else "secret")
    (place / "bert" / name).unlink(missing_ok=True)
    (place / "bert" / name).symlink_to(place / "secret")
    done = peftc("decompose", "bert", "--ratio", 0.5, "-o", "out")
    assert done.exit_code == 1 and "is a link that leaves its folder" in done.stderr, done.stderr
    assert not (place / "out").exists()


def test_links_of_weights_inside_a_folder_and_into_a_cache_are_followed(tiny_bert: Path, place: Path) -> None:
    blobs, snapshot = place / "models--me--bert" / "blobs", place / "models--me--bert" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_bert.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    package.decompose(snapshot, ratio=0.5, output_dir="one")
    shutil.copytree(tiny_bert, place / "bert")
    shutil.move(place / "bert" / "model.safetensors", place / "elsewhere.safetensors")
    (place / "bert" / "model.safetensors").symlink_to(place / "elsewhere.safetensors")
    (place / "bert" / "vocab.txt").symlink_to("config.json")
    package.decompose("bert", ratio=0.5, output_dir="two")
    assert (place / "one" / "tokenizer.json").is_file() and (place / "two" / "vocab.txt").is_file()


def test_only_known_companions_travel(tiny_bert: Path, place: Path) -> None:
    shutil.copytree(tiny_bert, place / "bert")
    for name in ("passwords.txt", "notes.json", "train.py", "merges.txt", "LICENSE"):
        (place / "bert" / name).write_text("{}")
    package.decompose("bert", ratio=0.5, output_dir="out")
    assert {path.name for path in (place / "out").iterdir()} & {
        "passwords.txt", "notes.json", "train.py", "merges.txt", "LICENSE"
    } == {"merges.txt", "LICENSE"}  # fmt: skip


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "small", "--data", "sklearn:digits"],
        ["analyze", "small", "--ratio", 0.5],
        ["bench", "small", "--rounds", 5],
        ["show", "small", "--verify"],
        ["distill", "small", "--data", "sklearn:digits", "--steps", 1, "-o", "out"],
        ["extract-lora", "small", "dense", "-o", "out"],
        ["distill", "dense", "--teacher", "small", "--data", "sklearn:digits", "--steps", 1, "-o", "out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_bit_that_changed_is_noticed(peftc, small: Path, tiny_vit: Path, place: Path, words: list[Any]) -> None:
    (place / "dense").symlink_to(tiny_vit)
    flip(small / "model.safetensors")
    done = peftc(*words, "-q")
    assert done.exit_code == 1 and "`model.safetensors`" in done.stderr, done.stderr
    assert "was changed after it was written" in done.stderr


def test_a_whole_folder_is_checked_on_demand_and_not_for_those_who_know(peftc, small: Path) -> None:
    done = peftc("show", small, "--verify")
    assert done.exit_code == 0 and "hold the bytes that the manifest promises" in done.stderr
    flip(small / "model.safetensors")
    with pytest.raises(PeftcError, match="was changed after it was written"):
        package.load(small)
    package.load(small, verify=False)


def test_the_base_has_to_be_the_one_that_the_manifest_records(peftc, tiny_vit: Path, place: Path) -> None:
    shutil.copytree(tiny_vit, place / "dense")
    package.decompose("dense", ratio=0.6, output_dir="small")
    flip(place / "dense" / "model.safetensors")
    done = peftc("evaluate", "small", "--data", "sklearn:digits", "--against", "base")
    assert done.exit_code == 1 and "is not the base that `small` was made from" in done.stderr, done.stderr


def test_a_card_takes_no_markup_from_a_manifest(small: Path) -> None:
    from peftc.pages import card

    evil = "a`<script>alert(1)</script>\n\n# Buy ```now```"
    rewritten(small / "peftc.json", lambda value: value["base"].update(architecture=evil))
    rewritten(
        small / "peftc.json", lambda value: value["steps"][0]["request"].update(method="svd`<img src=x>", seed=evil)
    )
    text = card.text_of(card.subject_of(small), "me/small", {}, package.compare([small]))
    page, _, commands = text.partition("## Rebuild")
    assert "<script" not in page and "<img" not in page and "\n# Buy" not in text.split("\n````sh")[0]
    assert "````sh" in commands, "the fence is longer than what stands in it"
