"""Peak anonymous memory of `decompose` and `truncate` on a 2 GB checkpoint, their checks included.

    python tests/benchmarks/memory.py [--gigabytes 2] [--allocation energy] [--dtype float32]
    python tests/benchmarks/memory.py --max-memory 1GB [--methods whitened kfac] [--commands decompose calibrate]
        [--sequences 4] [--tokens 16] [--layers 2] [--side 2048] [--extra "--sensitivity 0"]

With `--max-memory` it calibrates on so many sequences drawn from the model, and factors or calibrates all layers or the
first few.

Makes a sharded Llama (every matrix a square of `--side`) on the spot and polls RssAnon of the command: mapped file
pages do not count.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def layers(gigabytes: float, dtype: str, side: int) -> int:
    """Return how many layers make a checkpoint of about that size."""
    return max(1, round(gigabytes * 1e9 / (7 * side * side * (4 if dtype == "float32" else 2))))


def make(folder: Path, gigabytes: float, dtype: str, side: int) -> int:
    """Write a sharded Llama checkpoint of about that size, one tensor in memory at a time; return its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftc.models.skeleton import parameters_on_meta

    kind = getattr(torch, dtype)
    config = LlamaConfig(
        hidden_size=side, intermediate_size=side, num_hidden_layers=layers(gigabytes, dtype, side),
        num_attention_heads=16, num_key_value_heads=16, vocab_size=side, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    with parameters_on_meta():
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    where, shard, total = {}, {}, 0
    names = list(shapes)
    number = 0
    for name in names:
        scale = side**-0.5 if len(shapes[name]) == 2 else 1.0
        tensor = torch.randn(shapes[name], generator=generator) * scale
        shard[name] = tensor.to(kind) if len(shapes[name]) == 2 else torch.ones(shapes[name], dtype=kind)
        if sum(t.nbytes for t in shard.values()) > 2.5e8 or name == names[-1]:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            where.update(dict.fromkeys(shard, file))
            total += sum(t.nbytes for t in shard.values())
            shard = {}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return its peak RssAnon in MB, its seconds and its exit code."""
    start, highest = time.monotonic(), 0
    process = subprocess.Popen(command)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            match = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        except OSError:
            break
        highest = max(highest, int(match[1]) if match else 0)
        time.sleep(0.005)
    return highest * 1024 / 1e6, time.monotonic() - start, process.wait()


def main() -> None:
    """Print a row per command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--side", type=int, default=2048, help="of every matrix")
    parser.add_argument("--allocation", default="energy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-memory")
    parser.add_argument("--methods", nargs="+", default=["whitened", "kfac"])
    parser.add_argument("--commands", nargs="+", default=["decompose", "calibrate"], help="of a limited memory")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="of a sequence")
    parser.add_argument("--layers", type=int, help="the first so many; all when left out")
    parser.add_argument("--extra", default="", help="more options of decompose")
    options = parser.parse_args()
    print("| checkpoint | dtype | command | imports alone | peak RssAnon | seconds | exit |")
    print("|--:|---|---|--:|--:|--:|--:|")
    budget = ["--ratio", "0.5", "--allocation", options.allocation]
    few = ["--data", f"generated:{options.sequences}", "--max-length", str(options.tokens)]
    few += ["--max-memory", options.max_memory]
    total = layers(options.gigabytes, options.dtype, options.side)
    left = range(total if options.layers is None else options.layers, total)
    skip = [word for layer in left for word in ("--skip", f"layers.{layer}.*")]
    asked = {"decompose": ["--ratio", "0.5", *options.extra.split()], "calibrate": []}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        size = make(model, options.gigabytes, options.dtype, options.side)
        imports, _, _ = peak([sys.executable, "-c", "import torch, timm, transformers"])
        commands = [
            ["decompose", str(model), *budget],
            ["decompose", str(model), "--keep-all-ranks"],
            ["truncate", str(Path(folder) / "1"), *budget],
        ]
        if options.max_memory:
            commands = [
                [command, str(model), *asked[command], "--method", method, *few, *skip]
                for method in options.methods
                for command in options.commands
            ]
        for number, words in enumerate(commands):
            highest, seconds, code = peak(
                [sys.executable, "-m", "peftc", *words, "-q", "-o", str(Path(folder) / str(number))]
            )
            told = " ".join([words[0], *words[2 : len(words) - len(skip)]])
            row = [f"{size / 1e9:.2f} GB", options.dtype, told, f"{imports:.0f} MB", f"{highest:.0f} MB"]
            print(f"| {' | '.join(row)} | {seconds:.0f} | {code} |", flush=True)


if __name__ == "__main__":
    main()
