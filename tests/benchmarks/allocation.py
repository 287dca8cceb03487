"""Which allocation and which convolution method lose least: every default of `decompose` is chosen here.

    python tests/benchmarks/allocation.py [MODEL ...]

Prints, per trained model, ratio and choice, the metric on labelled data, its agreement with the dense model, and the
divergence from it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from real_models import Real, real_models

import peftc
from peftc.errors import PeftcError

RATIOS = ("1/2", "3/4", "9/10")
ALLOCATIONS = ("uniform", "global", "energy", "convex")
CONV_METHODS = ("channel", "spatial")


def one(name: str, real: Real, ratio: str, allocation: str, conv_method: str) -> str:
    """Decompose and evaluate once; return the row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "small"
        try:
            made = peftc.decompose(
                real.source, output_dir=out, ratio=ratio, allocation=allocation, conv_method=conv_method
            )
            small = peftc.Source(str(out), allow_code=True)
            seen = peftc.evaluate(small, data=real.data, against=real.source).data
        except PeftcError as error:
            return f"| {name} | {ratio} | {allocation} | {conv_method} | {error.what} |"
    other = seen["against"]
    figures = [seen["metrics"][real.metric], other["metrics"][real.metric], other["agreement"], other["divergence"]]
    texts = ["" if figure is None else f"{figure['value']:.3f}" for figure in figures]
    kept = made.data["ratio"]["eligible"]
    return f"| {name} | {ratio} | {kept:.3f} | {allocation} | {conv_method} | {' | '.join(texts)} |"


def main() -> None:
    """Print the table."""
    models = real_models()
    print("| model | ratio | kept | allocation | conv | metric | dense | agreement | divergence |")
    print("|---|---|--:|---|---|--:|--:|--:|--:|")
    for name in sys.argv[1:] or models:
        convs = CONV_METHODS if name.startswith("ResNet") else CONV_METHODS[:1]
        for ratio in RATIOS:
            for conv in convs:
                for allocation in ALLOCATIONS:
                    print(one(name, models[name], ratio, allocation, conv), flush=True)


if __name__ == "__main__":
    main()
