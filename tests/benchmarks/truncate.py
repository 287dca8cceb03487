"""Slices of one decomposition against a direct decompose: seconds, bytes, ranks, factors, and the error of the slices.

For each trained model: the seconds of ``--keep-all-ranks``, and per budget those of a direct decompose and of a
truncate (imports done before, files in the cache); the largest relative difference of their factors; and the excess of
the slices' squared errors over the optimum of float64 singular values, the largest of all modules.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from real_models import real_models
from safetensors.torch import load_file

from peftc import decompose, truncate
from peftc.models import load as models
from peftc.models.model import Model
from peftc.nn import lowrank
from peftc.report import Report
from peftc.store import manifest
from peftc.store.source import Source

RATIOS = (0.35, 0.5, 0.75)


def timed(run: Callable[[], Report]) -> tuple[Report, float]:
    """Return what a step reports, and its seconds."""
    start = time.perf_counter()
    report = run()
    return report, time.perf_counter() - start


def difference(ours: Path, theirs: Path) -> float:
    """Return the largest difference of two tensors of one name, relative to the norm."""
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    norm = torch.linalg.vector_norm
    return max(float(norm(a[name].double() - b[name].double()) / norm(b[name].double()).clamp_min(1e-30)) for name in a)


def excess(dense: Model, cut: Path, optima: dict[str, torch.Tensor]) -> float:
    """Return the largest (squared error - optimum) / optimum of a folder's factors."""
    state = load_file(cut / "model.safetensors")
    worst = 0.0
    for name, edit in manifest.read(cut).modules.items():
        weight = lowrank.matrix(dense.module.get_submodule(name).weight.detach().double(), edit["form"])
        if name not in optima:
            values = torch.linalg.svdvals(weight).square()
            optima[name] = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        parts = {key: state[f"{name}.{key}"].double() for key in ("up.weight", "down.weight")}
        product = lowrank.dense_weight(parts, tuple(dense.module.get_submodule(name).weight.shape), edit["form"])
        error = float((weight - lowrank.matrix(product, edit["form"])).square().sum())
        optimum = float(optima[name][edit["rank"]])
        worst = max(worst, (error - optimum) / optimum)
    return worst


def compare(name: str, source: Source, folder: Path) -> None:
    """Print a row per ratio."""
    dense = models.load(source)
    decompose(source, rank=1, output_dir=folder / "warm")  # reads the files and imports what is left
    _, once = timed(lambda: decompose(source, keep_all_ranks=True, output_dir=folder / "all"))
    whole = Source(str(folder / "all"), allow_code=True)
    sizes = [sum(path.stat().st_size for path in (folder / "all").glob(f"{stem}*")) for stem in ("model", "factors")]
    print(f"{name}: --keep-all-ranks {once:.2f} s, weights {sizes[0]:,} bytes, factors {sizes[1]:,} bytes", flush=True)
    optima: dict[str, torch.Tensor] = {}
    for ratio in RATIOS:
        ours, theirs = folder / f"cut-{ratio}", folder / f"direct-{ratio}"
        direct, slow = timed(lambda: decompose(source, ratio=ratio, output_dir=theirs))  # noqa: B023
        cut, quick = timed(lambda: truncate(whole, ratio=ratio, output_dir=ours))  # noqa: B023
        same = [[row["rank"] for row in report.data["modules"]] for report in (direct, cut)]
        print(
            f"  {ratio}: direct {slow:.2f} s, truncate {quick:.2f} s ({quick / slow:.2f} of it), "
            f"{cut.data['size']['after']['bytes']:,} bytes, ranks {'equal' if same[0] == same[1] else 'DIFFER'}, "
            f"factors within {difference(ours, theirs):.1e}, excess {excess(dense, ours, optima):.1e}",
            flush=True,
        )


def main() -> None:
    """Compare the models named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    asked = parser.parse_args().models
    found = real_models()
    for name in asked or found:
        if name not in found:
            sys.exit(f"unknown model {name}: {', '.join(found)}")
        with tempfile.TemporaryDirectory() as folder:
            compare(name, found[name].source, Path(folder))


if __name__ == "__main__":
    main()
