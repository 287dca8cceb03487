"""How quickly samples arrive, beside timm's loader and a plain DataLoader, and whether a step still waits for them.

    OMP_NUM_THREADS=1 python tests/benchmarks/engine.py [--images 2000] [--workers 2] [--rounds 3]

It takes about five minutes on two cores, and 200 MB of disk. Asked: at least 0.95 of the images per second of the
fastest other loader, with the same transform and as many workers; and with a step that sleeps t, in the place of an
accelerator, and decoding that costs d a batch over w workers, at most 1.1 max(t, d / w) a step. All loaders are started
anew for each pass, and interleaved, ours twice (A/A). CPU seconds stand beside wall-clock ones: a pass is all
computing, and other work on the machine disturbs them less.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import peftc
from peftc.data import open_data
from peftc.data.images import reader, transform
from peftc.data.loading import ahead, usual
from peftc.options import Recipe
from peftc.training.loop import fit

SIDES, BATCH = (500, 375), 32
PREPROCESS = {
    "input_size": [3, 224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
STEPS = 24


def drawn(folder: Path, number: int) -> None:
    """Write photographs of nothing: noise of all sizes, about 60 kB each, in ten classes."""
    random = np.random.default_rng(0)
    for at in range(number):
        whole = np.zeros((SIDES[1], SIDES[0], 3), np.float32)
        for size in (4, 16, 64, 256):
            noise = random.integers(0, 255, (size, size, 3), dtype=np.uint8)
            whole += np.asarray(Image.fromarray(noise).resize(SIDES, Image.Resampling.BICUBIC)) / 4
        path = folder / f"{at % 10}" / f"{at:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(whole.astype(np.uint8)).save(path, quality=90)


class Plain(Dataset[tuple[Tensor, int]]):
    """What anyone would write."""

    def __init__(self, folder: Path) -> None:
        self.paths, self.change = sorted(folder.rglob("*.jpg")), transform(PREPROCESS)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        return self.change(Image.open(self.paths[at]), str(at)), int(self.paths[at].parent.name)


def seconds(images: int, loader: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of a pass, its processes' included."""

    def used() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in both)

    wall, cpu, seen = time.perf_counter(), used(), 0
    for inputs, _ in loader():
        seen += len(inputs)
        assert inputs.dtype == torch.float32
    wall = time.perf_counter() - wall
    assert seen == images
    return wall, used() - cpu


