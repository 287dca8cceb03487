"""Time to the first step of `finetune` and its peak anonymous memory, at a first and a second start, by size of data.

    python tests/benchmarks/data.py [--text 20 200] [--images 10000 100000] [--rows 100000 1000000]

Generates texts of so many MB, class folders of so many JPEGs of 32 x 32 and tables of so many rows, finetunes
stories260K (of `REAL_DATA`), a ViT of two layers and a BERT of two layers on them for one step, twice each, and prints
the seconds from the start of the command until the first step is in the log, the seconds of that (and of CPU) beyond
what the same command takes on few samples, for imports and the model, and the peak of RssAnon beyond what it is there.
Text and rows are tokenised in the first start: at 1.2 MB a second and core that is 3 minutes for 200 MB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import REAL_DATA
from tests.networks import BERT, INPUT, VIT, WORDS, save_timm, save_transformers

PYTHON = [sys.executable]


def write_text(path: Path, megabytes: int) -> Path:
    """Write lines of the words of tinyshakespeare."""
    words = (REAL_DATA / "sets" / "tinyshakespeare" / "input.txt").read_text().split()
    draw, left = random.Random(0), megabytes * 1_000_000
    with path.with_suffix(".txt").open("w") as file:
        while left > 0 or (left > -20_000 and not megabytes):
            left -= file.write(" ".join(draw.choices(words, k=draw.randint(5, 60))) + draw.choice("\n\n\n\n \n"))
    return path.with_suffix(".txt")


def write_images(path: Path, number: int) -> Path:
    """Write JPEGs of noise in ten class folders."""
    import numpy as np
    from PIL import Image

    noise, files = np.random.default_rng(0), list[bytes]()
    for _ in range(50):
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    for kind in range(10):
        (path / "train" / f"class{kind}").mkdir(parents=True)
    for at in range(number):
        (path / "train" / f"class{at % 10}" / f"{at:07}.jpg").write_bytes(files[at % 50] + b"%d" % at)
    return path


def write_rows(path: Path, number: int) -> Path:
    """Write a table of short texts with two labels."""
    draw = random.Random(0)
    with path.with_suffix(".jsonl").open("w") as file:
        for at in range(number):
            row = {"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 25))), "label": f"kind {at % 2}"}
            file.write(json.dumps(row) + "\n")
    return path.with_suffix(".jsonl")


def run(command: list[str], log: Path) -> tuple[float, float, float]:
    """Run a command; return the seconds and those of CPU until a log is there, and its peak RssAnon in MB."""
    start, highest, first, busy = time.monotonic(), 0, 0.0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        match = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        highest = max(highest, int(match[1]) if match else 0)
        if not first and log.exists():
            first = time.monotonic() - start
            busy = sum(map(int, status.with_name("stat").read_text().rpartition(")")[2].split()[11:13]))
        time.sleep(0.005)
    if process.returncode:
        sys.exit(f"`{' '.join(command)}` ended with {process.returncode}")
    return first, busy / os.sysconf("SC_CLK_TCK"), highest * 1024 / 1e6


def main() -> None:
    """Print a row for each data set and start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=int, nargs="*", default=[20, 200], help="MB")
    parser.add_argument("--images", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--starts", type=int, default=2)
    options = parser.parse_args()
    made: list[tuple[str, list[int], Callable[[Path, int], Path]]] = [
        ("text", options.text, write_text),
        ("images", options.images, write_images),
        ("rows", options.rows, write_rows),
    ]
    print("| data | start | first step s | beyond few samples s | of CPU | peak beyond few samples MB |")
    print("|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["XDG_CACHE_HOME"], os.environ["HF_HOME"] = f"{root}/cache", f"{root}/cache"
        for name in ("vit", "bert"):
            (root / name).mkdir()
        models = {
            "text": REAL_DATA / "weights" / "stories260K",
            "images": save_timm(root / "vit", "vit_tiny_patch16_224", {**VIT, "depth": 2, "num_classes": 10}, INPUT),
            "rows": save_transformers(root / "bert", "BertForSequenceClassification", **BERT),
        }
        for name, sizes, write in made:
            few = 0.0, 0.0, 0.0
            for size in ([100 if name != "text" else 0, *sizes]) if sizes else []:
                data = write(root / f"{name}{size}", size)
                time.sleep(3)  # so that its files are no longer too young
                for start in range(1, options.starts + 1):
                    out = root / f"out-{name}-{size}-{start}"
                    how = ["--data", str(data), "--steps", "1", "--batch-size", "8", "--held-out", "0", "-q"]
                    command = [*PYTHON, "-m", "peftc", "finetune", str(models[name]), *how, "-o", str(out)]
                    first, busy, peak = run(command, out.with_name(f"{out.name}.partial") / "work" / "log.jsonl")
                    few = few if few[0] else (first, busy, peak)
                    told = f"{first:.1f} | {first - few[0]:.1f} | {busy - few[1]:.1f} | {peak - few[2]:.0f}"
                    print(f"| {name} {size:,} | {start} | {told} |", flush=True)


if __name__ == "__main__":
    main()
