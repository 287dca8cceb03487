"""Size, quality and speed of a trained model: dense, in 8 bits (torchao), factored, and factored in 8 bits.

    python tests/benchmarks/quantized.py [MODEL ...] [--rounds 20] [--cells FILE] [--table]

MODEL is `MiniLM`, `ViT-Ti` or `Gemma 3 270M`. It needs torchao: `pip install torchao`.

Weights of linears are rounded to 8 bits, row by row, and inputs are not (`Int8WeightOnlyConfig`). Bytes are those of
all tensors in memory, which are those of a file. Calibrated on samples that quality is not measured on. All cells of a
model are timed in one interleaved run with the dense one as its own control, at the batch that is printed. ONNX Runtime
with dynamic int8, where inputs are rounded as well, is timed beside ONNX Runtime in float32, in a run of its own.
`--table` prints what the file of cells holds and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from methods import HALF, SETS, WEIGHTS, halves, minilm
from torch import Tensor, nn

import peftc
from peftc.formats import exported, parity
from peftc.measure import costs
from peftc.methods.registry import find
from peftc.models.load import load
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.options import Reading
from peftc.store.source import Source
from peftc.tasks.evaluation import Exam, evaluated

CELLS = Path(__file__).with_name("quantized.jsonl")
BATCH, TOKENS = 16, 64
RATIOS = (0.75, 0.5)


def models(folder: Path) -> dict[str, tuple[Source, str, str, dict[str, Any]]]:
    """Return name -> model, samples to calibrate on, samples to measure on, how to read those."""
    sentences, text = SETS / "stsb_en", SETS / "wikitext2/wikitext2_word_level.zip"
    vit = Source(
        str(WEIGHTS / "vit_tiny_patch16_224/model.safetensors"), arch="timm:vit_tiny_patch16_224", preprocess=HALF
    )
    half = halves(folder)[0]
    return {
        "MiniLM": (
            Source(str(minilm())),
            str(sentences / "stsb-en-train.csv"),
            str(sentences / "stsb-en-test.csv"),
            {},
        ),
        "ViT-Ti": (vit, f"{half}@train", f"{half}@test", {}),
        "Gemma 3 270M": (Source("gemma"), str(text), str(text), {"max_length": 512, "num_samples": 8}),
    }


def in_8_bits(model: Model) -> Model:
    """Round the weights of all linears of a model, in place."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.module, Int8WeightOnlyConfig())
    return model


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of all tensors, those that a rounded one is made of among them; shared ones once."""

    def parts(tensor: Tensor) -> Iterator[Tensor]:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                yield from parts(getattr(tensor, name))
        else:
            yield tensor

    return sum(part.nbytes for tensor in (*module.parameters(), *module.buffers()) for part in parts(tensor))


def cells(source: Source, calibrated: str, folder: Path) -> dict[str, Model]:
    """Return label -> model, ready to run in float32."""
    made = {"dense": source, "dense, int8": source}
    for ratio in RATIOS:
        small = folder / f"small-{ratio}"
        peftc.decompose(source, ratio=ratio, data=calibrated, output_dir=small, device="cpu", seed=0)
        made |= {f"factored {ratio}": Source(str(small)), f"factored {ratio}, int8": Source(str(small))}
    found = {label: runnable(load(each), device="cpu", dtype="float32") for label, each in made.items()}
    return {label: in_8_bits(model) if label.endswith("int8") else model for label, model in found.items()}


def quality(model: Model, dense: Model, measured: str, how: dict[str, Any]) -> dict[str, Any]:
    """Return the metric of a model, its interval, and how far it is from the dense one."""
    exam = Exam(measured, Reading(**how), batch_size=16, device="cpu", dtype="float32")
    found = evaluated(model, None if model is dense else dense, exam).data
    return {"metric": found["metric"], "value": found["metrics"][found["metric"]], "against": found.get("against")}


def calls(models: dict[str, Model], folder: Path) -> tuple[dict[str, costs.Call], dict[str, costs.Call]]:
    """Return label -> a call in torch, and label -> a call in ONNX Runtime."""
    in_torch: dict[str, costs.Call] = {}
    in_onnx: dict[str, costs.Call] = {}
    for label, model in models.items():
        length = TOKENS if model.kind == "text" else None
        inputs = parity.example(model, BATCH, image_size=None, max_length=length)
        in_torch[label] = lambda model=model, inputs=inputs: exported.computed(model, inputs)
        if label.endswith("int8"):
            continue
        for more, settings in (("", {}), (", int8", {"quantize": "int8"})):
            place = folder / f"{label}{more}"
            place.mkdir()
            example = parity.example(model, 2, image_size=None, max_length=length)
            graph = find("format", "onnx", "--format")(model, example, place, **settings)
            in_onnx[f"{label}{more}"] = graph.prepare(inputs)
    return in_torch, in_onnx


def timed(run: dict[str, costs.Call], rounds: int) -> dict[str, dict[str, Any]]:
    """Return label -> how many times as quick as the dense model, paired by rounds, and the noise of that."""
    seconds = costs.latency({**run, "control": run["dense"]}, rounds=rounds, device=torch.device("cpu"))
    found = {}
    for label in run:
        change = costs.speedup(seconds["dense"], seconds["control"], seconds[label])
        noise = [change.noise_low, change.noise_high]
        found[label] = {"times": change.value, "interval": [change.low, change.high], "noise": noise}
    return found


def measure(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Return the cells of a model."""
    source, calibrated, measured, how = models(folder)[name]
    if name.startswith("Gemma"):
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.gemma import MISSING, gemma

        if (place := gemma()) is None:
            raise SystemExit(MISSING)
        source = Source(str(place))
    made = cells(source, calibrated, folder)
    rows = [
        {
            "model": name,
            "cell": label,
            "bytes": stored_bytes(model.module),
            **quality(model, made["dense"], measured, how),
        }
        for label, model in made.items()
    ]
    in_torch, in_onnx = calls(made, folder)
    for runtime, run in (("torch", in_torch), ("onnx", in_onnx)):
        found = timed(run, rounds)
        rows = [row | ({runtime: found[row["cell"]]} if row["cell"] in found else {}) for row in rows]
    return [row | {"batch": BATCH, "threads": torch.get_num_threads()} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the cells as a table, a model after the other."""
    lines = ["| model | cell | MB | metric | torch, times | ONNX Runtime, times |", "|---|---|--:|--:|--:|--:|"]
    for row in rows:
        speeds = []
        for runtime in ("torch", "onnx"):
            one = row.get(runtime)
            speeds.append(f"{one['times']:.2f} ({one['interval'][0]:.2f} to {one['interval'][1]:.2f})" if one else "")
        cells = [row["model"], row["cell"], f"{row['bytes'] / 1e6:.1f}", f"{row['value']['value']:.4f}", *speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, keep the cells, and print them."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["MiniLM", "ViT-Ti"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cells", type=Path, default=CELLS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if find_spec("torchao") is None and not asked.table:
        print("torchao is not installed, so nothing is measured: pip install torchao")
        return
    rows = [json.loads(line) for line in asked.cells.read_text().splitlines()] if asked.cells.is_file() else []
    for name in [] if asked.table else asked.models:
        with tempfile.TemporaryDirectory() as temporary:
            rows = [row for row in rows if row["model"] != name] + measure(name, asked.rounds, Path(temporary))
        asked.cells.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
