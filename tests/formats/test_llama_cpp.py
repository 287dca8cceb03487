"""What `export --format hf --dense` and `prune-layers` write goes through the script of llama.cpp, and comes back."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import peftc
from tests.environments import python_with, run

SOURCE = "llama-cpp-python"  # its source distribution has llama.cpp's own, with the script
NEEDED = ("/conversion/", "/gguf-py/", "/convert_hf_to_gguf.py")
READ = """
import sys, torch, peftc
from safetensors.torch import save_file
file, place = sys.argv[1:]
ids = torch.arange(1, 60)[None]
with torch.inference_mode():
    save_file({"y": peftc.load(file)(ids).logits}, place)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return llama.cpp's script, with what it imports of its own beside it."""
    place = tmp_path_factory.mktemp("llama.cpp")
    line = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        str(place),
    ]
    done = subprocess.run([*line, SOURCE], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip does not find {SOURCE}: {(done.stderr.splitlines() or ['?'])[-1]}")
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as whole:
        wanted = [each for each in whole if "/vendor/llama.cpp/" in each.name and any(n in each.name for n in NEEDED)]
        whole.extractall(place, wanted, filter="data")
    (found,) = place.rglob("convert_hf_to_gguf.py")
    return found


@pytest.mark.slow
@pytest.mark.real
def test_its_files_hold_what_peftc_wrote(script: Path, data_folder: Path, tmp_path: Path) -> None:
    base = data_folder / "weights/stories260K"
    peftc.prune_layers(base, drop="2", output_dir=tmp_path / "shorter", device="cpu")
    peftc.decompose(base, ratio=0.9, output_dir=tmp_path / "small")
    peftc.export(tmp_path / "small", format="hf", dense=True, output_dir=tmp_path / "dense", rounds=5, batch_size=1)
    python = python_with("gguf", "sentencepiece")
    from safetensors.torch import load_file

    for name in ("shorter", "dense"):
        file = tmp_path / f"{name}.gguf"
        env = {**os.environ, "PYTHONPATH": str(script.parent / "gguf-py")}
        line = [python, script, tmp_path / name, "--outtype", "f32", "--outfile", file]
        done = subprocess.run(line, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        run(python, "-c", READ, file, tmp_path / "y")
        with torch.inference_mode():
            wanted = peftc.load(tmp_path / name)(torch.arange(1, 60)[None]).logits
        torch.testing.assert_close(load_file(tmp_path / "y")["y"], wanted, rtol=1e-4, atol=1e-4)
    refused = subprocess.run([python, script, tmp_path / "small"], capture_output=True, text=True, env=env)
    assert refused.returncode, "factors have no place there, and llama.cpp does not take them for something else"
