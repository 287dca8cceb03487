"""CLIP and BLIP end to end: compose images with captions, train, decompose, distill, and measure recall each time.

    python tests/benchmarks/retrieval.py [clip] [blip] [--work FOLDER] [--minutes 5] [--heal 1.5]

Small networks of 64 wide towers, built from configs, on 2 x 2 grids of MNIST digits: 6,200 distinct captions, 1,000 of
them for the test. Training is `distill` with the task's own loss alone; healing has the default terms.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import compose

import peftc


def measured(model: Any, data: Path) -> dict[str, float]:
    found = peftc.evaluate(model, data=f"{data}@test", device="cpu").data["metrics"]
    return {name: round(each["value"], 3) for name, each in found.items() if not name.endswith("r5")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["clip", "blip"])
    parser.add_argument("--work", type=Path, default=Path("retrieval-work"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--heal", type=float, default=1.5)
    asked = parser.parse_args()
    data = asked.work / "data"
    source = compose.tiles("mnist")
    if not data.is_dir():
        compose.compose(data, source, {"train": 5000, "validation": 200, "test": 1000})
    for kind in asked.kinds:
        fresh = compose.network(
            asked.work / kind, kind, side=56, labels=sorted(source["test"]), hidden_size=64, num_hidden_layers=3,
            num_attention_heads=2, intermediate_size=256, patch_size=14,
        )  # fmt: skip
        shared = {"data": str(data), "batch_size": 64, "device": "cpu"}
        trained = peftc.distill(
            fresh, output_dir=asked.work / f"{kind}-trained", loss="task=1", minutes=asked.minutes, learning_rate=1e-3,
            evaluations=2, **shared,
        )  # fmt: skip
        dense = trained.artifact
        print(json.dumps({"model": kind, "stage": "trained", "steps": trained.data["steps"], **measured(dense, data)}))
        for method, ratio in (("svd", 0.5), ("svd", 0.35), ("auto", 0.35)):
            small = asked.work / f"{kind}-{method}-{ratio}"
            given = {"data": str(data), "calibration_samples": 256} if method == "auto" else {}
            peftc.decompose(dense, output_dir=small, ratio=ratio, method=method, device="cpu", **given)
            line = {"model": kind, "stage": "decomposed", "method": method, "ratio": ratio}
            print(json.dumps({**line, **measured(small, data)}), flush=True)
            healed = peftc.distill(
                small, output_dir=asked.work / f"{small.name}-healed", teacher=dense, minutes=asked.heal, evaluations=2,
                **shared,
            )  # fmt: skip
            line = {**line, "stage": "distilled", "steps": healed.data["steps"]}
            print(json.dumps({**line, **measured(healed.artifact, data)}), flush=True)


if __name__ == "__main__":
    main()
