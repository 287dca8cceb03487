"""What each term of PELA's loss is worth: ViT-Ti on CIFAR-10, truncated and healed on 300 images, paired seeds.

    python tests/benchmarks/distillation.py ablation [--ratio 0.8] [--seeds 3] [--steps 60] [--work FOLDER]
    python tests/benchmarks/distillation.py cost [--batch 16] [--rounds 5]

`ablation` fine-tunes ViT-Ti (trained on ImageNet) on 5,000 CIFAR-10 images of 96 x 96 pixels, cuts it by plain SVD, and
heals it with each set of terms: the same 300 images, order and steps for all sets of one seed. `equal time` gives every
set the seconds that features, perturbation and task take. Accuracy is that on the 2,000 test images.
`cost` times a step of `distill` on ViT-B/16 beside its bare parts.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import peftc
from peftc.data import open_data
from peftc.models import load
from peftc.models.place import runnable
from peftc.options import Reading, Recipe
from peftc.tasks.table import TASKS
from peftc.tasks.task import Batch
from peftc.training import imitation, samples
from peftc.training.loop import fit

DATA = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
CIFAR = DATA / "sets" / "cifar10_jpg" / "cifar10_jpg_5k2k.zip"
WEIGHTS = DATA / "weights" / "vit_tiny_patch16_224" / "model.safetensors"
SIZE, HEALING = 96, 300
VARIANTS: dict[str, str | None] = {
    "truncated": None,
    "task": "task=1",
    "features": "features=30",
    "task + features (PELA's weight)": "features=1,task=1",
    "task + features": "features=30,task=1",
    "task + features + perturbation": "features=30,perturbation=1,task=1",
    "task + logits": "logits=1,task=1",
    "task + features, scale-free": "features=1,task=1",
}
SETTINGS = {"task + features, scale-free": {"features.scale_free": True}}


def tuned(folder: Path) -> Path:
    """Fine-tune ViT-Ti on CIFAR-10 and return its timm folder."""
    if (folder / "model.safetensors").is_file():
        return folder
    arguments = {"img_size": SIZE}
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(WEIGHTS)},
        num_classes=10,
        **arguments,
    )
    preprocess = {
        "input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    names = open_data(str(CIFAR)).classes
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": arguments,
        "pretrained_cfg": {**preprocess, "num_classes": 10, "label_names": names},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    def write(module: nn.Module) -> None:
        state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    write(network)
    model = imitation.trainable(load.load(folder))
    given = samples.read(model, str(CIFAR), Reading(), labels=True, held_out=0)
    work = imitation.Imitation(model, None, given, {}, 1.0, [])
    fit(
        model.module, len(given.train), work.batch, work.loss,
        Recipe(epochs=4, batch_size=64, learning_rate=3e-4, weight_decay=0.05), device="cpu",
    )  # fmt: skip
    write(model.module)
    return folder


def heal(small: Path, out: Path, loss: str, seed: int, dense: Path, **options: Any) -> tuple[float, float, float]:
    """Return accuracy, the distance of the features from the teacher's on test images, and seconds per step."""
    report = peftc.distill(
        small, output_dir=out, teacher=dense, data=str(CIFAR), num_samples=HEALING, held_out=0, seed=seed,
        loss=loss, batch_size=32, learning_rate=5e-4, device="cpu", overwrite=True, **options,
    )  # fmt: skip
    measured = report.data.get("quality")
    found = measured["metrics"]["top1"]["value"] if measured else accuracy(report.artifact)
    return found, gap(report.artifact, dense), report.data["seconds_per_step"]


def accuracy(model: Any) -> float:
    return float(peftc.evaluate(model, data=str(CIFAR), device="cpu").data["metrics"]["top1"]["value"])


def gap(model: Any, dense: Path) -> float:
    """Return the mean squared error of the features on 256 test images."""
    student, teacher = (runnable(load.load(each), device="cpu") for each in (model, dense))
    given = samples.read(student, f"{CIFAR}@test", Reading(num_samples=256), labels=False, held_out=0)
    work = imitation.Imitation(
        student, teacher, given, imitation.terms({"features": 1.0}, {}), 0, imitation.pair(student, teacher)
    )
    with torch.no_grad():
        parts = [work.loss(student.module, work.batch(range(at, at + 64))) for at in range(0, 256, 64)]
    return statistics.mean(float(part["features"]) for part in parts)


