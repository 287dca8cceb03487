"""Low rank under a weighted norm: the best approximation of ``left @ weight @ root`` and what it means for the weight.

With C = E[x x^T] of a module's inputs and a metric L^2 on its outputs, the error that counts is
E|L (W - W') x|^2 = ||L (W - W') C^(1/2)||_F^2. The best W' of rank r is L^-1 U_r U_r^T L W, with U the left singular
vectors of L W C^(1/2) (Eckart and Young, 1936, after a change of variables). They are eigenvectors of L (W C W^T) L,
so where out <= in the second moment of the outputs, W C W^T, is all that is needed. Where out > in, L W = Q R with
orthonormal columns Q leaves the same problem for R, which is square. R comes from the Cholesky factor of (L W)^T L W
where that leaves Q orthonormal, as it does for a well-conditioned weight, else from Householder reflections. C itself
is never factored: it may be singular, as it is after a layer norm. Nothing is inverted but L and R.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peftc.methods.spectrum import Rungs, Solution, Spectrum, gram_matrix

RESIDUAL = 1e-9  # accepted |S - U diag(e) U^T| relative to |S|, and |I - U U^T| to |I|, Frobenius norms
PROBES = 16  # Gaussian vectors that they are estimated with
SMALLEST = 1e-6  # of the largest scale of a feature, so that undoing it stays finite
VANISHING = 1e-14  # eigenvalues below this share of the largest are rounding
FAINT = 1e-8  # least damping of a block, as a share of the mean eigenvalue of all blocks, so that inverses keep digits

Gram: TypeAlias = Tensor | tuple[Tensor, ...]  # several are the blocks of a block diagonal matrix


@dataclass(frozen=True)
class Moment:
    """A second moment, float64, symmetric: of the inputs, or of the outputs before the bias."""

    matrix: Tensor  # (in, in) = E[x x^T] for side ``input``; (out, out) = E[W x x^T W^T] for side ``output``
    side: str = "input"  # ``input`` or ``output``

    def of_outputs(self, weight: Tensor) -> Tensor:
        """Return (out, out) = E[W x x^T W^T]."""
        return self.matrix if self.side == "output" else _symmetric(weight @ self.matrix @ weight.T)


def weighted(weight: Tensor, moment: Moment, gram: Gram | None = None, *, damping: float = 0.0) -> Spectrum:
    """Decompose ``weight`` under the norm that a second moment, and a gram matrix on the output side, define.

    Args:
        weight: (out, in), float32 or float64, finite.
        moment: of the inputs or outputs.
        gram: metric on the outputs: (out, out), or () for a multiple of the identity, or the blocks of a block diagonal
            matrix; None is the identity.
        damping: >= 0, share of the gram matrix's, or each block's, mean eigenvalue that is added to all of them.
    """
    solve = partial(_solve, moment=moment, gram=gram, damping=damping)
    rungs: Rungs = {
        "cholesky64": lambda weight, _vectors: solve(weight, torch.linalg.eigh, _by_cholesky),
        "eigh64": lambda weight, _vectors: solve(weight, torch.linalg.eigh, _by_reflections),
        "svd64": lambda weight, _vectors: solve(weight, _by_svd, _by_reflections),
    }
    if len(weight) <= weight.shape[1]:
        del rungs["cholesky64"]
    if weight.device.type != "cpu":
        rungs["svd64-cpu"] = lambda weight, _vectors: solve(weight, _by_svd_on_cpu, _by_reflections)
    return Spectrum(weight, rungs)


Solver = Callable[[Tensor], tuple[Tensor, Tensor]]
Lift = Callable[[Tensor], Tensor]  # (in, k) -> (out, k), by a matrix with orthonormal columns
Split = Callable[[Tensor], tuple[Lift, Tensor]]


def _solve(weight: Tensor, solver: Solver, split: Split, moment: Moment, gram: Gram | None, damping: float) -> Solution:
    """Return values (k,), up (out, k) = L^-1 U and down (k, in) = U^T L W for k = min(out, in)."""
    wide = weight.double()
    scale, root, inverse = _roots(gram, damping, solver)
    metric = wide if root is None else root @ wide  # L W
    if len(wide) <= wide.shape[1]:
        outer = moment.of_outputs(wide)
        energies, basis = _ordered(outer if root is None else _symmetric(root @ outer @ root), metric, solver)
        up, down = basis, basis.T @ metric
    else:
        lift, square = split(metric)
        if moment.side == "output":
            seen = lift(torch.eye(len(square)).to(metric))
            outer = seen.T @ (moment.matrix if root is None else root @ moment.matrix @ root) @ seen
        else:
            outer = square @ moment.matrix @ square.T
        energies, basis = _ordered(_symmetric(outer), square, solver)
        up, down = lift(basis), basis.T @ square
    up = up if inverse is None else inverse @ up
    return Solution(energies.sqrt() * scale, up.to(weight.dtype), down.to(weight.dtype))


def _ordered(outer: Tensor, matrix: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (k,) of a moment of outputs (k, k), descending, and its eigenvectors.

    What the moment knows nothing of (fewer rows than features) comes last, in the order of a plain SVD of ``matrix``
    (k, in), whose outputs they are.
    """
    energies, basis = _descending(outer, solver)
    known = int((energies > VANISHING * energies[0]).sum())
    if known < len(energies):
        rest = basis[:, known:].T @ matrix
        turn = _descending(rest @ rest.T, solver)[1]
        basis = torch.cat([basis[:, :known], basis[:, known:] @ turn], 1)
        energies = torch.cat([energies[:known], torch.zeros_like(energies[known:])])
    return energies, basis


