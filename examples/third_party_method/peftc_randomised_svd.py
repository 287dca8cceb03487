"""Randomised SVD: find the leading singular vectors from a random sketch of the weight.

Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, arXiv 0909.4061: algorithm 4.4 (randomised
subspace iteration) finds the range, algorithm 5.1 (direct SVD) the vectors in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftc.methods.spectrum import Spectrum


def randomised_svd(weight: Tensor, *, power_iterations: int = 2, oversampling: int = 8, seed: int = 0) -> Spectrum:
    """Sketch as many components of ``weight`` as can pay off, and complete them so that every rank has an answer.

    Above the break-even rank, out * in / (out + in), factors are larger than the weight, so peftc asks for none there
    and the sketch ends there. The components after it are not singular vectors but an orthonormal basis of the rest:
    the error at every rank is the one reported, it is just not the least possible.

    Args:
        weight: (out, in), float32 or float64, finite.
        power_iterations: >= 0; more of them separate close singular values better.
        oversampling: >= 0 columns of the sketch beyond the break-even rank.
        seed: of the sketch.
    """
    out, in_ = weight.shape
    if out > in_:
        flipped = randomised_svd(
            weight.T, power_iterations=power_iterations, oversampling=oversampling, seed=seed
        ).solution
        return Spectrum.of(weight, flipped.values, flipped.down.T, flipped.up.T)
    width = min(out, out * in_ // (out + in_) + oversampling)
    basis = _range(weight, max(1, width), power_iterations, seed)  # (out, width)
    left, _, _ = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    up = torch.cat([basis @ left, _complement(basis)], dim=1)  # (out, out), orthonormal
    down = up.T @ weight
    values = torch.linalg.vector_norm(down, dim=1, dtype=torch.float64)
    order = values.argsort(descending=True, stable=True)
    return Spectrum.of(weight, values[order], up[:, order], down[order])


def _range(weight: Tensor, width: int, power_iterations: int, seed: int) -> Tensor:
    """Return an orthonormal basis (out, width) of roughly the leading left singular vectors (algorithm 4.4)."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same sketch
    sketch = torch.randn(weight.shape[1], width, generator=generator, dtype=weight.dtype).to(weight.device)
    basis, _ = torch.linalg.qr(weight @ sketch)
    for _ in range(power_iterations):
        other, _ = torch.linalg.qr(weight.T @ basis)
        basis, _ = torch.linalg.qr(weight @ other)
    return basis


def _complement(basis: Tensor) -> Tensor:
    """Return an orthonormal basis (out, out - width) of what is orthogonal to ``basis`` (out, width)."""
    whole, _ = torch.linalg.qr(basis, mode="complete")
    return whole[:, basis.shape[1] :]
