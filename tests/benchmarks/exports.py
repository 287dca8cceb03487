"""Every format on trained models at ratio 0.5: what deviates, how quick, and what is left of the promised speed-up.

First table: each export in its own runtime beside the artifact in PyTorch (medians, interleaved). Second table: at
batch 16 the dense model against the factored one in PyTorch, in ONNX Runtime and as a program of torch.export, all in
one interleaved run, beside the ratio of their multiply-adds. Then where ONNX Runtime spends its time.

    python tests/benchmarks/exports.py [--models ViT-Ti,MiniLM] [--rounds 10] [--only-speed]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from real_models import SETS, WEIGHTS, real_models

from peftc import decompose, export, measure
from peftc.errors import PeftcError
from peftc.measure import Call
from peftc.methods import find
from peftc.models import exported as exports
from peftc.models import load as models
from peftc.models.load import Model
from peftc.source import Source
from peftc.steps import parity

BATCH, TOKENS = 16, 128
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"dense": True}), ("safetensors", {}), ("torch-export", {}), ("onnx", {}),
    ("onnx", {"settings": {"dtype": "fp16"}}), ("onnx", {"settings": {"quantize": "int8"}}),
]  # fmt: skip


def sources() -> dict[str, tuple[Source, dict[str, Any], str | None]]:
    """Return name -> model, how it is factored, and samples to compare on."""
    real = real_models()
    images, texts = f"{SETS}/imagenet_sample/imagenet_sample_150.zip", f"{SETS}/stsb_en/stsb-en-dev.csv"
    calibrated = {"data": images, "sensitivity": 0}
    return {
        "ViT-Ti": (real["ViT-Ti"].source, {}, images),
        "MiniLM": (real["MiniLM"].source, {}, texts),
        "MobileNetV2": (real["MobileNetV2"].source, calibrated, images),
        "stories260K": (Source(str(WEIGHTS / "stories260K")), {}, None),
        "ViT-B/16": (Source("timm:vit_base_patch16_224"), {}, None),
    }


def initialised(folder: Path) -> Source:
    """Write a ViT-B/16 of random weights, whose speed is that of a trained one."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("vit_base_patch16_224")
    save_file(network.state_dict(), folder / "vit_b.safetensors", metadata={"format": "pt"})
    return Source(str(folder / "vit_b.safetensors"), arch="timm:vit_base_patch16_224")


def formats(name: str, small: Path, data: str | None, folder: Path, rounds: int) -> None:
    """Print a row per format."""
    print(
        f"\n{name}\n| format | runtime | bytes | deviation | agreement | batch 1, ms | in torch | batch 16 | in torch |"
    )
    length = {"max_length": TOKENS} if models.load(small).kind == "text" else {}
    for word, options in FORMATS:
        written = {"timm": "timm", "transformers": "hf"}[models.load(small).library] if word == "plain" else word
        label = " ".join([written, *options.get("settings", {}).values(), *(["--dense"] if "dense" in options else [])])
        place = folder / f"{small.name}-{label.replace(' ', '-')}"
        try:
            found = export(
                small, format=written, output_dir=place, data=data, rounds=rounds, num_samples=32, **length, **options
            ).data
        except PeftcError as error:
            print(f"| {label} | refused: {str(error).splitlines()[0]}", flush=True)
            continue
        one, many = found["times"]["1"], found["times"][str(BATCH)]
        times = [run[key] * 1000 for run in (one, many) for key in ("export_seconds", "torch_seconds")]
        print(
            f"| {label} | {found['runtime']} | {found['bytes']:,} | {found['deviation']:.1e} | "
            f"{found['agreement']:.4f} | " + " | ".join(f"{each:.1f}" for each in times),
            flush=True,
        )


def prepared(which: Path | Source, folder: Path) -> tuple[Model, dict[str, Call], int]:
    """Return a model, a call per runtime at batch 16, and its multiply-adds."""
    model = models.runnable(models.load(which), device="cpu")
    length = TOKENS if model.kind == "text" else None
    example = parity.example(model, 2, image_size=None, max_length=length)
    inputs = parity.example(model, BATCH, image_size=None, max_length=length)
    calls: dict[str, Call] = {"PyTorch": lambda: exports.computed(model, inputs)}
    for label, word in (("ONNX Runtime", "onnx"), ("torch.export", "torch_export")):
        place = folder / f"speed-{word}-{len(list(folder.iterdir()))}"
        place.mkdir()
        calls[label] = find("format", word, "--format")(model, example, place).prepare(inputs)
    return model, calls, measure.work(model).macs


def speed(name: str, dense: Path | Source, small: Path, folder: Path, rounds: int) -> None:
    """Print promised and measured speed-ups of one interleaved run, each against its own A/A control."""
    _, before, macs = prepared(dense, folder)
    _, after, fewer = prepared(small, folder)
    calls = {f"{when} {label}": call for label in before for when, call in (
        ("dense", before[label]), ("control", before[label]), ("small", after[label]))}  # fmt: skip
    run = measure.latency(calls, rounds=rounds, device=torch.device("cpu"))
    print(f"| {name} | {macs / fewer:.2f} |", end="")
    for label in before:
        change = measure.speedup(*(run[f"{when} {label}"].seconds for when in ("dense", "control", "small")))
        share = change.value / (macs / fewer)
        print(
            f" {label}: {run[f'dense {label}'].median * 1000:.0f} > {run[f'small {label}'].median * 1000:.0f} ms, "
            f"{change.value:.2f} ({change.low:.2f} to {change.high:.2f}; noise {change.noise_low:.2f} to "
            f"{change.noise_high:.2f}), {share:.2f} of it |",
            end="",
        )
    print(flush=True)
    for when, path in zip(("dense", "small"), sorted(folder.glob("speed-onnx-*"))[-2:], strict=True):
        profile(f"{name} {when}", path / "model.onnx", folder)


def profile(name: str, path: Path, folder: Path) -> None:
    """Print where ONNX Runtime spends its time, by kind of node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {}
    for each in session.get_inputs():
        shape = [{"batch": BATCH, "sequence": TOKENS}.get(side, side) for side in each.shape]
        feed[each.name] = (torch.randn(shape) if "float" in each.type else torch.ones(shape, dtype=torch.long)).numpy()
    for _ in range(6):
        session.run(None, feed)
    spent: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 6000
    total = sum(spent.values())
    print(
        f"  {name}: {total:.0f} ms: " + ", ".join(f"{kind} {ms:.0f}" for kind, ms in spent.most_common(7)), flush=True
    )


def main() -> None:
    """Run the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="ViT-Ti,MiniLM,MobileNetV2,stories260K,ViT-B/16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only-speed", action="store_true")
    asked = parser.parse_args()
    print(f"threads: {torch.get_num_threads()}, rounds: {asked.rounds}, texts of {TOKENS} tokens in timings")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in asked.models.split(","):
            source, how, data = sources()[name]
            if name == "ViT-B/16":
                source = initialised(folder)
            for multiple in (1, 8):
                small = folder / f"{name.replace('/', '-')}-{multiple}"
                decompose(source, ratio=0.5, rank_multiple=multiple, output_dir=small, **how)
                if multiple == 1 and not asked.only_speed and name != "ViT-B/16":
                    formats(name, small, data, folder, asked.rounds)
                if name != "stories260K":
                    speed(f"{name}, ranks multiples of {multiple}", source, small, folder, asked.rounds)


if __name__ == "__main__":
    main()