def _by_cholesky(matrix: Tensor) -> tuple[Lift, Tensor]:
    """Split a tall matrix (out, in) into one with orthonormal columns, as a function, and an upper triangle."""
    lower, failed = torch.linalg.cholesky_ex(gram_matrix(matrix))

    def lift(inner: Tensor) -> Tensor:
        return matrix @ torch.linalg.solve_triangular(lower.T, inner, upper=True)

    probes = _probes(lower)
    back = torch.linalg.solve_triangular(lower, matrix.T @ lift(probes), upper=False)
    if failed or not _near(back, probes, torch.linalg.vector_norm(probes)):
        raise torch.linalg.LinAlgError("the columns of its weight are too near to depending on each other")
    return lift, lower.T


def _by_reflections(matrix: Tensor) -> tuple[Lift, Tensor]:
    basis, triangle = torch.linalg.qr(matrix)
    return basis.matmul, triangle


def _roots(gram: Gram | None, damping: float, solver: Solver) -> tuple[Any, Tensor | None, Tensor | None]:
    """Return the square root of the damped gram matrix as a number times a matrix, and the inverse of that matrix.

    None stands for the identity; every block of several is damped by its own mean.
    """
    if gram is None:
        return 1.0, None, None
    blocks = [block.double() for block in (gram if isinstance(gram, tuple) else (gram,))]
    if blocks[0].ndim == 0:
        return (blocks[0] * (1 + damping)).sqrt(), None, None
    mean = torch.cat([block.diagonal() for block in blocks]).mean()
    if not bool(mean > 0):
        return mean.sqrt(), None, None
    pairs = [_block_roots(block / mean, damping, FAINT if len(blocks) > 1 else VANISHING, solver) for block in blocks]
    return mean.sqrt(), torch.block_diag(*(root for root, _ in pairs)), torch.block_diag(*(inv for _, inv in pairs))


def _block_roots(block: Tensor, damping: float, least: float, solver: Solver) -> tuple[Tensor, Tensor]:
    squares, axes = _descending(block, solver)
    squares = squares + (damping * block.diagonal().mean()).clamp_min(least)
    return (axes * squares.sqrt()) @ axes.T, (axes / squares.sqrt()) @ axes.T


def _descending(matrix: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, descending and >= 0, and eigenvectors of a symmetric, positive semidefinite matrix."""
    energies, basis = solver(matrix)
    energies, basis = energies.flip(0), basis.flip(1)
    probes = _probes(matrix)
    seen = basis.T @ probes
    size = torch.linalg.vector_norm(matrix) * PROBES**0.5
    multiplies_back = _near(basis @ (energies[:, None] * seen), matrix @ probes, size)
    if not (multiplies_back and _near(basis @ seen, probes, torch.linalg.vector_norm(probes))):
        raise torch.linalg.LinAlgError("its eigenvectors do not multiply back to the matrix")
    return energies.clamp_min(0), basis


def _probes(matrix: Tensor) -> Tensor:
    """Return Gaussian vectors (n, PROBES) for a matrix (n, n)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(matrix), PROBES, generator=generator, dtype=torch.float64).to(matrix.device)


def _near(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(found - expected) <= RESIDUAL * size)  # NaN is not near


def _by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``eigh`` would; shifted, as rounding may have left eigenvalues below zero."""
    shift = torch.linalg.vector_norm(matrix)
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    basis, values, _ = torch.linalg.svd(shifted)
    return (values - shift).flip(0), basis.flip(1)


def _by_svd_on_cpu(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, basis = _by_svd(matrix.cpu())
    return values.to(matrix.device), basis.to(matrix.device)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def scaled(spectrum: Callable[[Tensor], Spectrum], weight: Tensor, scale: Tensor) -> Spectrum:
    """Decompose ``weight * scale`` and undo the scale: the norm counts input feature i ``scale[i]`` times.

    Args:
        spectrum: the method for the scaled weight.
        weight: (out, in).
        scale: (in,), float64, at least 0.
    """
    scale = scale.clamp_min(SMALLEST * float(scale.max()) or 1.0)
    inner = spectrum(weight.double() * scale)  # float64: nothing certifies these factors
    largest = scale.max()

    def undone(weight: Tensor, _vectors: bool, rung: str) -> Solution | None:
        solution = inner.rungs[rung](inner.weight, True)
        if solution is None:
            return None
        up, down = solution.up, solution.down
        if down is None and up is not None:
            down = up.T @ inner.weight.to(up.dtype)
        elif down is not None:
            up = inner.weight.to(down.dtype) @ down.T
        assert up is not None and down is not None
        up, down = up / largest, down.double() * (largest / scale)
        return replace(solution, up=up.to(weight.dtype), down=down.to(weight.dtype), exact=False)

    return Spectrum(weight, {rung: partial(undone, rung=rung) for rung in inner.rungs})