def ablation(asked: argparse.Namespace) -> None:
    work = Path(asked.work)
    dense = tuned(work / "dense")
    small = work / f"small-{asked.ratio}"
    peftc.decompose(dense, output_dir=small, ratio=asked.ratio, method="svd", allocation="uniform", device="cpu")
    print(json.dumps({"variant": "dense", "accuracy": accuracy(dense)}), flush=True)
    print(json.dumps({"variant": "truncated", "accuracy": accuracy(small), "gap": gap(small, dense)}), flush=True)
    seconds: dict[tuple[str, int], float] = {}
    for seed in range(asked.seeds):
        for name, loss in VARIANTS.items():
            if loss is None:
                continue
            found = heal(small, work / "healed", loss, seed, dense, steps=asked.steps, settings=SETTINGS.get(name))
            seconds[name, seed] = found[2]
            line = {"variant": name, "seed": seed, "steps": asked.steps, "accuracy": found[0], "gap": found[1]}
            print(json.dumps({**line, "seconds_per_step": found[2]}), flush=True)
        most = seconds["task + features + perturbation", seed]
        for name in ("task", "task + logits"):
            steps = round(asked.steps * most / seconds[name, seed])
            found = heal(small, work / "healed", str(VARIANTS[name]), seed, dense, steps=steps)
            line = {
                "variant": f"{name}, equal time",
                "seed": seed,
                "steps": steps,
                "accuracy": found[0],
                "gap": found[1],
            }
            print(json.dumps(line), flush=True)


def cost(asked: argparse.Namespace) -> None:
    """Time a step with features and task beside a teacher forward, a student forward-backward and an optimizer step."""
    torch.manual_seed(0)
    whole = timm.create_model("vit_base_patch16_224")
    work = Path(asked.work)
    small = work / "vit-b"
    teacher = runnable(load.load(whole), device="cpu")
    config = {"architecture": "vit_base_patch16_224", "num_classes": 1000, "model_args": {}}
    (work / "vit-b-dense").mkdir(parents=True, exist_ok=True)
    (work / "vit-b-dense" / "config.json").write_text(json.dumps(config))
    save_file(dict(whole.state_dict()), work / "vit-b-dense" / "model.safetensors", metadata={"format": "pt"})
    peftc.decompose(work / "vit-b-dense", output_dir=small, ratio=0.5, method="svd", allocation="uniform", device="cpu")
    student = imitation.trainable(load.load(small))
    x, y = torch.randn(asked.batch, 3, 224, 224), torch.randint(0, 1000, (asked.batch,))
    batch = Batch(x, y)
    given = samples.Samples(TASKS["image-classification"], True, None, None, {})  # type: ignore[arg-type]
    pairs = imitation.pair(student, teacher)
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=1e-6)

    def bare() -> None:
        with torch.no_grad():
            teacher.module(x)
        nn.functional.cross_entropy(student.module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def step(terms: dict[str, float]) -> Any:
        held = imitation.Imitation(student, teacher, given, imitation.terms(terms, {}), 1.0, pairs)
        recipe = Recipe(steps=2, batch_size=asked.batch, learning_rate=1e-6)

        def run() -> None:
            fit(student.module, asked.batch, lambda rows: imitation.Given(batch), held.loss, recipe, device="cpu")

        return run

    def twice() -> None:
        bare()
        bare()

    runs = {
        "bare": twice, "bare again": twice, "features + task": step({"features": 1.0}),
        "features + perturbation + task": step({"features": 1.0, "perturbation": 1.0}),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(asked.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append((time.perf_counter() - start) / 2)
    for name in runs:
        ratios = [one / two for one, two in zip(times[name], times["bare"], strict=True)]
        line = {"step": name, "of bare": round(statistics.median(ratios), 3), "seconds": round(min(times[name]), 3)}
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("ablation", "cost"))
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", default="distillation-work")
    asked = parser.parse_args()
    ablation(asked) if asked.what == "ablation" else cost(asked)


if __name__ == "__main__":
    main()
