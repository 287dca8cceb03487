"""Quality of factors with and without a shared down factor, over ratios, methods and allocations.

One calibration serves all runs. Prints a row per run: ratio, method, allocation, joint, parameters, quality.

    python tests/benchmarks/joint.py MODEL DATA RATIOS [METHODS]
    python tests/benchmarks/joint.py all-MiniLM-L6-v2 stsb_en 0.75,0.5,0.35 svd,whitened,kfac
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peftc.calibration import collection
from peftc.steps import decompose as step
from peftc.steps.evaluate import evaluate

FIGURES = ("spearman", "divergence", "agreement")
NEEDS = ("second_moment", "output_gradient_gram")


def keep_statistics(folder: Path) -> None:
    """Let every run read what the first one collected, and leave the measuring to this script."""
    step._is_measured = lambda *_: False  # type: ignore[assignment]
    collect = collection.collect

    def kept(prepared: Any, targets: Any, _needs: Any, _folder: Path) -> Any:
        return collect(prepared, targets, NEEDS, folder)

    collection.collect = kept  # type: ignore[assignment]


def quality(folder: Path, model: str, data: str) -> dict[str, Any]:
    """Return the measured figures of an artifact, beside the dense model where that is what counts."""
    generated = data.startswith("generated:")
    found = evaluate(folder, data=data, against=model if generated else None, seed=0, device="cpu").data
    measured = {**found["metrics"], **found.get("against", {})}
    return {name: round(one["value"], 4) for name, one in measured.items() if name in FIGURES}


def main() -> None:
    """Run the grid."""
    model, data, ratios, *rest = sys.argv[1:]
    names = (rest or ["svd,whitened,kfac"])[0].split(",")
    print("ratio method allocation joint seconds quality", flush=True)
    with tempfile.TemporaryDirectory() as place:
        keep_statistics(Path(place))
        grid = itertools.product(ratios.split(","), names, ("uniform", "auto"), (False, True))
        for number, (ratio, method, allocation, joint) in enumerate(grid):
            out = Path(place) / str(number)
            start = time.perf_counter()
            step.decompose(
                model, output_dir=out, ratio=ratio, method=method, allocation=allocation, joint=joint, device="cpu",
                data=None if method == "svd" else data, task="causal-lm" if data.startswith("generated:") else None,
            )  # fmt: skip
            took = time.perf_counter() - start
            found = quality(out, model, data)
            print(ratio, method, allocation, joint, f"{took:.1f}", found, flush=True)


if __name__ == "__main__":
    main()
