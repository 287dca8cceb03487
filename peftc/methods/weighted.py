"""Low rank under a weighted norm: the best approximation of ``left @ weight @ root`` and what it means for the weight.

With C = E[x x^T] of a module's inputs and a metric L^2 on its outputs, the error that counts is
E|L (W - W') x|^2 = ||L (W - W') C^(1/2)||_F^2. The best W' of rank r is L^-1 U_r U_r^T L W, with U the left singular
vectors of L W C^(1/2) (Eckart and Young, 1936, after a change of variables). They are eigenvectors of L (W C W^T) L,
so where out <= in the second moment of the outputs, W C W^T, is all that is needed; where out > in, the dual problem of
size in is solved with C's own square root. Nothing is inverted but L and kept singular values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from peftc.methods.spectrum import Solution, Spectrum

RESIDUAL = 1e-9  # accepted |S U - U diag(e)| relative to |S|, both Frobenius norms
VANISHING = 1e-14  # eigenvalues below this share of the largest are rounding
FAINT = 1e-8  # least damping of a block, as a share of the mean eigenvalue of all blocks, so that inverses keep digits

Gram: TypeAlias = Tensor | tuple[Tensor, ...]  # several are the blocks of a block diagonal matrix


@dataclass(frozen=True)
class Moment:
    """A second moment, float64, symmetric: of the inputs, or of the outputs before the bias.

    Attributes:
        matrix: (in, in) = E[x x^T] for side ``input``; (out, out) = E[W x x^T W^T] for side ``output``.
        side: ``input`` or ``output``.
    """

    matrix: Tensor
    side: str = "input"

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
    rungs: dict[str, Callable[[Tensor, bool], Solution | None]] = {
        "eigh64": lambda weight, _vectors: solve(weight, torch.linalg.eigh),
        "svd64": lambda weight, _vectors: solve(weight, _by_svd),
    }
    if weight.device.type != "cpu":
        rungs["svd64-cpu"] = lambda weight, _vectors: solve(weight, _by_svd_on_cpu)
    return Spectrum(weight, rungs)


Solver = Callable[[Tensor], tuple[Tensor, Tensor]]


def _solve(weight: Tensor, solver: Solver, *, moment: Moment, gram: Gram | None, damping: float) -> Solution | None:
    """Return values (k,), up (out, k) = L^-1 U and down (k, in) = U^T L W for k = min(out, in)."""
    out, in_ = weight.shape
    wide = weight.double()
    root, inverse = _roots(gram, damping, solver)
    metric = wide if root is None else root @ wide  # L W
    if out <= in_ or moment.side == "output":
        outer = moment.of_outputs(wide)
        outer = outer if root is None else _symmetric(root @ outer @ root)
        found = _descending(outer, solver)
        if found is None:
            return None
        energies, basis = found
        energies, basis = energies[: min(out, in_)], basis[:, : min(out, in_)]
    else:
        squares, axes = solver(moment.matrix)
        image = metric @ (axes * squares.clamp_min(0).sqrt()) @ axes.T  # L W C^(1/2), (out, in)
        found = _descending(_symmetric(image.T @ image), solver)
        if found is None:
            return None
        energies, right = found
        length = energies.sqrt()
        kept = energies > VANISHING * energies[0]
        basis = image @ right * torch.where(kept, 1 / length, 0.0)
    up = basis if inverse is None else inverse @ basis
    down = basis.T @ metric
    return Solution(energies.sqrt(), up.to(weight.dtype), down.to(weight.dtype), "")


def _roots(gram: Gram | None, damping: float, solver: Solver) -> tuple[Tensor | None, Tensor | None]:
    """Return the square root of the damped gram matrix and its inverse; None for the identity."""
    if gram is None:
        return None, None
    if isinstance(gram, tuple):
        total = sum(float(block.diagonal().sum()) for block in gram) / sum(len(block) for block in gram)
        pairs = [_damped_roots(block, damping, FAINT * total, solver) for block in gram]
        return torch.block_diag(*(root for root, _ in pairs)), torch.block_diag(*(inverse for _, inverse in pairs))
    if gram.ndim == 0 or not bool(gram.any()):
        scale = gram.flatten()[0].clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        return scale.reshape(1, 1), (1 / scale).reshape(1, 1)
    return _damped_roots(gram, damping, 0.0, solver)


def _damped_roots(gram: Tensor, damping: float, least: float, solver: Solver) -> tuple[Tensor, Tensor]:
    squares, axes = solver(gram)
    shift = (max(damping, VANISHING) * gram.diagonal().mean()).clamp_min(max(least, torch.finfo(gram.dtype).tiny))
    squares = squares.clamp_min(0) + shift
    return (axes * squares.sqrt()) @ axes.T, (axes / squares.sqrt()) @ axes.T


def _descending(matrix: Tensor, solver: Solver) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues, descending, and eigenvectors of a symmetric matrix, or None where they are not its own."""
    energies, basis = solver(matrix)
    energies, basis = energies.flip(0), basis.flip(1)
    residual = torch.linalg.vector_norm(matrix @ basis - basis * energies)
    if not residual <= RESIDUAL * torch.linalg.vector_norm(matrix):  # NaN is no solution either
        return None
    return energies.clamp_min(0), basis


def _by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``eigh`` would for a symmetric, positive semidefinite matrix."""
    basis, values, _ = torch.linalg.svd(matrix)
    return values.flip(0), basis.flip(1)


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
        scale: (in,), positive.
    """
    inner = spectrum((weight.double() * scale).to(weight.dtype))

    def undone(weight: Tensor, _vectors: bool, rung: str) -> Solution | None:
        solution = inner.rungs[rung](inner.weight, True)
        if solution is None:
            return None
        if solution.down is None:
            assert solution.up is not None
            up, down = solution.up, solution.up.T @ inner.weight.to(solution.up.dtype)
        else:
            up, down = inner.weight.to(solution.down.dtype) @ solution.down.T, solution.down
        return replace(solution, up=up.to(weight.dtype), down=(down.double() / scale).to(weight.dtype), exact=False)

    return Spectrum(weight, {rung: partial(undone, rung=rung) for rung in inner.rungs})
