"""Time factors and spectra against a plain loop of ``torch.linalg.svd``, and check every module's error.

    python tests/benchmarks/factorization.py [--rounds 5] [--threads 2]

All block linears of ViT-B/16 (timm's initialisation, and a power-law spectrum i^-0.5 in the same shapes), of the
trained ViT-Ti and of MiniLM. Interleaved in one run, in rotating order, with the loop twice (A/A control). The
reference error is that of float64 singular values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from real_models import real_models
from torch import Tensor, nn

from peftc.methods.decompose.svd import svd
from peftc.models.load import load
from peftc.plans.allocate import uniform_rank
from peftc.plans.plan import ratio_of


def vit_b() -> list[Tensor]:
    """Return the 48 block linears of ViT-B/16 as timm initialises them."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_base_patch16_224", pretrained=False)
    return [
        m.weight.detach() for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")
    ]


def power_law(weights: list[Tensor], exponent: float) -> list[Tensor]:
    """Return weights of the same shapes whose singular values are i^-exponent."""
    made = []
    for weight in weights:
        left, _, right = torch.linalg.svd(torch.randn_like(weight), full_matrices=False)
        made.append((left * torch.arange(1, left.shape[1] + 1) ** -exponent) @ right)
    return made


def blocks_of(name: str) -> list[Tensor]:
    """Return the block linears of a trained model."""
    network = load(real_models()[name].source).module
    linears = {name: m.weight.detach() for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    return [weight for name, weight in linears.items() if name.startswith(("blocks.", "encoder.layer."))]


def plain(weights: list[Tensor]) -> None:
    """Run the loop that everybody writes."""
    for weight in weights:
        torch.linalg.svd(weight, full_matrices=False)


def rank_of(weight: Tensor) -> int:
    """Return PELA's rank at ratio 1/2."""
    rank = uniform_rank(tuple(weight.shape), "linear", ratio_of("1/2"))
    assert isinstance(rank, int)
    return rank


def factors(weights: list[Tensor]) -> None:
    """Factor every weight at PELA's rank."""
    for weight in weights:
        svd(weight).truncate(rank_of(weight))


def values(weights: list[Tensor]) -> None:
    """Compute every spectrum."""
    for weight in weights:
        _ = svd(weight).values


def timed(work: Callable[[list[Tensor]], None], weights: list[Tensor]) -> float:
    """Return seconds of one run."""
    start = time.perf_counter()
    work(weights)
    return time.perf_counter() - start


def errors(weights: list[Tensor]) -> tuple[float, float, dict[str, int], float]:
    """Return true and certified excess of the squared error, rungs used, and the error of a value, each the largest."""
    true, bound, rungs, off = 0.0, 0.0, {}, 0.0
    for weight in weights:
        exact = torch.linalg.svdvals(weight.double())
        spectrum = svd(weight)
        off = max(off, float((spectrum.values - exact).abs().max() / exact[0]))
        cut = spectrum.truncate(rank_of(weight))
        optimum = float(exact[rank_of(weight) :].square().sum())
        left = weight.double() - cut.factors.up.double() @ cut.factors.down.double()
        true = max(true, float(left.square().sum()) / optimum - 1)
        bound = max(bound, cut.excess or 0.0)
        rungs[cut.rung] = rungs.get(cut.rung, 0) + 1
    return true, bound, rungs, off


def main() -> None:
    """Print one row per set of weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = vit_b()
    sets = {
        "ViT-B/16, initialised": base,
        "ViT-B/16 shapes, i^-0.5": power_law(base[:4], 0.5) * 12,
        "ViT-Ti, trained": blocks_of("ViT-Ti"),
        "MiniLM, trained": blocks_of("MiniLM"),
    }
    print("| weights | A/A | factors / loop | spectra / loop | excess, true | bound | value error | rungs |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for name, weights in sets.items():
        works = [plain, plain, factors, values]
        rows: list[list[float]] = [[] for _ in works]
        for turn in range(options.rounds + 1):
            order = [(turn + shift) % len(works) for shift in range(len(works))]
            for at in order:
                seconds = timed(works[at], weights)
                if turn:  # the first round warms up
                    rows[at].append(seconds)

        def ratio(above: list[float], below: list[float]) -> str:
            ratios = [a / b for a, b in zip(above, below, strict=True)]
            return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"

        true, bound, rungs, off = errors(weights)
        cells = [ratio(rows[1], rows[0]), ratio(rows[2], rows[0]), ratio(rows[3], rows[0])]
        print(f"| {name} | {' | '.join(cells)} | {true:.1e} | {bound:.1e} | {off:.1e} | {rungs} |", flush=True)


if __name__ == "__main__":
    main()
