"""Statistics over a calibration set, for methods that ask for them by name.

Activations are never kept: each batch goes into running sums and is gone. Scatter matrices are accumulated around
their mean in float64, batch by batch (Chan, Golub and LeVeque, 1979, "Updating formulae and a pairwise algorithm"), so
that features with a mean far from zero lose nothing. Modules that read the same tensor share one moment; where its
outputs are fewer than its inputs a module's own second moment is taken of the outputs, before the bias.

=====================  ==============================  ===================================================
statistic              shape                           is
=====================  ==============================  ===================================================
second_moment          (in, in) or (out, out)          E[x x^T], or E[W x x^T W^T]
input_magnitude        (in,)                           E|x|
output_gradient_gram   (out, out), or () where large   gradients of the loss, summed over a sample's positions
weight_fisher          (in,)                           squared gradients of a sample, summed over outputs
=====================  ==============================  ===================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc.calibration.sums import Running, Triangle
from peftc.methods.weighted import Moment
from peftc.models.dual import reads_image
from peftc.models.inputs import mask_of
from peftc.models.layers import registered
from peftc.models.model import Model
from peftc.models.place import place_of
from peftc.nn import forms
from peftc.plans.allocate import sides
from peftc.plans.plan import Target

STATISTICS = ("second_moment", "input_magnitude", "output_gradient_gram", "weight_fisher")
OF_GRADIENTS = ("output_gradient_gram", "weight_fisher")
LARGEST_GRAM = 8192  # outputs; above it only the mean eigenvalue of their gradients is kept


@dataclass(frozen=True)
class Site:
    """What is collected for a target: whose inputs it shares, by the ``leader``, and the side of its second moment."""

    target: Target
    leader: str
    side: str


@dataclass
class Sums:
    """Running sums by ``<module>.<statistic>``, and how many samples went into them."""

    running: dict[str, Running] = field(default_factory=dict)
    totals: dict[str, Tensor | Triangle] = field(default_factory=dict)
    samples: int = 0


def sites(model: Model, targets: Mapping[str, Target], run: Callable[[], object]) -> dict[str, Site]:
    """Return where each target's statistics come from, in the order in which modules run in a forward pass, ``run``."""
    reads: dict[str, list[Tensor]] = {}  # keeps the tensors alive, so that identity means what it says

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, inputs: reads.setdefault(name, []).append(inputs[0])

    with registered(
        model.module.get_submodule(each).register_forward_pre_hook(watch(name))
        for name, target in targets.items()
        for each in called(model, target)
    ):
        run()
    leaders: dict[tuple[object, ...], str] = {}
    leader_of = {
        name: leaders.setdefault((tuple(map(id, tensors)), *_reading(model, targets[name])), name)
        for name, tensors in reads.items()
    }
    found = {}
    for name, leader in leader_of.items():
        members = [targets[each] for each, first in leader_of.items() if first == leader]
        outs, in_ = sum(matrix_shape(each)[0] ** 2 for each in members), matrix_shape(targets[name])[1] ** 2
        looks_up = is_lookup(model, targets[name])
        of_input = not looks_up and (targets[name].form == "spatial" or in_ <= outs)
        found[name] = Site(targets[name], leader, "input" if of_input else "output")
    return found


def called(model: Model, target: Target) -> list[str]:
    """Return the modules through which a target's matrix is read: of tied ones, those that multiply, if any does."""
    every = [target.name, *target.aliases]
    products = [each for each in every if not isinstance(model.module.get_submodule(each), nn.Embedding)]
    return products or every


def is_lookup(model: Model, target: Target) -> bool:
    """Return whether a target is only ever looked up, so that its matrix maps words (in) to features (out)."""
    return isinstance(model.module.get_submodule(called(model, target)[0]), nn.Embedding)


def matrix_shape(target: Target) -> tuple[int, int]:
    """Return (out, in) of the matrix that a method sees; of an embedding (words, width)."""
    first, second = sides(target.shape, target.form)
    return (second, first) if target.form == "transposed" else (first, second)


def _reading(model: Model, target: Target) -> tuple[object, ...]:
    """Return what two modules must have in common, beside their input, to share its moment."""
    module: Any = model.module.get_submodule(called(model, target)[0])
    if not isinstance(module, nn.Conv2d):
        return ("rows",)
    grid = ("kernel_size", "stride", "dilation", "padding", "padding_mode")
    return target.form, type(module), *(getattr(module, name) for name in grid)


