"""Truncated singular value decomposition: the best rank-r approximation in the Frobenius norm.

Eckart and Young, "The approximation of one matrix by another of lower rank", 1936; PELA (arXiv 2310.10700)
for its use and the balanced square-root split. Solved as an eigenproblem of the Gram matrix of the smaller side: with
W^T W = V diag(s^2) V^T, the factors are W V_r and V_r^T, and nothing is inverted but kept singular values.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from peftc.methods.spectrum import Rungs, Solution, Spectrum, gram_matrix

UNRESOLVED_ENERGY = 1e-4  # accepted share of the energy below the resolution, for factors, which are certified apart
UNRESOLVED_VALUES = 5e-5  # accepted share of the summed singular values below it, where the values are the answer


def svd(weight: Tensor) -> Spectrum:
    """Decompose ``weight`` by the cheapest of four rungs that can be certified.

    Args:
        weight: (out, in), float32 or float64, finite.

    Returns:
        the spectrum; its truncations are within 1e-6 of the optimal squared error.
    """
    rungs: Rungs = {
        "gram32": partial(_gram, dtype=torch.float32),
        "gram64": partial(_gram, dtype=torch.float64),
        "svd64": _direct,
        "svd64-cpu": _direct_on_cpu,
    }
    if weight.dtype == torch.float64:
        del rungs["gram32"]
    if weight.device.type == "cpu":
        del rungs["svd64-cpu"]
    return Spectrum(weight, rungs)


def _gram(weight: Tensor, vectors: bool, *, dtype: torch.dtype) -> Solution | None:
    out, in_ = weight.shape
    scale = float(torch.linalg.vector_norm(weight))
    matrix = (weight if out >= in_ else weight.T).to(dtype)
    # the squares of others would leave the range of float32
    scale = 1.0 if 1e-9 < scale < 1e9 else float(weight.abs().max()) or 1.0
    matrix = matrix if scale == 1.0 else matrix / scale
    gram = gram_matrix(matrix)
    energies, basis = torch.linalg.eigh(gram) if vectors else (torch.linalg.eigvalsh(gram), None)
    energies = energies.flip(0).double().clamp_min(0)
    resolution = 64 * torch.finfo(dtype).eps * float(energies[0])
    values = energies.sqrt() * scale
    blurred = float((energies < resolution).sum())
    if vectors:
        resolved = blurred * resolution <= UNRESOLVED_ENERGY * float(energies.sum())
    else:
        resolved = blurred * resolution**0.5 <= UNRESOLVED_VALUES * float(energies.sqrt().sum())
    if dtype == torch.float32 and not resolved:
        return None
    rows = None if basis is None else basis.flip(1).T.contiguous()  # (k, n)
    up, down = (None, rows) if rows is None or out >= in_ else (rows.T, None)
    return Solution(values, up, down)


def _direct(weight: Tensor, vectors: bool) -> Solution:
    if not vectors:
        return Solution(torch.linalg.svdvals(weight.double()), None, None, exact=True)
    up, values, down = torch.linalg.svd(weight.double(), full_matrices=False)
    out, in_ = weight.shape
    return Solution(values, None if out >= in_ else up, down if out >= in_ else None, exact=True)


def _direct_on_cpu(weight: Tensor, vectors: bool) -> Solution:
    found = _direct(weight.cpu(), vectors)
    back = [None if part is None else part.to(weight.device) for part in (found.values, found.up, found.down)]
    return replace(found, values=back[0], up=back[1], down=back[2])
