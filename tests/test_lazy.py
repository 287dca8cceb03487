"""Torch is a guest: what is light stays light, and quick."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peftc"
HEAVY = {
    "PIL", "accelerate", "datasets", "huggingface_hub", "matplotlib", "numpy", "onnx", "pydantic", "rich",
    "safetensors", "scipy", "sklearn", "timm", "tokenizers", "torch", "torchvision", "transformers",
}  # fmt: skip
TORCH_FILES = {
    "hooks.py", "train.py", "accelerator.py", "measure.py", "task.py", "tasks.py", "retrieval.py", "objectives.py",
    "unlabelled.py",
}  # fmt: skip
LIGHT_STEPS = (  # of manifests and results alone
    "show", "records", "compare", "report", "page", "charts", "layer_maps", "card", "push",
)  # fmt: skip
LIGHT = sorted(
    ".".join(("peftc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in (
        *PACKAGE.glob("*.py"),
        *PACKAGE.glob("cli/*.py"),
        PACKAGE / "methods/__init__.py",
        *(PACKAGE / "steps" / f"{name}.py" for name in LIGHT_STEPS),
    )
    if path.name not in TORCH_FILES | {"__main__.py"} and path.exists()
)
BUDGET_MS = 100  # on the machine of the design, 58 - 69 were measured
MARGIN = 2.0  # for slow and busy machines; the figure itself is printed


def cpu_ms(*words: str, cwd: Path | None = None) -> float:
    """Return the least CPU time of five runs of ``python words``, in milliseconds."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return 1000 * min(times)


def imported(statement: str) -> set[str]:
    """Return the top-level modules that ``statement`` imports in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name.split(".")[0] for name in found.stdout.split()}


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy(module: str) -> None:
    assert not imported(f"import {module}") & HEAVY


def test_the_public_names_are_found_on_first_use() -> None:
    assert not imported("import peftc; peftc.Source; peftc.PeftcError; peftc.Report; dir(peftc)") & HEAVY


@pytest.mark.parametrize("words", [["--help"], ["decompose", "--help"], ["methods"]], ids=" ".join)
def test_help_is_quick(words: list[str]) -> None:
    check("peftc " + " ".join(words), cpu_ms("-m", "peftc", *words), words)


def test_show_is_quick(tmp_path: Path, tiny_vit: Path) -> None:
    pytest.importorskip("peftc.steps.show", exc_type=ImportError)
    decompose = pytest.importorskip("peftc.steps.decompose", exc_type=ImportError).decompose
    decompose(tiny_vit, output_dir=tmp_path / "small", ratio=0.5)
    words = ["show", str(tmp_path / "small")]
    check("peftc show", cpu_ms("-m", "peftc", *words, cwd=tmp_path), words)


def check(command: str, spent: float, words: list[str]) -> None:
    """Compare CPU time with the budget, and show where it went when it is over."""
    margin = 1.0 if os.environ.get("STRICT_TIMES") else MARGIN
    if spent > BUDGET_MS * margin:
        profile = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "peftc", *words], capture_output=True, text=True
        )
        lines = sorted(profile.stderr.splitlines(), key=lambda line: line.split("|")[:1])[-15:]
        pytest.fail(f"`{command}` took {spent:.0f} ms of CPU, over {BUDGET_MS} x {margin}:\n" + "\n".join(lines))
    print(f"{command}: {spent:.0f} ms of CPU")