class Collector:
    """Hooks on the modules of some sites; each forward pass, and the backward passes after it, add to ``sums``.

    Args:
        model: in eval mode; the hooks are on while the collector is used as a context.
        sites: what to watch.
        needs: statistics to collect.
        keep: add to the sums; without, everything is computed and nothing kept, to see what that takes.
    """

    def __init__(self, model: Model, sites: Mapping[str, Site], needs: Collection[str], *, keep: bool = True) -> None:
        self.model, self.sites, self.needs, self.keep = model, sites, needs, keep
        self.sums = Sums()
        self.mask: Tensor | None = None  # (batch, tokens), False at padding, of the batch that runs next
        self.gradients = any(need in OF_GRADIENTS for need in needs)

    def see(self, inputs: Tensor | Mapping[str, Tensor]) -> None:
        """Look at the next batch: which of its tokens are padding."""
        mask = mask_of(inputs)
        self.mask = None if mask is None or bool(mask.all()) else mask.bool().to(place_of(self.model.module))

    @contextmanager
    def watching(self) -> Iterator[Sums]:
        """Keep the hooks on."""
        with registered(
            self.model.module.get_submodule(each).register_forward_hook(self._hook(site))
            for site in self.sites.values()
            for each in called(self.model, site.target)
        ):
            yield self.sums

    def _hook(self, site: Site) -> Callable[..., Any]:
        leads = site.leader == site.target.name

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            x = inputs[0].detach()
            keep = None if reads_image(site.target.name) else self._kept(x)
            if leads and not isinstance(module, nn.Embedding):
                self._inputs(site, module, x, keep)
            if site.side == "output" and "second_moment" in self.needs:
                rows = _rows(output.detach(), module)
                self._add(f"{site.target.name}.output", rows if keep is None else rows[keep], scatter=True)
            if not self.gradients:
                return None
            if not output.requires_grad:  # a copy, so that an activation may change it in place
                output = output.detach().requires_grad_(True).clone()
            seen = x if "weight_fisher" in self.needs else None
            output.register_hook(lambda gradient: self._gradient(site, module, seen, keep, gradient))
            return output

        return hook

    def _kept(self, x: Tensor) -> Tensor | None:
        """Return which rows are no padding (n,), or None for all of them."""
        leading = x.shape[:-1] if x.is_floating_point() else x.shape
        fits = self.mask is not None and leading.numel() == self.mask.numel()
        return self.mask.flatten() if self.mask is not None and fits else None

    def _inputs(self, site: Site, module: Any, x: Tensor, keep: Tensor | None) -> None:
        scatter = "second_moment" in self.needs and site.side == "input"
        only_mean = not scatter and "input_magnitude" not in self.needs
        if only_mean and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            self._mean_patch(f"{site.leader}.input", x, module)
            return
        rows = _patches(x, module, site.target.form)
        rows = rows if keep is None else rows[keep]
        self._add(f"{site.leader}.input", rows, scatter=scatter)
        if site.target.form == "spatial":
            self._mean_patch(f"{site.leader}.patch", x, module)
        if "input_magnitude" in self.needs:
            self._total(f"{site.leader}.magnitude", rows.abs().double().sum(0))

    def _mean_patch(self, name: str, x: Tensor, module: Any) -> None:
        """Add the mean of the whole patches (in kh kw,), which is linear and so needs those of the mean image only."""
        rows = _patches(x.mean(0, keepdim=True), module, "channel")
        seen = Running(rows.shape[1], None, rows.mean(0, dtype=torch.float64), len(rows) * len(x))
        self.sums.running.setdefault(name, Running.empty(seen.size, x.device, scatter=False)).merge(seen)

    def _gradient(self, site: Site, module: nn.Module, x: Tensor | None, keep: Any, gradient: Tensor) -> None:
        name, rows = site.target.name, _rows(gradient, module)
        if "output_gradient_gram" in self.needs:
            rows = rows if keep is None else rows[keep]
            self._gram(f"{name}.gradient", rows * 2.0**12, 2.0**-24)  # far from the subnormal numbers of half precision
        if x is not None and not isinstance(module, nn.Embedding):
            squares: Any = 0.0
            for one, other in zip(x.split(1), gradient.split(1), strict=True):  # a sample at a time
                by_sample = _rows(other, module).T @ _patches(one, module, "channel")  # (out, in)
                squares = squares + by_sample.double().square().sum(0)
            if site.target.form == "spatial":  # (in kh kw,) to (in kh,): the columns of the kernel are outputs
                squares = squares.view(-1, site.target.shape[3]).sum(1)
            self._total(f"{name}.fisher", squares)

    def _add(self, name: str, rows: Tensor, *, scatter: bool) -> None:
        seen = self.sums.running.get(name) or Running.empty(rows.shape[1], rows.device, scatter=scatter)
        seen.add(_wide(rows))
        if self.keep:
            self.sums.running[name] = seen

    def _gram(self, name: str, rows: Tensor, scale: float) -> None:
        """Add scale * rows^T rows, or its mean eigenvalue where there are too many of them."""
        if rows.shape[1] > LARGEST_GRAM:
            self._total(name, (rows.square().sum() / rows.shape[1]).double() * scale)
            return
        known = self.sums.totals.get(name)
        found = (known if isinstance(known, Triangle) else Triangle.empty(rows.shape[1], rows.device)).add(rows, scale)
        if self.keep:
            self.sums.totals[name] = found

    def _total(self, name: str, value: Tensor) -> None:
        known = self.sums.totals.get(name)
        if isinstance(known, Tensor):
            known += value
        elif self.keep:
            self.sums.totals[name] = value


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(output: Tensor, module: nn.Module) -> Tensor:
    """Return outputs or their gradients as rows (n, out), float32 at least."""
    output = _wide(output)
    return output.movedim(1, -1).flatten(0, -2) if isinstance(module, nn.Conv2d) else output.flatten(0, -2)


