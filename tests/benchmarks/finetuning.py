"""Methods of finetuning at equal budgets on real images: quality, trained parameters, time and memory of each.

    python tests/benchmarks/finetuning.py vit    [--rows FILE] [--seeds 3]    ViT-Ti to sign-language digits, 96 x 96
    python tests/benchmarks/finetuning.py resnet [--rows FILE] [--seeds 3]    ResNet-20 of CIFAR-10 to MNIST, 32 x 32
    python tests/benchmarks/finetuning.py table FILE [--plot methods.svg]

Every method adapts all linear modules and convolutions but the first; the head always learns. 400 samples, 10 epochs
of batches of 32, the weights after the last step. `resnet` runs every learning rate with every seed; `vit` chooses the
rate with seed 0. Either way the rate is chosen on 200 other samples of the train split, and the test split is read once
for it. Rows are kept in FILE, so a run that was stopped goes on.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import peftc
from peftc.intervals import wilson
from peftc.source import Source

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # cifar_resnet.py, the user's own module
DATA = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
RATES = {"full": (1e-4, 3e-4, 1e-3)}
OTHER_RATES = (1e-3, 3e-3, 1e-2)
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {
        "head": {}, "bitfit": {}, "adapter": {"rank": 32}, "lora": {"rank": 8}, "rslora": {"rank": 8},
        "dora": {"rank": 8}, "flora": {"rank": 8}, "snell": {"rank": 8}, "snell hard": {"rank": 8, "sparsify": "hard"},
        "snella": {"rank": 8}, "snella uniform": {"rank": 8, "allocate": "uniform"},
        "snella hard": {"rank": 8, "sparsify": "hard"}, "sara": {"share": 0.055}, "full": {},
    },
    "resnet": {
        "head": {}, "bitfit": {}, "lora": {"rank": 4}, "lora loralib": {"rank": 2, "layout": "loralib"},
        "rslora": {"rank": 4}, "dora": {"rank": 4}, "flora": {"rank": 12}, "flora scale 1": {"rank": 12, "scale": 1.0},
        "snell": {"rank": 4}, "snella": {"rank": 4}, "snella hard": {"rank": 4, "sparsify": "hard"},
        "sara": {"share": 0.1}, "full": {},
    },
}  # fmt: skip


def samples(model: str, folder: Path) -> Path:
    """Write train, validation and test samples, and return their folder or file."""
    random = np.random.default_rng(0)
    if model == "resnet":
        path = folder / "mnist.npz"
        with np.load(DATA / "sets/mnist/mnist_10k2k.npz") as found:
            order = random.permutation(len(found["x_train"]))[:600]
            splits = {
                "train": (found["x_train"][order[:400]], found["y_train"][order[:400]]),
                "validation": (found["x_train"][order[400:]], found["y_train"][order[400:]]),
                "test": (found["x_test"][:1000], found["y_test"][:1000]),
            }
        arrays = {}
        for split, (pixels, labels) in splits.items():
            padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 255
            arrays |= {f"x_{split}": np.repeat(((padded - 0.45) / 0.23)[:, None], 3, 1), f"y_{split}": labels}
        np.savez(path, **arrays)
        return path
    with zipfile.ZipFile(DATA / "sets/sign_digits/sign_digits_dev.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.upper().endswith(".JPG"))
        train = [name for name in names if name.startswith("train")]
        random.shuffle(train)
        chosen = {name: "train" for name in train[:400]} | {name: "val" for name in train[400:600]}
        chosen |= {name: "test" for name in names if name.startswith("test")}
        for name, split in chosen.items():
            path = folder / split / name.split("/")[1] / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as file:
                Image.open(file).convert("RGB").save(path.with_suffix(".png"))
    return folder


def source(model: str, folder: Path) -> Source:
    """Return the trained model; that of the user's own class with the weights of its head at zero."""
    if model == "resnet":
        weights = folder / "resnet20.safetensors"
        path = DATA / "weights/resnet_cifar10/resnet20-12fca82f.th"
        found = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
        state = {name.removeprefix("module."): tensor.contiguous() for name, tensor in found.items()}
        save_file({name: torch.zeros_like(t) if "linear" in name else t for name, t in state.items()}, weights)
        return Source("python:cifar_resnet:CifarResNet", arch_set={"depth": 20}, weights=weights, allow_code=True)
    weights = DATA / "weights/vit_tiny_patch16_224/model.safetensors"
    return Source("timm:vit_tiny_patch16_224", weights=weights, arch_set={"dynamic_img_size": True})


