"""What a whitened decomposition of ViT-B/16 costs beside the calibration forwards and a loop of plain SVDs.

    OMP_NUM_THREADS=1 python tests/benchmarks/calibration.py [--images 32] [--rounds 3]

Asked: with 128 images at most 1.5 times the forward passes alone plus 0.35 of the loop of `torch.linalg.svd`. Forwards
alone, the same again (A/A) and forwards that collect are interleaved; solving does not depend on the images: its time
is added once, and the forwards are scaled to 128 images. With one thread CPU seconds are counted, which other work on
the machine disturbs less; more threads wait for each other by spinning, so there it is seconds.
"""

import argparse
import statistics as figures
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch

from peftc.calibration import collection, statistics
from peftc.calibration.prepared import Request, prepare
from peftc.methods.decompose.whitened import whitened
from peftc.models.inputs import outputs
from peftc.models.load import load
from peftc.models.targets import find_targets
from peftc.nn import lowrank
from peftc.tasks.task import batches


def seconds(call: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = load(timm.create_model("vit_base_patch16_224"))
    targets, _ = find_targets(model, conv_method="spatial")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npz"
        random = np.random.default_rng(0)
        np.savez(images, x_train=random.normal(size=(asked.images, 3, 224, 224)).astype(np.float32))
        prepared = prepare(model, Request(str(images), samples=asked.images), "cpu")
        runs = batches(None, prepared.encoded.size, prepared.request.batch_size)

        def forwards() -> None:
            for run in runs:
                outputs(prepared.model, prepared.encoded.batch(run).inputs)  # type: ignore[arg-type]

        def collects() -> None:
            with tempfile.TemporaryDirectory() as work:
                found.append(collection.collect(prepared, targets, ("second_moment",), Path(work)))
                known.update({name: found[-1].of(name, torch.device("cpu")) for name in targets})

        found: list[object] = []
        known: dict[str, statistics.Found] = {}
        forwards()
        times: dict[str, list[float]] = {"alone": [], "again": [], "collecting": []}
        for _ in range(asked.rounds):
            for name, call in (("alone", forwards), ("again", forwards), ("collecting", collects)):
                times[name].append(seconds(call))

        def solves() -> None:
            for name in targets:
                weight = lowrank.matrix(model.module.get_submodule(name).weight.detach(), "linear")  # type: ignore[arg-type]
                moment = known[name].of(("second_moment",))["second_moment"]
                whitened(weight, second_moment=moment).truncate(64)

        def loops() -> None:
            for name in targets:
                torch.linalg.svd(model.module.get_submodule(name).weight.detach(), full_matrices=False)  # type: ignore[arg-type]

        pairs = [(seconds(solves), seconds(loops)) for _ in range(asked.rounds)]
    alone = figures.median(times["alone"])
    control = figures.median(b / a for a, b in zip(times["alone"], times["again"], strict=True))
    collecting = figures.median(b / a for a, b in zip(times["alone"], times["collecting"], strict=True))
    solving = figures.median(solve / loop for solve, loop in pairs)
    loop = figures.median(each for _, each in pairs)
    whole = alone * 128 / asked.images
    spent, allowed = collecting * whole + solving * loop, 1.5 * whole + 0.35 * loop
    print(f"A/A {control:.3f}; collecting / forwards {collecting:.3f}; solving / svd loop {solving:.3f}")
    print(f"128 images: {spent / allowed:.3f} of what is allowed (forwards {whole:.1f} s, svd loop {loop:.1f} s)")


if __name__ == "__main__":
    main()
