"""Every row of the table on the page on loading is run as it stands there, in a process that begins without peftc."""

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from tests.conftest import TEXTS
from tests.forked import forked
from tests.formats.kinds import texts
from tests.networks import INPUT, LLAMA, VIT, save_timm, save_transformers
from tests.runtimes.test_sentences import expected, save_sentences

HERE = Path(__file__)
REPOSITORY = HERE.parents[2]
ROWS: list[dict[str, str]] = json.loads(HERE.with_name("loads.json").read_text())
RUN = [row for row in ROWS if "made" in row]
QUICK: dict[str, Any] = {"rounds": 5, "batch_size": 1}
START = """
import json, sys
folder, base, place, imports, line, alone = sys.argv[1:]
if alone == "True":
    sys.modules["peftc"] = None
import torch
from safetensors.torch import load_file, save_file
names = {"FOLDER": folder, "BASE": base, "TEXTS": json.load(open(f"{place}/texts.json"))}
for name in imports.split(", "):
    exec(f"import {name}", names)
exec(line, names)
inputs = load_file(f"{place}/inputs")
with torch.inference_mode():
    if "vectors" in names:
        found = torch.as_tensor(names["vectors"])
    elif "session" in names:
        given = {each.name: inputs["x"].numpy() for each in names["session"].get_inputs()}
        found = torch.from_numpy(names["session"].run(None, given)[0])
    else:
        network = names["network"]
        network = network.eval() if hasattr(network, "config") or "timm" in imports else network
        value = network(inputs["x"]) if "x" in inputs else network(**inputs)
        found = getattr(value, "logits", value)
save_file({"y": found.contiguous()}, f"{place}/found")
"""


class Models:
    """What peftc writes of four small models, each made when a row asks for it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def made(self, name: str) -> tuple[Path, dict[str, torch.Tensor], torch.Tensor]:
        """Return a folder, inputs, and what peftc's own network gives for them."""
        word, *asked = name.split()
        small = self.small("vit" if word == "artifact" else word)
        if asked[:1] == ["delta"]:
            small, asked = self.delta(small), asked[1:]
        folder = self.exported(small, asked) if asked else small
        if word == "sentences":
            return folder, {}, expected(small)
        image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        inputs = texts() if word == "llama" else {"x": image}
        network = peftc.load(small)
        with torch.inference_mode():
            return folder, inputs, network(**inputs).logits if word == "llama" else network(image)

    def small(self, word: str) -> Path:
        base, small = self.place / word, self.place / f"{word}-small"
        if not small.is_dir():
            base.mkdir()
            if word == "vit":
                save_timm(base, "vit_tiny_patch16_224", VIT, INPUT)
            elif word == "llama":
                save_transformers(base, "LlamaForCausalLM", **LLAMA, initializer_range=0.2)
            else:
                save_sentences(base)
            peftc.decompose(base, ratio=0.6, output_dir=small)
        return small

    def exported(self, small: Path, asked: list[str]) -> Path:
        word, *dense = asked
        folder = small.with_name(f"{small.name}-{'-'.join(asked)}")
        if not folder.is_dir():
            peftc.export(small, format=word, dense=bool(dense), output_dir=folder, **QUICK)
        return folder

    def delta(self, small: Path) -> Path:
        folder, base = small.with_name("delta"), small.with_name("llama")
        (base.parent / "texts.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS))
        how: dict[str, Any] = {"data": str(base.parent / "texts.csv"), "steps": 1, "held_out": 0, "device": "cpu"}
        peftc.finetune(base, method="lora", delta=True, output_dir=folder, **how)
        return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quick_exports")
@pytest.mark.parametrize("row", RUN, ids=[f"{row['by']}: {row['made']}" for row in RUN])
def test_a_row_is_loaded_by_its_line(row: dict[str, str], models: Models, tmp_path: Path) -> None:
    if lacking := [name for name in row["imports"].split(", ") if find_spec(name.split(".")[0]) is None]:
        pytest.skip(f"{lacking[0]} is not installed")
    folder, inputs, wanted = models.made(row["made"])
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    save_file(inputs, tmp_path / "inputs")
    alone = not any(name.startswith("peftc") for name in row["imports"].split(", "))
    words = (folder, models.place / "llama", tmp_path, row["imports"], row["line"], alone)
    done = forked(*words, code=START)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "found")["y"], wanted, rtol=1e-4, atol=1e-5)
    if row["imports"].startswith("peftc.") and row["by"] != "sentence-transformers":  # that library logs, and goes on
        without = row["imports"].partition(", ")[2]
        done = forked(*words[:3], without, row["line"], True, code=START)
        assert done.returncode and "peftc" in done.stderr.splitlines()[-1], "it says what to import"


def test_every_other_row_names_a_test_that_starts_a_process() -> None:
    for row in ROWS:
        if row in RUN:
            assert "test" not in row
            continue
        file, _, name = row["test"].partition("::")
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row["test"]


def test_versions_are_those_that_are_declared() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    declared = dict(re.findall(r'"([a-z-]+)>=([\d.]+)', text))
    for row in ROWS:
        assert row["since"] == declared.get(row["by"], row["since"]), row


def test_every_format_has_a_row() -> None:
    from peftc.methods.registry import METHODS

    words = {word for row in ROWS for word in re.findall(r"export --format ([\w-]+)", row["what"])}
    assert {name.replace("_", "-") for name in METHODS["format"]} - words == {"safetensors"}, "which is plain weights"