def loaders(folder: Path, workers: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """Return what starts each loader."""
    data = open_data(str(folder))
    pixels, labels = reader(data, PREPROCESS), list(data.labels or [])
    runs = [list(range(at, min(at + BATCH, len(data)))) for at in range(0, len(data), BATCH)]

    def read(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return pixels(rows), torch.tensor([labels[row] for row in rows])

    def of_timm(prefetcher: bool) -> Iterable[Any]:
        same: dict[str, Any] = {name: PREPROCESS[name] for name in ("mean", "std", "interpolation", "crop_pct")}
        images = timm.data.ImageDataset(str(folder))
        how: dict[str, Any] = {
            "num_workers": workers,
            "use_prefetcher": prefetcher,
            "persistent_workers": False,
            **same,
        }
        return timm.data.create_loader(images, (3, 224, 224), BATCH, device=torch.device("cpu"), **how)

    return {
        "peftc": lambda: ahead(read, runs, workers),
        "peftc again": lambda: ahead(read, runs, workers),
        "plain DataLoader": lambda: DataLoader(Plain(folder), BATCH, num_workers=workers),
        "timm": lambda: of_timm(False),
        "timm, prefetcher": lambda: of_timm(True),
    }


def compare(folder: Path, images: int, workers: int, rounds: int) -> None:
    print(f"\nloader alone: {images} JPEGs of {SIDES[0]} x {SIDES[1]}, {workers} workers, batches of {BATCH}")
    starts = loaders(folder, workers)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
    for _ in range(rounds):
        for name, start in starts.items():
            times[name].append(seconds(images, start))
    print("| loader | images/s | peftc's speed by it, wall | by CPU seconds |\n|---|--:|--:|--:|")
    for name, found in times.items():
        ratios = [
            statistics.median(other[at] / own[at] for own, other in zip(times["peftc"], found, strict=True))
            for at in (0, 1)
        ]
        rate = images / statistics.median(wall for wall, _ in found)
        print(f"| {name} | {rate:.0f} | {ratios[0]:.3f} | {ratios[1]:.3f} |")


def overlap(folder: Path, workers: int) -> None:
    """Train a network of nothing by steps that sleep, on images that are decoded."""
    data = open_data(str(folder))
    pixels = reader(data, PREPROCESS)
    runs = [list(range(at * BATCH, (at + 1) * BATCH)) for at in range(STEPS)]

    def decoding(number: int) -> float:
        """Return seconds a batch over so many workers, once all of them are at work."""
        ends = [time.perf_counter() for _ in ahead(pixels, runs, number)]
        skipped = 2 * number
        return (ends[-1] - ends[skipped]) / (len(ends) - 1 - skipped)

    def step(number: int, sleep: float) -> float:
        """Return seconds a step: the mean over those after the first ones."""
        ends = []

        def loss(module: nn.Module, given: Tensor) -> Tensor:
            time.sleep(sleep)
            return module(given[:, 0, 0, :1]).mean()

        def after(_: int, __: int) -> None:
            ends.append(time.perf_counter())

        recipe = Recipe(steps=STEPS, batch_size=BATCH, warmup=0)
        fit(nn.Linear(1, 1), len(data), lambda rows, _: pixels(rows), loss, recipe, workers=number, after_step=after)
        skipped = 2 * number
        return (ends[-1] - ends[skipped]) / (len(ends) - 1 - skipped)

    print("\noverlap: a step that sleeps t, decoding that costs d a batch over w workers; milliseconds a step")
    print("| w | t | d / w | a step | by max(t, d / w) | without workers |\n|--:|--:|--:|--:|--:|--:|")
    for number in range(1, workers + 1):
        for share in (0.5, 1.0, 2.0):
            before = decoding(number)
            sleep = share * before
            took = step(number, sleep)
            cost = (before + decoding(number)) / 2  # as busy as the machine was
            alone = step(0, sleep)
            told = [1000 * each for each in (sleep, cost, took)]
            ratio = took / max(sleep, cost)
            print(f"| {number} | {' | '.join(f'{each:.0f}' for each in told)} | {ratio:.2f} | {1000 * alone:.0f} |")


def waiting(folder: Path) -> None:
    """Tune ViT-B/16 on a GPU, in bf16: asked is at most 5 % of the time spent waiting for data."""
    with tempfile.TemporaryDirectory() as place:
        network = timm.create_model("vit_base_patch16_224", num_classes=10)
        how: dict[str, Any] = {"method": "lora", "steps": 60, "batch_size": 64, "held_out": 0, "augment": "crop"}
        output = Path(place) / "tuned"
        report = peftc.finetune(network, output_dir=output, data=str(folder), mixed_precision="bf16", **how)
        speed = report.data["speed"]
    print(f"\nViT-B/16, LoRA, bf16, batches of 64, on {torch.cuda.get_device_name()}, {usual()} workers at most:")
    print(f"{speed['samples_per_second']:.0f} images/s, and {speed['waiting']:.1%} of the time waiting for data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("loader", "overlap", "gpu"))
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, timm {timm.__version__}; this takes about five minutes")
    with tempfile.TemporaryDirectory() as place:
        drawn(Path(place), max(asked.images, STEPS * BATCH))
        if asked.only in (None, "loader"):
            compare(Path(place), max(asked.images, STEPS * BATCH), asked.workers, asked.rounds)
        if asked.only in (None, "overlap"):
            overlap(Path(place), asked.workers)
        if asked.only in (None, "gpu") and torch.cuda.is_available():
            waiting(Path(place))


if __name__ == "__main__":
    main()