def run(model: str, name: str, rate: float, seed: int, data: Path, folder: Path, *, test: bool) -> dict[str, Any]:
    """Tune once; return its row."""
    size = {"image_size": 96} if model == "vit" else {}
    output = folder / "out"
    report = peftc.finetune(
        source(model, folder), output_dir=output, data=f"{data}@train", method=name.split()[0],
        settings=METHODS[model][name], learning_rate=rate, weight_decay=1e-4, epochs=10, held_out=0, seed=seed,
        device="cpu", overwrite=True, **size,
    )  # fmt: skip
    row = {
        "model": model, "method": name, "rate": rate, "seed": seed, "parameters": report.data["learning"]["parameters"],
        "seconds": report.data["seconds_per_step"], "optimizer": report.data["memory"]["optimizer_bytes"],
    }  # fmt: skip
    made = Source(str(output), allow_code=True)
    splits = {"validation": "validation" if model == "resnet" else "val"} | ({"test": "test"} if test else {})
    for split, word in splits.items():
        found = peftc.evaluate(made, data=f"{data}@{word}", device="cpu", **size).data["metrics"]["top1"]
        row |= {split: found["value"], f"{split}_samples": 1000 if model == "resnet" else 205}
    return row


def grid(model: str, rows: Path, seeds: int) -> None:
    """Run what is not in ``rows`` yet."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        data = samples(model, folder / "data") if (folder / "data").mkdir() is None else folder
        for seed in range(seeds):
            for name in METHODS[model]:
                known = read(rows, model)
                for rate in RATES.get(name, OTHER_RATES):
                    mine = [row for row in known if row["method"] == name]
                    if any((row["rate"], row["seed"]) == (rate, seed) for row in mine):
                        continue
                    if model == "vit" and seed and rate != best(mine):
                        continue
                    row = run(model, name, rate, seed, data, folder, test=True)
                    print(json.dumps(row), flush=True)
                    with rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def read(rows: Path, model: str) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    lines = rows.read_text().splitlines() if rows.is_file() else []
    return [row for line in lines if (row := json.loads(line))["model"] == model]


def best(rows: list[dict[str, Any]]) -> float:
    """Return the rate with the best mean on validation, over the seeds that every rate has."""
    rates = {row["rate"] for row in rows}
    common = set.intersection(*({row["seed"] for row in rows if row["rate"] == rate} for rate in rates))
    return max(
        rates,
        key=lambda rate: statistics.mean(
            row["validation"] for row in rows if row["rate"] == rate and row["seed"] in common
        ),
    )


def table(path: Path, plot: Path | None) -> None:
    """Print a table for each model, and draw quality against trained parameters."""
    points: dict[str, list[tuple[str, int, float, float, float]]] = {}
    for model in METHODS:
        rows = read(path, model)
        if not rows:
            continue
        print(f"\n{model}\n\n| method | learns | top-1 | 95 % interval | per seed | rate | ms / step | optimizer MB |")
        print("|---|---|---|---|---|---|---|---|")
        for name in METHODS[model]:
            mine = [row for row in rows if row["method"] == name]
            if not mine:
                continue
            rate = best(mine)
            chosen = [row for row in mine if row["rate"] == rate]
            scores = [row["test"] for row in chosen]
            number = chosen[0]["test_samples"]
            mean = statistics.mean(scores)
            low, high = wilson(round(mean * number), number)[-2:]
            listed = ", ".join(f"{score:.3f}" for score in scores)
            first = chosen[0]
            milliseconds = 1000 * statistics.median(row["seconds"] for row in mine)
            print(
                f"| {name} | {first['parameters']:,} | {mean:.3f} | [{low:.3f}, {high:.3f}] | {listed} | {rate:g} | "
                f"{milliseconds:.0f} | {first['optimizer'] / 1e6:.2f} |"
            )
            points.setdefault(model, []).append((name, first["parameters"], mean, low, high))
    if plot:
        draw(points, plot)


def draw(points: dict[str, list[tuple[str, int, float, float, float]]], path: Path) -> None:
    """Draw accuracy with its interval against the number of trained parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(points), 4.8), layout="constrained")
    for axes, (model, found) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        for at, (name, parameters, mean, low, high) in enumerate(found):
            color = f"C{at % 10}"
            axes.errorbar(parameters, mean, [[mean - low], [high - mean]], fmt="o", capsize=2, color=color)
            axes.annotate(name, (parameters, mean), xytext=(4, 4), textcoords="offset points", fontsize=8, color=color)
        axes.set_xscale("log")
        axes.set_xlabel("parameters that learn, head included")
        axes.set_ylabel("top-1 on the test split")
        axes.set_title(model)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*METHODS, "table"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("finetuning.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.what == "table":
        table(asked.file or asked.rows, asked.plot)
    else:
        grid(asked.what, asked.rows, asked.seeds)
