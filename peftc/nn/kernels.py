"""The mathematics of SNELL and SNELLA: a dense matrix out of one point per row and one per column, most of it zeroed.

Row i of a matrix (out, in) has the point b_i, column j the point a_j, each in two halves of rank / 2 coordinates:

=========  =========================================================================================================
kernel     value at (i, j)
=========  =========================================================================================================
linear     <b, a>, of rank at most ``rank``, as LoRA's
piecewise  K = 0.1 (|b_1 - a_1| - |b_2 - a_2|), SNELL, arXiv 2411.01800, appendix B
mix        K + alpha softmax(K / gamma) + beta, SNELLA, arXiv 2510.24037, as its code has it; over the rows of a column
=========  =========================================================================================================

=========  =========================================================================================================
sparsify   value after the competition, t being the threshold that so many magnitudes do not exceed
=========  =========================================================================================================
none       v
hard       v where |v| > t, else 0
code       v |v| where |v| > t, else 0; no gradient flows to the factor |v|: what the authors' code does
paper      v max(|v| - t, 0), no gradient to the factor: equation 5 of SNELL
=========  =========================================================================================================

Everything is computed in float32 at least, because K is a small difference of two distances; by blocks of whole
columns, because the softmax runs along them. Backward is the closed form of section A.1.5 of the papers notes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peftc.nn.forms import wide

KERNELS = ("linear", "piecewise", "mix")
SPARSIFY = ("none", "hard", "code", "paper")
HALVES, SCALE = 2, 0.1
BLOCKS = {"cpu": 1 << 18}  # entries of a matrix that are worked on at once: what the cache holds
BLOCK = 1 << 24  # elsewhere


@dataclass(frozen=True)
class Kernel:
    """How a matrix comes from its points: one of `KERNELS` and one of `SPARSIFY`."""

    kernel: str
    sparsify: str

    def values(self, rows: Tensor, columns: Tensor, mix: Tensor | None = None) -> Tensor:
        """Return the matrix (out, in) before the competition.

        Args:
            rows: (2, out, rank / 2).
            columns: (2, in, rank / 2).
            mix: (3,) = alpha, gamma, beta, of the kernel ``mix``.
        """
        return self.change(rows, columns, None, mix)

    def change(self, rows: Tensor, columns: Tensor, threshold: Tensor | None, mix: Tensor | None = None) -> Tensor:
        """Return the matrix (out, in) after the competition; ``threshold`` is a scalar, or None for no competition."""
        rows, columns, mix = wide(rows), wide(columns), None if mix is None else wide(mix)
        found = rows.new_empty(rows.shape[1], columns.shape[1])
        for block in _blocks(found):
            values = self._block(rows, columns[:, block], mix)[0]
            found[:, block] = values if threshold is None else self._compete(values, threshold)
        return found

    def pull(
        self, gradient: Tensor, rows: Tensor, columns: Tensor, threshold: Tensor, mix: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows, columns, threshold (None) and mix, given that of the change (out, in)."""
        kinds = [each.dtype for each in (rows, columns)]
        rows, columns, exact = wide(rows), wide(columns), None if mix is None else wide(mix)
        of_rows, of_columns = torch.zeros_like(rows), torch.empty_like(columns)
        of_mix = None if exact is None else torch.zeros_like(exact)
        for block in _blocks(gradient):
            values, distances, soft = self._block(rows, columns[:, block], exact)
            grown = self._through_competition(gradient[:, block], values, threshold)
            if exact is not None and of_mix is not None and soft is not None:
                grown = _through_mix(grown, distances, soft, exact, of_mix)
            of_columns[:, block] = self._through_kernel(grown, distances, rows, columns[:, block], of_rows)
        of_rows, of_columns = of_rows.to(kinds[0]), of_columns.to(kinds[1])
        return (of_rows, of_columns, None) if mix is None else (of_rows, of_columns, None, of_mix.to(mix.dtype))  # type: ignore[union-attr]

    def _block(self, rows: Tensor, columns: Tensor, mix: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values, distances (2, out, columns) or what stands for them, and the softmax of ``mix``."""
        if self.kernel == "linear":
            return torch.einsum("poq,piq->oi", rows, columns), rows, None
        distances = torch.cdist(rows, columns, compute_mode="use_mm_for_euclid_dist")
        values = torch.sub(distances[0], distances[1]).mul_(SCALE)
        if mix is None:
            return values, distances, None
        alpha, gamma, beta = mix
        soft = torch.softmax(values / gamma, 0)
        return values.addcmul_(alpha, soft).add_(beta), distances, soft

    def _compete(self, values: Tensor, threshold: Tensor) -> Tensor:
        if self.sparsify == "none":
            return values
        magnitudes = values.abs()
        if self.sparsify == "paper":
            return values.mul_(magnitudes.sub_(threshold.clamp_min(0)).clamp_min_(0))
        if self.sparsify == "hard":
            return values.masked_fill_(magnitudes <= threshold, 0)
        return values.mul_(magnitudes.masked_fill_(magnitudes <= threshold, 0))

    def _through_competition(self, gradient: Tensor, values: Tensor, threshold: Tensor) -> Tensor:
        if self.sparsify == "none":
            return gradient
        magnitudes = values.abs()
        beaten = magnitudes <= threshold
        if self.sparsify == "hard":
            return gradient.masked_fill(beaten, 0)
        slope = magnitudes.mul_(2).sub_(threshold.clamp_min(0)) if self.sparsify == "paper" else magnitudes
        return slope.masked_fill_(beaten, 0).mul_(gradient)

    def _through_kernel(
        self, gradient: Tensor, distances: Tensor, rows: Tensor, columns: Tensor, of_rows: Tensor
    ) -> Tensor:
        """Add to the gradient of the rows and return that of the columns."""
        if self.kernel == "linear":
            of_rows += gradient @ columns
            return gradient.T @ rows
        # where two points are one the distance has no slope: 0, as autograd has it
        pushes = gradient / distances.masked_fill_(distances == 0, torch.inf)
        signs = rows.new_tensor([SCALE, -SCALE]).view(2, 1, 1)
        of_rows += signs * (pushes.sum(2, keepdim=True) * rows - pushes @ columns)
        return signs * (pushes.sum(1).unsqueeze(2) * columns - pushes.transpose(1, 2) @ rows)


def _through_mix(gradient: Tensor, distances: Tensor, soft: Tensor, mix: Tensor, of_mix: Tensor) -> Tensor:
    """Return the gradient of K and add to that of alpha, gamma and beta."""
    alpha, gamma, _ = mix
    weighted = gradient * soft
    sums = weighted.sum(0)
    values = torch.sub(distances[0], distances[1]).mul_(SCALE)
    around = values - (values * soft).sum(0)
    of_mix += torch.stack([sums.sum(), -alpha / gamma**2 * (weighted * around).sum(), gradient.sum()])
    return gradient + (alpha / gamma) * (weighted - soft * sums)


def _blocks(matrix: Tensor) -> Iterator[slice]:
    width = max(1, BLOCKS.get(matrix.device.type, BLOCK) // max(1, matrix.shape[0]))
    return (slice(start, start + width) for start in range(0, matrix.shape[1], width))


def threshold_of(values: Tensor, zeroed: int) -> Tensor:
    """Return a scalar that the magnitudes of ``zeroed`` values do not exceed; equal values are zeroed together.

    It lies between the last magnitude that falls and the first that stays, so that a rounding error in either leaves
    the mask as it is. Below 0 nothing falls, so that a matrix of zeros may still learn.

    Args:
        values: of any shape; overwritten.
        zeroed: in [0, number of values].
    """
    magnitudes = values.abs_().flatten()
    if zeroed == 0:
        return magnitudes.new_tensor(-1.0)
    if zeroed >= magnitudes.numel():
        return magnitudes.max()
    last, first = _neighbours(magnitudes, zeroed)
    middle = last + (first - last) / 2
    return torch.where(last > 0, torch.where(middle < first, middle, last), -1.0)


def _neighbours(magnitudes: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Return the ``place``-th smallest and the one after it."""
    if magnitudes.device.type != "cpu":
        last = magnitudes.kthvalue(place).values
        later = magnitudes.masked_fill(magnitudes <= last, torch.inf).min()
        return last, torch.where(later.isinf(), last, later)
    magnitudes.numpy().partition(place - 1)  # vectorised introselect: an eighth of kthvalue's time
    return magnitudes[place - 1].clone(), magnitudes[place:].min()
