"""The update of SNELL and SNELLA: points of rows and columns whose kernel is the change of a weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.errors import UsageError, one_of
from peftc.nn import folded, forms
from peftc.nn.kernels import HALVES, KERNELS, SPARSIFY, Kernel, threshold_of
from peftc.plans import budgets


@dataclass(frozen=True)
class Settings:
    """How a weight is changed."""

    rank: int  # coordinates of a point, both halves together
    kernel: str  # of `kernels.KERNELS`
    sparsify: str  # of `kernels.SPARSIFY`; without sparsity there is no competition
    sparsity: float  # in [0, 1), share of the entries that are zeroed in the end
    split: int  # a linear module with so many times as many outputs as inputs is so many matrices
    threshold_every: int  # steps after which the thresholds follow the values
    identity: bool  # start at a change of exactly 0
    dropout: float  # of what the change sees, while the network trains with dropout
    start: float | None = None  # sparsity at first, from which layers compete; None: the same share in each
    allocate: str = "uniform"  # one of `budgets.ALLOCATIONS`: by score, or the same share in each layer
    min_keep: float = 0.0  # floor of `budgets.shares`
    refresh_every: int = 0  # of `budgets.refreshed`

    def __post_init__(self) -> None:
        """Refuse numbers out of range (UsageError: naming the setting)."""
        one_of("--set kernel=", self.kernel, KERNELS)
        one_of("--set sparsify=", self.sparsify, SPARSIFY[1:])
        one_of("--set allocate=", self.allocate, budgets.ALLOCATIONS)
        rules = {
            "rank": (self.rank, self.rank >= HALVES and self.rank % HALVES == 0, "even: a point has two halves"),
            "sparsity": (self.sparsity, 0 <= self.sparsity < 1, "in [0, 1)"),
            "start": (self.start, self.start is None or 0 <= self.start < 1, "in [0, 1)"),
            "split": (self.split, self.split >= 1, "at least 1"),
            "threshold_every": (self.threshold_every, self.threshold_every >= 1, "at least 1"),
            "dropout": (self.dropout, 0 <= self.dropout < 1, "in [0, 1)"),
            "min_keep": (self.min_keep, 0 <= self.min_keep <= 1, "in [0, 1]"),
            "refresh_every": (self.refresh_every, self.refresh_every >= 0, "at least 0"),
        }
        for name, (value, fits, rule) in rules.items():
            if not fits:
                raise UsageError(f"setting `{name}` is {value}", why=f"it has to be {rule}")
        if self.identity and self.competes and self.sparsify != "hard":
            why = "that form multiplies a change by its own size, so one that starts at 0 never learns"
            hint = "`--set sparsify=hard`, or `--set sparsity=0`"
            raise UsageError(f"`identity` and `sparsify={self.sparsify}` exclude each other", why=why, hint=hint)

    @property
    def competes(self) -> bool:
        """Whether entries are zeroed at all."""
        return self.sparsity > 0

    @property
    def scored(self) -> bool:
        """Whether layers compete with each other."""
        return self.competes and self.start is not None and self.allocate == "bilevel"

    @property
    def form(self) -> Kernel:
        """The mathematics."""
        return Kernel(self.kernel, self.sparsify if self.competes else "none")


class Points(nn.Module):
    """The points of one matrix (out, in), how many of its entries they change, and the threshold of these.

    The threshold is stored with the points, so that the mask of a reloaded update is the same bit for bit.
    """

    threshold: Tensor
    kept: Tensor

    def __init__(self, out: int, in_: int, settings: Settings) -> None:
        super().__init__()
        half = settings.rank // HALVES
        self.form, self.entries = settings.form, out * in_
        self.rows = nn.Parameter(torch.empty(HALVES, out, half))
        self.columns = nn.Parameter(torch.empty(HALVES, in_, half))
        for points in (self.rows, self.columns):
            nn.init.kaiming_uniform_(points, a=5**0.5)
        self.mix = nn.Parameter(torch.tensor([1.0, 1.0, 0.0])) if settings.kernel == "mix" else None
        if settings.identity:
            with torch.no_grad():
                if settings.kernel == "linear":
                    self.rows.zero_()
                else:  # equal halves are at equal distances
                    self.rows[1], self.columns[1] = self.rows[0], self.columns[0]
                if self.mix is not None:
                    self.mix[0] = 0
        first = settings.sparsity if settings.start is None else settings.start
        kept = self.entries - budgets.zeroed(self.entries, first)
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.register_buffer("kept", torch.tensor(kept))
        if settings.scored:
            for name, points in (("rows", self.rows), ("columns", self.columns)):
                self.register_buffer(f"_mean_{name}", torch.zeros_like(points))
                self.register_buffer(f"_spread_{name}", torch.zeros_like(points))
        self.settle(kept)

    @torch.no_grad()
    def settle(self, kept: int) -> None:
        """Keep the ``kept`` largest magnitudes from now on."""
        self.kept.fill_(kept)
        if self.form.sparsify != "none" and not self.rows.is_meta:
            with folded.without_autocast(self.rows.device.type):
                values = self.form.values(self.rows, self.columns, self.mix)
            self.threshold.copy_(threshold_of(values, self.entries - kept))

    def tensors(self) -> list[Tensor]:
        """Return what the change is made of, as `Kernel.change` takes it."""
        return [self.rows, self.columns, self.threshold] + ([] if self.mix is None else [self.mix])


class Kernelized(nn.Module):
    """The update of a weight: one `Points`, or as many as there are matrices in it, one upon the other."""

    def __init__(self, shape: Sequence[int], settings: Settings, *, transposed: bool, matrices: int = 1) -> None:
        super().__init__()
        self.settings, self.form = settings, settings.form
        self.shape, self.transposed = tuple(shape), transposed
        out = shape[1] if transposed else shape[0]
        in_ = torch.Size(shape).numel() // out
        self.parts = nn.ModuleList(Points(out // matrices, in_, settings) for _ in range(matrices))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Compute as ``base`` with the changed weight."""
        drops = self.training and self.settings.dropout > 0
        seen = F.dropout(x, self.settings.dropout) if drops else None
        return folded.folded(base, x, self._rebuild, self.tensors(), pull=self._pull, seen=seen)

    def weight(self, weight: Tensor) -> Tensor:
        """Return the updated weight in float32; gradients reach the points."""
        change = folded.rebuilt(self._rebuild, self.tensors(), pull=self._pull)
        return weight.to(change.dtype) + change

    def settle(self) -> None:
        """Let the thresholds follow the points: before they are judged or written, and after others replaced them."""
        for part in self.parts:
            part.settle(int(part.kept))

    @torch.no_grad()
    def report(self) -> dict[str, int]:
        """Return how many numbers learn, and of how many entries how many are changed and were to be changed."""
        change = folded.rebuilt(self._rebuild, self.tensors())
        return {
            "trainables": sum(each.numel() for each in self.parameters()),
            "entries": change.numel(),
            "changed": int(change.count_nonzero()),
            "asked": sum(int(part.kept) if self.settings.competes else part.entries for part in self.parts),
        }

    def tensors(self) -> list[Tensor]:
        """Return what the change is made of."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def _groups(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        size = len(tensors) // len(self.parts)
        return [tensors[start : start + size] for start in range(0, len(tensors), size)]

    def _rebuild(self, *tensors: Tensor) -> Tensor:
        changes = [self.form.change(*group) for group in self._groups(tensors)]
        matrix = changes[0] if len(changes) == 1 else torch.cat(changes)
        return matrix.T if self.transposed else matrix.view(self.shape)

    def _pull(self, gradient: Tensor, *tensors: Tensor) -> list[Any]:
        matrix = gradient.T if self.transposed else gradient.reshape(self.shape[0], -1)
        pairs = zip(matrix.chunk(len(self.parts)), self._groups(tensors), strict=True)
        return [each for piece, group in pairs for each in self.form.pull(piece, *group)]


def update_of(module: Any, settings: Settings) -> Kernelized | tuple[str, ...] | None:
    """Return the update of a linear module or a convolution, its weight's name if that is smaller, None for others."""
    form = folded.form_of(module)
    if form is None:
        return None
    out, in_ = forms.matrix_size(module)
    matrices = settings.split if form != "channel" and out == settings.split * in_ else 1
    mix = 3 * matrices if settings.kernel == "mix" else 0
    whole = forms.dense(module, settings.rank * (out + matrices * in_) + mix)
    return whole or Kernelized(module.weight.shape, settings, transposed=form == "transposed", matrices=matrices)
