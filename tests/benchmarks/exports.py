"""Every format on trained models at ratio 0.5: what deviates, how quick, and what is left of the promised speed-up.

First the largest deviation of each export in its own runtime. Then, at batch 16, the dense model against the factored
one in PyTorch and in ONNX Runtime beside the ratio of their multiply-adds, and the other formats, all in one
interleaved run; and where ONNX Runtime spends its time. `--clock processor` counts the seconds of one thread
(`OMP_NUM_THREADS=1`), which other programs on the machine take little of.

    python tests/benchmarks/exports.py [--models ViT-Ti,MiniLM] [--rounds 10] [--only speed] [--clock processor]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from real_models import SETS, WEIGHTS, real_models

from peftc import decompose, export
from peftc.errors import PeftcError
from peftc.formats import exported as exports
from peftc.formats import parity
from peftc.measure import costs
from peftc.measure.costs import Call
from peftc.methods.registry import find
from peftc.models import load as models
from peftc.models.inputs import probe
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.store.source import Source

BATCH, TOKENS = 16, 128
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.thread_time}
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


def formats(name: str, small: Path, data: str | None, folder: Path) -> None:
    """Print what every format deviates by, in its own runtime."""
    print(f"\n{name}\n| format | runtime | bytes | deviation | agreement |")
    for word, options in FORMATS:
        written = {"timm": "timm", "transformers": "hf"}[models.load(small).library] if word == "plain" else word
        label = " ".join([written, *options.get("settings", {}).values(), *(["--dense"] if "dense" in options else [])])
        place = folder / f"{small.name}-{label.replace(' ', '-')}"
        try:
            found = export(
                small, format=written, output_dir=place, data=data, rounds=5, batch_size=1, num_samples=32, **options
            ).data
        except PeftcError as error:
            print(f"| {label} | refused: {str(error).splitlines()[0]}", flush=True)
            continue
        same = f"{found['deviation']:.1e} | {found['agreement']:.4f} |"
        print(f"| {label} | {found['runtime']} | {found['bytes']:,} | {same}", flush=True)


def written(model: Model, folder: Path, word: str, **settings: Any) -> Call:
    """Export a model and return a call of it in its runtime, at batch 16."""
    length = TOKENS if model.kind == "text" else None
    example, inputs = (parity.example(model, n, image_size=None, max_length=length) for n in (2, BATCH))
    if word == "PyTorch":
        return lambda: exports.computed(model, inputs)
    place = folder / f"{word}-{len(list(folder.iterdir()))}"
    place.mkdir()
    return find("format", word, "--format")(model, example, place, **settings).prepare(inputs)


def interleaved(calls: dict[str, Call], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Return seconds per call, the calls taking turns."""
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for turn in range(rounds + 1):
        for label in list(calls)[:: 1 if turn % 2 else -1]:
            start = clock()
            calls[label]()
            if turn:  # the first one warms up
                seconds[label].append(clock() - start)
    return seconds


def speed(
    name: str, dense: Path | Source, small: Path, folder: Path, rounds: int, clock: Clock, *, all_formats: bool
) -> None:
    """Print promised and measured speed-ups at batch 16, each against its own A/A control."""
    whole, cut = (runnable(models.load(each), device="cpu") for each in (dense, small))
    run = {}
    for word in ("PyTorch", "onnx"):  # one after the other: threads of ONNX Runtime go on spinning after a call
        calls = {f"dense {word}": written(whole, folder, word)}
        calls |= {f"control {word}": calls[f"dense {word}"], f"small {word}": written(cut, folder, word)}
        graphs = sorted((path.stat().st_mtime, path) for path in folder.glob("onnx-*"))
        if word == "PyTorch":
            calls_of_torch = {when: calls[f"{when} PyTorch"] for when in ("dense", "small")}
        if all_formats and word == "PyTorch":
            calls["small torch-export"] = written(cut, folder, "torch_export")
        elif all_formats:
            calls["small onnx fp16"] = written(cut, folder, "onnx", dtype="fp16")
            calls["small onnx int8"] = written(cut, folder, "onnx", quantize="int8")
        run |= interleaved(calls, rounds, clock)
    length = TOKENS if whole.kind == "text" else None
    one = probe(whole, max_length=length)
    promised = costs.work(whole, one).macs / costs.work(cut, one).macs
    print(f"{name}: promised {promised:.2f}")
    for word in ("PyTorch", "onnx"):
        change = costs.speedup(*(run[f"{when} {word}"] for when in ("dense", "control", "small")))
        print(
            f"  {word}: {change.value:.2f} ({change.low:.2f} to {change.high:.2f}; noise {change.noise_low:.2f} to "
            f"{change.noise_high:.2f}), {change.value / promised:.2f} of it"
        )
    print(
        "  ms: " + ", ".join(f"{label} {1000 * statistics.median(each):.0f}" for label, each in run.items()), flush=True
    )
    for when in ("dense", "small"):
        eager(f"{name} {when}", calls_of_torch[when])
    for when, (_, path) in zip(("dense", "small"), graphs[-2:], strict=True):
        profile(f"{name} {when}", path / "model.onnx", folder)


def eager(name: str, call: Call) -> None:
    """Print where PyTorch spends its time, by operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as held:
        for _ in range(6):
            call()
    spent = {each.key: each.self_cpu_time_total / 6000 for each in held.key_averages()}
    most = sorted(spent.items(), key=lambda each: -each[1])[:7]
    print(f"  {name}, PyTorch: {sum(spent.values()):.0f} ms: " + ", ".join(f"{kind} {ms:.0f}" for kind, ms in most))


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
    parser.add_argument("--only", choices=["formats", "speed"])
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    asked = parser.parse_args()
    clock = CLOCKS[asked.clock]
    print(f"threads: {torch.get_num_threads()}, rounds: {asked.rounds}, texts of {TOKENS} tokens in timings")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in asked.models.split(","):
            source, how, data = sources()[name]
            if name == "ViT-B/16":
                source = initialised(folder)
            for multiple in (8, 1) if name != "ViT-B/16" else (8,):
                small = folder / f"{name.replace('/', '-')}-{multiple}"
                decompose(source, ratio=0.5, rank_multiple=multiple, output_dir=small, **how)
                if multiple == 1 and asked.only != "speed" and name != "ViT-B/16":
                    formats(name, small, data, folder)
                if asked.only != "formats" and name != "stories260K":
                    title = f"{name}, ranks multiples of {multiple}"
                    speed(title, source, small, folder, asked.rounds, clock, all_formats=multiple == 1)


if __name__ == "__main__":
    main()