def _patches(x: Tensor, module: Any, form: str) -> Tensor:
    """Return what a module multiplies its matrix with, as rows (n, in), float32 at least."""
    x = _wide(x)
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    x = _padded(x, module)
    if (kh, kw) == (1, 1):
        return x[:, :, ::sh, ::sw].movedim(1, -1).flatten(0, -2)
    if form == "spatial":  # columns of kernel height
        kw, sw, dw = 1, 1, 1
    columns = nn.functional.unfold(x, (kh, kw), (dh, dw), 0, (sh, sw))  # (batch, in kh kw, positions)
    return columns.movedim(1, -1).flatten(0, -2)


def _padded(x: Tensor, conv: Any) -> Tensor:
    """Pad an input (batch, in, h, w) as its convolution does."""
    if forms.pads_itself(conv):
        return forms.padded(conv, x)
    if conv.padding == "valid":
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)


# -- what comes of the sums -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The statistics of one target."""

    side: str  # of the second moment
    mean: Tensor | None  # (in,) of its inputs; None for a look-up
    covariance: Tensor | None  # (in, in) or (out, out), around the mean; None where it was not asked for
    output_mean: Tensor | None  # (out,) before the bias, where ``side`` is ``output``
    others: dict[str, Tensor]  # the remaining statistics by name
    rows: int  # how many inputs were seen
    patch: Tensor | None = None  # (in kh kw,) mean of whole patches, of a spatial convolution, whose inputs are columns

    def to(self, device: torch.device) -> Found:
        """Return the same on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, others={name: value.to(device) for name, value in self.others.items()})

    def seen_as(self, form: str) -> tuple[str, Any]:
        """Return the form in which a weight meets whole inputs, and their mean: a spatial one meets whole patches."""
        return ("channel", self.patch) if form == "spatial" else (form, self.mean)

    def of(self, needs: Sequence[str]) -> dict[str, Any]:
        """Return what a method asks for.

        The second moment is that around 0 even where the bias makes up for the mean of what is lost: factors that leave
        the mean to the bias altogether fit the calibration set better and other samples worse.
        """
        values: dict[str, Any] = {name: self.others[name] for name in needs if name in self.others}
        if "second_moment" in needs:
            assert self.covariance is not None
            mean = self.mean if self.side == "input" else self.output_mean
            moment = self.covariance.double()
            if mean is not None:
                moment = moment + torch.outer(mean.double(), mean.double())
            values["second_moment"] = Moment(moment, self.side)
        return values
