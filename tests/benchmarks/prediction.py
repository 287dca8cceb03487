"""How far the predicted loss is from the measured one.

    python tests/benchmarks/prediction.py [ViT-Ti] [MiniLM]

Calibrates `kfac` at each ratio and sets its prediction beside the measured divergence from the dense model. A model
that gives vectors is read as a Gaussian of unit variance around them, so its divergence is half the squared distance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from real_models import SETS, Real, real_models

import peftc
from peftc.data import open_data

SAMPLES = 64  # calibrated on; the measurement takes others beside them
RATIOS = ("0.95", "0.9", "0.75", "0.5")
CALIBRATION = {"ViT-Ti": "imagenet_sample/imagenet_sample_150.zip", "MiniLM": "stsb_en/stsb-en-train.csv"}


def main() -> None:
    """Print the table."""
    models = real_models()
    print("| model | ratio | predicted | measured | predicted / measured |")
    print("|---|--:|--:|--:|--:|")
    for name in sys.argv[1:] or CALIBRATION:
        for ratio in RATIOS:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "small"
                data = f"{SETS}/{CALIBRATION[name]}"
                made = peftc.decompose(
                    models[name].source, output_dir=out, ratio=ratio, data=data, calibration_samples=SAMPLES
                )
                predicted = made.data["predicted"]["value"]
                measured = half_distance(models[name], out) if name == "MiniLM" else divergence(models[name], out)
            print(f"| {name} | {ratio} | {predicted:.4g} | {measured:.4g} | {predicted / measured:.2f} |", flush=True)


def divergence(real: Real, small: Path) -> float:
    """Return the divergence from the dense model in nats per sample, as `evaluate` measures it."""
    found = peftc.evaluate(peftc.Source(str(small)), data=real.data, against=real.source)
    return float(found.data["against"]["divergence"]["value"])


def half_distance(real: Real, small: Path) -> float:
    """Return half the mean squared distance between sentence vectors of the development split."""
    data = open_data(real.data, seed=0, task=None, role="evaluation").take(300, seed=0)
    texts = [text for index in range(len(data)) for text in data[index][0]]
    one = vectors(real.source.spec, texts, peftc.load(real.source.spec))
    other = vectors(real.source.spec, texts, peftc.load(small))
    return float((one - other).square().sum(1).mean() / 2)


@torch.no_grad()
def vectors(tokenizer: str, texts: list[str], network: Any) -> torch.Tensor:
    """Return the normalised means over tokens."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(tokenizer)
    found = []
    for start in range(0, len(texts), 32):
        batch = read(texts[start : start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt")
        states, mask = network(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


if __name__ == "__main__":
    main()
