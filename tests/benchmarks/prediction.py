"""How far the predicted loss is from the measured one.

    python tests/benchmarks/prediction.py [MODEL ...] [--ratios 0.9 0.75 0.5]

What `decompose --data` predicts, and the sum of what its modules lose one by one, beside the divergence from the dense
model on samples that nothing was calibrated on, in nats per sample. A model that gives vectors is read as a Gaussian of
unit variance around them, so its divergence is half the squared distance.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from methods import SETS, cases

import peftc
from peftc.data import open_data

MODELS = ("ViT-Ti", "MiniLM", "ResNet-20", "stories260K")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--ratios", nargs="+", default=["0.95", "0.9", "0.75", "0.5"])
    asked = parser.parse_args()
    print("| model | ratio | sum over modules | of measured | predicted | measured | predicted / measured |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        known = cases(Path(folder))
        for name in asked.models:
            model, specs, options = known[name]
            for ratio in asked.ratios:
                out = Path(folder) / "small"
                made = peftc.decompose(model, output_dir=out, overwrite=True, ratio=ratio, data=specs[0], **options)
                found = made.data["predicted"]
                if name == "MiniLM":
                    measured = half_distance(model, out)
                else:  # of a language model that is per token
                    each = made.data["quality"]["against"]["divergence"]["value"]
                    measured = each * options.get("max_length", 1)
                apart, value = found["apart"], found["value"]
                row = [name, ratio, f"{apart:.4g}", f"{apart / measured:.2f}", f"{value:.4g}", f"{measured:.4g}"]
                print(f"| {' | '.join(row)} | {value / measured:.2f} |", flush=True)


def half_distance(dense: Path, small: Path) -> float:
    """Return half the mean squared distance between sentence vectors of the development split."""
    data = open_data(f"{SETS}/stsb_en/stsb-en-dev.csv", seed=0, task=None, role="evaluation").take(300, seed=0)
    texts = [text for index in range(len(data)) for text in data[index][0]]
    one, other = (vectors(dense, texts, peftc.load(each)) for each in (dense, small))
    return float((one - other).square().sum(1).mean() / 2)


@torch.no_grad()
def vectors(tokenizer: Path, texts: list[str], network: Any) -> torch.Tensor:
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
