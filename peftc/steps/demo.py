"""The embedded default: train a small ViT on scikit-learn's digits, then run the real steps on it.

It proves that the chain runs, offline and in minutes; no default of peftc is tuned on it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from peftc.data import open_data
from peftc.data.augment import Seeds
from peftc.data.images import transform
from peftc.errors import SourceError
from peftc.models.place import device_of
from peftc.options import Recipe
from peftc.report import Report
from peftc.steps.analyze import analyze
from peftc.steps.bench import bench
from peftc.steps.compare import compare
from peftc.steps.decompose import decompose
from peftc.steps.distill import distill
from peftc.steps.evaluate import evaluate
from peftc.training.loop import fit

DATA = "sklearn:digits"
RATIO = 0.5
ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 128, "depth": 4, "num_heads": 4}
PREPROCESS = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "interpolation": "bilinear"}
EPOCHS = 20
NOISE = 0.3  # added to the pixels, in [-1, 1], while training: 1,437 images are soon known by heart
HEALING = 3  # epochs
BENCH_ROUNDS = 15

# what happens to the trained model, in order: folder and row name > step(input folder, output folder, options)
STAGES: dict[str, Callable[..., Report]] = {
    "decompose": lambda model, output, **options: decompose(model, output_dir=output, ratio=RATIO, **options),
    "distill": lambda model, output, **options: distill(model, output_dir=output, data=DATA, epochs=HEALING, **options),
}


def demo(*, output_dir: str | Path | None = None, seed: int = 0, device: str = "auto") -> Report:
    """Train a small ViT on digits, make it smaller with each step, and measure what came of it.

    Args:
        output_dir: where the models go; ``peftc-demo`` in the current folder when None. Finished parts are kept.
        seed: of the training and of every step.
        device: where to compute.

    Raises:
        SourceError: a folder of the demo's is already there and holds something else.
    """
    with _one_thread():
        return _demo(Path(output_dir or "peftc-demo"), seed, device)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep to one thread: so small a network gains little from a second, and on busy cores two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _demo(folder: Path, seed: int, device: str) -> Report:
    dense = folder / f"dense-seed-{seed}"
    report = Report("demo", data={"stages": []})
    if (dense / "model.safetensors").is_file():
        report.notes.append(f"`{dense}` was already trained")
    else:
        _write(dense, _trained(seed, device))
    analyzed = analyze(dense, ratio=RATIO, plan=folder / f"plan-seed-{seed}.json", device=device, seed=seed)
    current, rows, batch = dense, report.data["stages"], None
    for name, step in STAGES.items():
        output = folder / f"{name}-seed-{seed}"
        changed = step(current, output, device=device, seed=seed)
        quality = evaluate(output, data=f"{DATA}@test", against=dense, device=device, seed=seed).data
        timing: dict[str, Any] = {"rounds": BENCH_ROUNDS, "batch_size": batch, "device": device, "seed": seed}
        speed = bench(output, against=dense, **timing).data
        batch = speed["model"]["saturating"]["batch"]  # of all stages, so that they can stand side by side
        if not rows:
            rows.append(_row("train", dense, speed["against"], quality["against"]["metrics"]))
        rows.append(
            _row(name, output, speed["model"], quality["metrics"]) | {"speedup": speed["speedup"]["saturating"]}
        )
        report.warnings += changed.warnings
        current = output
    report.artifact = current
    report.data["analyze"] = analyzed.data
    report.notes.append(f"look closer: `peftc analyze {dense}`, `peftc show {current}`")
    compared = compare([row["folder"] for row in rows[1:]])
    report.tables.append(replace(compared.tables[0], title=f"a small ViT on scikit-learn's digits, in {folder}"))
    report.details += compared.details
    report.notes = [*compared.notes[:1], *report.notes]
    return report


def _row(stage: str, folder: Path, figures: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "folder": str(folder),
        "parameters": figures["parameters"],
        "macs": figures["macs"],
        "samples_per_second": figures["saturating"]["samples_per_second"],
        "accuracy": metrics["top1"],
    }


def _trained(seed: int, device: str) -> nn.Module:
    samples = open_data(f"{DATA}@train")
    read = transform(PREPROCESS)
    images, labels = zip(*(samples[index] for index in range(len(samples))), strict=True)
    pixels = torch.stack([read(image, DATA) for image in images])  # (samples, 1, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(ARCHITECTURE, num_classes=len(samples.classes or []), **ARGUMENTS)

    digits, place = torch.tensor(labels), device_of(device)

    def batch(rows: Sequence[int], _: Seeds) -> tuple[Tensor, Tensor]:
        return pixels[list(rows)].to(place), digits[list(rows)].to(place)

    def loss(module: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        seen = given[0] + NOISE * torch.randn_like(given[0])
        return nn.functional.cross_entropy(module(seen), given[1])

    fit(
        network,
        len(pixels),
        batch,
        loss,
        Recipe(epochs=EPOCHS, learning_rate=1e-3, weight_decay=0.05, dropout=True, seed=seed),
        workers=0,  # the images lie where the network does
        device=device,
    )
    return network


def _write(folder: Path, network: nn.Module) -> None:
    """Write a folder that timm reads, whole or not at all."""
    if folder.exists():
        raise SourceError(f"`{folder}` is there, but holds no trained model", hint="move it away, or pass another `-o`")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    (partial / "model.safetensors").write_bytes(save(state, {"format": "pt"}))  # `save_file` makes it the owner's alone
    names = [str(digit) for digit in range(10)]
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(names),
        "model_args": ARGUMENTS,
        "pretrained_cfg": {**PREPROCESS, "num_classes": len(names), "label_names": names},
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder)
