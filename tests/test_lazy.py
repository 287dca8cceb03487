"""Torch is a guest: what is light stays light and imports few modules. How long it takes is a benchmark, startup.py."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peftc"
HEAVY = {
    "PIL", "accelerate", "datasets", "huggingface_hub", "matplotlib", "numpy", "onnx", "pydantic", "rich",
    "safetensors", "scipy", "sklearn", "timm", "tokenizers", "torch", "torchvision", "transformers",
}  # fmt: skip
LIGHT_STEPS = ("show", "compare", "report", "push", "methods")  # of manifests and results
DOORS = ("lm_eval.py", "timm.py", "transformers.py")  # each brings the library of its name
LIGHT_ROOMS = ("cli", "store", "plans", "project", "pages")
LIGHT = sorted(
    ".".join(("peftc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in (
        *PACKAGE.glob("*.py"),
        *(file for room in LIGHT_ROOMS for file in PACKAGE.glob(f"{room}/*.py")),
        PACKAGE / "methods/registry.py",
        *(PACKAGE / "steps" / f"{name}.py" for name in LIGHT_STEPS),
    )
    if path.name not in ("__main__.py", *DOORS) and path.exists()
)
MOST = 224  # modules beyond those of an empty program; 100 ms of CPU on the machine of the design


def modules(*words: str, cwd: Path | None = None) -> list[str]:
    """Return the modules that ``python words`` imports, in the order in which they end."""
    run = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=cwd)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return [line.rpartition("|")[2].strip() for line in lines[1:]]


def imported(statement: str) -> set[str]:
    """Return the top-level modules that ``statement`` imports in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name.split(".")[0] for name in found.stdout.split()}


EACH = """
import importlib, os, sys
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        print(module, *sys.modules, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"cannot import {module}")
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """The top-level modules that each light module imports, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", EACH, *LIGHT], check=True, stdout=subprocess.PIPE, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {module: {name.split(".")[0] for name in names} for module, *names in lines}


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy(module: str, imports: dict[str, set[str]]) -> None:
    assert not imports[module] & HEAVY


def test_the_public_names_are_found_on_first_use() -> None:
    assert not imported("import peftc; peftc.Source; peftc.PeftcError; peftc.Report; dir(peftc)") & HEAVY


@pytest.mark.parametrize("words", ["--help", "decompose --help", "methods", "show"])
def test_what_needs_no_torch_starts_with_few_modules(words: str, small_vit: Path) -> None:
    more = [str(small_vit)] if words == "show" else []
    added = [name for name in modules("-m", "peftc", *words.split(), *more) if name not in modules("-c", "pass")]
    assert not {name.split(".")[0] for name in added} & HEAVY
    assert len(added) <= MOST, f"`peftc {words}` imports {len(added)} modules: {' '.join(added)}"
