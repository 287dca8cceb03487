"""What a decomposition returns: singular values, and on demand factors of any rank with a bound on their error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from peftc.errors import MethodError
from peftc.nn.lowrank import Factors

TOLERANCE = 1e-6  # accepted excess of the squared error over the optimum, relative to the optimum
FLOOR = 1e-13  # the same relative to the squared norm: float32 factors cannot be closer than that
PROBES = 16
CANCELS = 1e-3  # below this share of the norm, the error is not measured as a difference


@dataclass(frozen=True)
class Solution:
    """One solved eigenproblem.

    Attributes:
        values: (k,) singular values, descending, float64.
        up: (out, k) with orthonormal columns, or ready scaled when ``down`` is given too; None: weight @ down^T.
        down: (k, in) with orthonormal rows, or ready scaled when ``up`` is given too; None: up^T @ weight.
        rung: how it was computed, as the `Spectrum` says.
        exact: whether the method itself vouches for it (a direct SVD), so that no certificate is needed.
    """

    values: Tensor
    up: Tensor | None
    down: Tensor | None
    rung: str = ""
    exact: bool = False


Rungs: TypeAlias = dict[str, Callable[[Tensor, bool], Solution | None]]


@dataclass(frozen=True)
class Truncation:
    """Factors of one rank and how good they are."""

    factors: Factors  # balanced, of the weight's dtype
    error: float  # Frobenius norm of (weight - up @ down), relative to the weight's
    excess: float | None  # bound on (squared error - optimum) / optimum; None where the method gives no bound
    rung: str  # how the factors were computed
    climbed: tuple[str, ...] = ()  # rungs that were tried and failed, with the reason


def tail_energies(values: Tensor) -> Tensor:
    """Return (k + 1,) squared errors at ranks 0 to k, from k singular values."""
    energy = values.square()
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


class Spectrum:
    """Singular values of a weight (out, in), and on demand its factors.

    Args:
        weight: (out, in), float32 or float64, finite.
        rungs: name -> solver, cheapest first; a solver takes (weight, vectors) and returns a `Solution`, or None
            where it cannot vouch for the singular values, or raises ``torch.linalg.LinAlgError``.
        solution, climbed: what was solved before, and the rungs that failed before it, each with the reason.
    """

    def __init__(
        self, weight: Tensor, rungs: Rungs, solution: Solution | None = None, climbed: Sequence[str] = ()
    ) -> None:
        self.weight, self.rungs, self.climbed = weight, rungs, list(climbed)
        self._values: Solution | None = None
        self._vectors = solution

    @classmethod
    def of(cls, weight: Tensor, values: Tensor, up: Tensor, down: Tensor) -> Spectrum:
        """Return a spectrum from ready factors: up (out, k), down (k, in), most important component first.

        A k below min(out, in) is refused (MethodError).
        """
        full = min(weight.shape)
        if not len(values) == up.shape[1] == down.shape[0] == full:
            why = "a budget may ask for any rank up to the full one"
            raise MethodError(f"a method gave {up.shape[1]} of {full} components", why=why)
        return cls(weight, {"given": lambda _weight, _vectors: Solution(values.double(), up, down)})

    @property
    def values(self) -> Tensor:
        """Singular values (k,), descending, float64."""
        known = self._vectors or self._values
        if known is None:
            known = self._values = self._climb(vectors=False)
        return known.values

    @property
    def solution(self) -> Solution:
        """The basis that the factors are cut from."""
        if self._vectors is None:
            self._vectors = self._climb(vectors=True)
        return self._vectors

    def truncate(self, rank: int) -> Truncation:
        """Return the factors of ``rank`` components, 1 <= rank <= min(out, in), climbing the ladder until certified.

        Without a rung left it raises ``torch.linalg.LinAlgError``.
        """
        while True:
            cut = cut_at(self.weight, self.solution, rank, tuple(self.climbed))
            if cut.excess is None or cut.excess <= TOLERANCE:
                return cut
            why = f"error within {cut.excess:.0e} of the optimum at rank {rank}, not {TOLERANCE:.0e}"
            self.climbed.append(f"{cut.rung}: {why}")
            self._vectors = None

    def rough(self, rank: int) -> Factors:
        """Return factors of ``rank`` components, neither balanced nor certified, to try what they do."""
        solution, weight = self.solution, self.weight
        up, down = (part if part is None else part.to(weight.dtype) for part in (solution.up, solution.down))
        if up is None:
            assert down is not None
            return Factors(weight @ down[:rank].T, down[:rank])
        return Factors(up[:, :rank], up[:, :rank].T @ weight if down is None else down[:rank])

    def losses(self) -> Tensor:
        """Return (k + 1,) squared errors at ranks 0 to k."""
        return tail_energies(self.values)

    def _climb(self, vectors: bool) -> Solution:
        failed = {text.partition(": ")[0] for text in self.climbed}
        for rung in [name for name in self.rungs if name not in failed]:
            why = "its precision does not resolve the small singular values"
            try:
                solution = self.rungs[rung](self.weight, vectors)
            except torch.linalg.LinAlgError as error:
                solution, why = None, (str(error) or "it did not converge").splitlines()[0]
            if solution is not None and torch.isfinite(solution.values).all():
                up, down = (None if part is None else part.contiguous() for part in (solution.up, solution.down))
                return replace(solution, rung=rung, up=up, down=down)  # one layout, also when read back from disk
            self.climbed.append(f"{rung}: {why}")
        raise torch.linalg.LinAlgError("; ".join(self.climbed))


def cut_at(weight: Tensor, solution: Solution, rank: int, climbed: tuple[str, ...] = ()) -> Truncation:
    """Cut a solution at ``rank``, balance the factors and certify them."""
    dtype = weight.dtype
    if solution.up is not None and solution.down is not None:
        return _cut_ready(weight, solution, rank, climbed)
    tall = solution.down is not None  # the orthonormal basis is on the input side
    basis: Tensor = solution.down if tall else solution.up.T  # type: ignore[assignment, union-attr]
    matrix = weight if tall else weight.T
    kept = basis[:rank].clone(memory_format=torch.contiguous_format)  # (rank, n); one layout, and so one rounding
    image = matrix.to(kept.dtype) @ kept.T  # (m, rank), columns of length sigma
    sigma2 = torch.linalg.vector_norm(image, dim=0, dtype=torch.float64).square()
    total = energy(weight)
    root = sigma2.sqrt().sqrt()
    largest = kept.gather(1, kept.abs().argmax(dim=1, keepdim=True))[:, 0]  # of each basis vector: to be positive
    signs = torch.where(largest < 0, -1.0, 1.0).double()  # (rank,)
    scale = torch.where(root > 0, 1 / root, 0.0) * signs
    thin, wide = image * scale.to(image.dtype), kept * (root * signs).to(kept.dtype)[:, None]
    factors = Factors(thin.to(dtype), wide.to(dtype)) if tall else Factors(wide.T.to(dtype), thin.T.to(dtype))
    tail = max(total - float(sigma2.sum()), 0.0)
    if tail < CANCELS * total:  # the difference of two nearly equal sums: look at the factors themselves
        tail = _residual(weight, factors)
    excess = 0.0 if solution.exact else _excess(matrix, basis, image, solution.values.square(), (tail, total))
    return Truncation(factors, (tail / total) ** 0.5 if total else 0.0, excess, solution.rung, climbed)


def gram_matrix(matrix: Tensor) -> Tensor:
    """Return matrix^T matrix (n, n), forming only one of the two equal off-diagonal blocks."""
    n = matrix.shape[1]
    if n < 256:
        return matrix.T @ matrix
    left, right = matrix[:, : n // 2], matrix[:, n // 2 :]
    gram = matrix.new_empty(n, n)
    torch.mm(left.T, left, out=gram[: n // 2, : n // 2])
    torch.mm(right.T, right, out=gram[n // 2 :, n // 2 :])
    torch.mm(right.T, left, out=gram[n // 2 :, : n // 2])
    gram[: n // 2, n // 2 :] = gram[n // 2 :, : n // 2].T
    return gram


def energy(weight: Tensor) -> float:
    """Return the squared Frobenius norm, summed in float64, a block at a time."""
    total = 0.0
    for block in weight.split(max(1, (1 << 18) // max(1, weight[0].numel()))):
        entries = block.double().flatten()
        total += float(entries @ entries)
    return total


def _residual(weight: Tensor, factors: Factors) -> float:
    """Return the squared Frobenius norm of (weight - up @ down), in float64, a block at a time."""
    rows, down = max(1, (1 << 22) // weight.shape[1]), factors.down.double()
    pairs = zip(weight.split(rows), factors.up.split(rows), strict=True)
    return sum(energy(part.double() - up.double() @ down) for part, up in pairs)


def _cut_ready(weight: Tensor, solution: Solution, rank: int, climbed: tuple[str, ...]) -> Truncation:
    """Cut factors that a method brought along, and measure them: nothing is known of their optimum."""
    assert solution.up is not None and solution.down is not None
    up, down = solution.up[:, :rank].double(), solution.down[:rank].double()
    long, wide = torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)
    scale = torch.where((long > 0) & (wide > 0), (wide / long).sqrt(), torch.ones_like(long))
    factors = Factors((up * scale).to(weight.dtype), (down / scale[:, None]).to(weight.dtype))
    rest, total = _residual(weight, factors), energy(weight)
    return Truncation(factors, (rest / total) ** 0.5 if total else 0.0, None, solution.rung, climbed)


def _excess(matrix: Tensor, basis: Tensor, image: Tensor, energies: Tensor, achieved: tuple[float, float]) -> float:
    """Bound how far the squared error lies above the optimum, relative to it.

    With H = V G V^T, G the Gram matrix and V the computed basis, split at the rank: kept block H11, rest H22, coupling
    B. For theta = the smallest kept eigenvalue and rest eigenvalues h_j < theta, the largest possible kept energy is at
    most tr(H11) + sum_j |B_j|^2 / (theta - h_j): by a Schur complement, H11 + B^T (theta - H22)^-1 B dominates H.
    Where h_j is within rounding of theta, the nuclear norm of those rows of B bounds their share instead. The row norms
    of B are estimated with 16 Gaussian probes; with them, too, what a basis adds that is orthonormal only within
    rounding: |image D|^2 for V^T V = I + D. The sum is doubled; the optimum is at least the error achieved less that.

    Args:
        matrix: (m, n); basis: (k, n) orthonormal rows; image: (m, rank) = matrix @ basis[:rank]^T.
        energies: (k,) squared singular values.
        achieved: squared error of the factors, and squared Frobenius norm of the matrix.
    """
    tail, total = achieved
    rank = image.shape[1]
    kept, rest = basis[:rank], basis[rank:]
    if not len(rest) or not total:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(rank, PROBES, generator=generator, dtype=torch.float32).to(image)
    unit = float(energies[0]) ** 0.5  # keeps products of two entries within float32, whatever the weight's size
    coupling = rest @ (matrix.to(image.dtype).T @ (image / unit @ probes))  # (k - rank, probes)
    rows = coupling.double().square().mean(dim=1) * unit**2
    defect = image.double() @ (kept @ (kept.T @ probes) - probes).double()  # (m, probes)
    gaps = energies[rank - 1] - energies[rank:]
    resolution = 8 * torch.finfo(basis.dtype).eps * float(energies[0]) * len(energies) ** 0.5
    far = gaps > resolution
    bound = float((rows[far] / gaps[far]).sum()) + float((~far).sum() * rows[~far].sum()) ** 0.5
    bound = 2 * (bound + float(defect.square().sum()) / PROBES)
    if bound <= FLOOR * total:
        return 0.0
    return bound / (tail - bound) if tail > bound else float("inf")
