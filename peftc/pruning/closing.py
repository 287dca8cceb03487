"""Close the gaps that dropped layers leave: one linear map each, in closed form, folded into the layer before the gap.

Dropped layers added something to the stream that they read. The last linear module of the layer before the gap adds to
the same stream, so that its weight can add what they would have, as far as that is linear in what the module reads:
ridge regression from the module's inputs to the difference between the whole network after the gap and the shorter one
before it. Nothing is put into the network, so it stays what its library builds. Tokens that nothing reads do not count.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc import progress
from peftc.errors import PlanError
from peftc.models import inputs, layers
from peftc.models.inputs import outputs, probe
from peftc.models.layers import main, registered
from peftc.models.model import Model, detached
from peftc.models.place import moved, place_of, runnable, solver_device
from peftc.models.shorten import Shorter
from peftc.nn import surgery
from peftc.pruning.asked import Work
from peftc.pruning.scores import is_channels_last, tokens_of
from peftc.report import Report, Table

CHECKED = 5  # every so many-th sample only tells which ridge to take
RIDGES = tuple(10.0**power for power in range(-5, 3))  # of the mean square of an input
FAINT = 1e-3  # of a nudge, below which an answer to it is rounding
CLOSE = 1e-3  # relative, for a layer's answer to a nudge to be the nudge


@dataclass(frozen=True)
class Gap:
    """Neighbours that went: the layer before them, None at the start of the stack, the last of them, and how many."""

    before: str | None
    last: str
    number: int


class Moments:
    """What a regression of targets t (n, width) on inputs h (n, d) needs: the gram of rows [h, 1, t], float64."""

    def __init__(self, d: int, width: int, device: torch.device) -> None:
        self.d = d
        self.gram = torch.zeros(d + 1 + width, d + 1 + width, dtype=torch.float64, device=device)

    @property
    def rows(self) -> int:
        """How many were seen."""
        return int(self.gram[self.d, self.d])

    def add(self, h: Tensor, t: Tensor) -> None:
        """Add rows."""
        rows = torch.cat([each.to(self.gram) for each in (h, h.new_ones(len(h), 1), t)], 1)
        self.gram += rows.T @ rows

    def with_(self, other: Moments) -> Moments:
        """Return the sums over the rows of both."""
        whole = copy.copy(self)
        whole.gram = self.gram + other.gram
        return whole

    def solve(self, ridge: float, *, shift: bool) -> tuple[Tensor, Tensor]:
        """Return weight (width, d) and bias (width,), 0 without ``shift``."""
        d, mean = self.d, self.gram[self.d] / max(self.rows, 1)
        gram = self.gram - self.rows * torch.outer(mean, mean) if shift else self.gram
        inputs, both = gram[:d, :d], gram[:d, d + 1 :]
        damped = inputs + ridge * inputs.diagonal().mean().clamp_min(1e-30) * torch.eye(d).to(gram)
        weight = torch.linalg.solve(damped, both).T
        h, t = mean[:d], mean[d + 1 :]
        return weight, t - weight @ h if shift else torch.zeros_like(t)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return the squared error of a map on these rows, as a share of the squared targets."""
        lost = torch.cat([weight, bias[:, None], -torch.eye(len(bias)).to(weight)], 1)
        square = float(self.gram.diagonal()[self.d + 1 :].sum())
        return float((lost @ self.gram * lost).sum()) / max(square, 1e-30)


def close_gaps(work: Work, shorter: Shorter, report: Report) -> Model:
    """Change the weights of a shorter network so that it gives what the whole one does, gap by gap; return it to run.

    The whole one, whose tensors it shares, is not changed. PlanError where no gap can be closed like that, if it was
    asked for.
    """
    shapes = _shapes(work)
    gaps = _gaps(work.names, list(shorter.renamed), shapes)
    runs = replace(shorter.model, module=detached(shorter.model.module), notes=[])
    runnable(runs, device=str(place_of(work.runs.module)))
    rows: list[dict[str, Any]] = []
    for gap in gaps:
        row: dict[str, Any] = {"after": gap.before, "layers": gap.number, "into": None, "left": None, "why": ""}
        rows.append(row)
        if gap.before is None:
            row["why"] = "nothing before it reads samples"
            continue
        if shapes[gap.before] != shapes[gap.last]:
            row["why"] = f"`{gap.before}` is of another stack, or gives another shape"
            continue
        now = shorter.renamed[gap.before]
        found = _site(runs, now, work)
        if found is None:
            row["why"] = f"what `{now}` gives is no sum that a linear module of it adds to"
            continue
        name = found[0]
        fitted, checked = _collect(work, runs, now, gap.last, found)
        change = _fit(fitted, checked, shift=runs.module.get_submodule(name).bias is not None)
        row |= {"into": gap.before + name[len(now) :], "left": 1.0}  # as the whole network calls it
        if change is None:
            row["why"] = "no map is better than none on samples that it was not fitted on"
        else:
            row["left"], weight, bias = change
            _fold((shorter.model, runs), name, weight, bias)
    report.data["repair"] = rows
    if work.repair and gaps and all(row["into"] is None for row in rows):
        hint = "leave it out, and train what was pruned"
        raise PlanError(f"`--repair` cannot close a gap of `{work.stored.name}`", why=str(rows[0]["why"]), hint=hint)
    shown = []
    for row in rows:
        left = "" if row["left"] is None else f"{row['left']:.0%}"
        shown.append([row["after"] or "the start", row["layers"], row["into"] or "", left, row["why"]])
    report.tables.insert(0, Table("gaps", ["after", "layers", "closed in", "of the difference left", ""], shown))
    return runs


def _gaps(names: Sequence[str], kept: Sequence[str], shapes: Mapping[str, Any]) -> list[Gap]:
    """Return the runs of dropped layers of one container and shape, in running order."""
    found: list[Gap] = []
    before: str | None = None
    number = 0
    for at, name in enumerate(names):
        if name in kept:
            before, number = name, 0
            continue
        number += 1
        following = names[at + 1] if at + 1 < len(names) else None
        if following is None or following in kept or shapes[following] != shapes[name]:
            found.append(Gap(before, name, number))
            number = 0
    return found


def _shapes(work: Work) -> dict[str, Any]:
    """Return the container of each layer of the whole network, and the shape of what it gives."""
    shapes: dict[str, Any] = {}

    def saw(name: str, _before: Tensor, after: Tensor) -> None:
        shapes[name] = name.rpartition(".")[0], after.shape

    with layers.tapped(work.runs.module, work.names, saw):
        outputs(work.runs, probe(work.runs))
    return shapes


def _site(runs: Model, layer: str, work: Work) -> tuple[str, Tensor] | None:
    """Return the last linear module of a layer whose output goes straight into what the layer gives, or None.

    It is found by what it does: nudge its output, and the layer's output moves by that, or by a fixed multiple.

    Returns:
        its name in the shorter network, and (width,) what the layer multiplies its output by before it adds it.
    """
    assert work.given is not None
    batch = moved(runs, work.given.train.batch(range(min(2, len(work.given.train)))).inputs)
    modules = list(runs.module.get_submodule(layer).named_modules())
    owners = Counter(map(id, surgery.tensors_of(runs.module).values()))
    for leaf, linear in reversed(modules):
        if type(linear) is nn.Linear and owners[id(linear.weight)] == 1:
            scale = _answer(runs, layer, linear, batch)
            if scale is not None:
                return f"{layer}.{leaf}" if leaf else layer, scale
    return None


def _answer(runs: Model, layer: str, linear: nn.Linear, batch: Any) -> Tensor | None:
    """Return (width,) by how much of a nudge to a module its layer moves, or None where that is no fixed multiple."""
    nudge: Tensor | None = None
    seen: list[Tensor] = []

    def push(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output if nudge is None else output + nudge.to(output)

    def saw(_name: str, _before: Tensor, after: Tensor) -> None:
        seen.append(tokens_of(after, is_channels_last(runs)))

    generator = torch.Generator().manual_seed(0)
    with registered([linear.register_forward_hook(push)]), layers.tapped(runs.module, [layer], saw):
        outputs(runs, batch)
        size = float(seen[0].abs().mean())
        scales = []
        for _ in range(2):
            nudge = size * (1 + torch.rand(linear.out_features, generator=generator))
            outputs(runs, batch)
            if seen[-1].shape[-1] != len(nudge):
                return None
            scales.append((seen[-1] - seen[0]) / nudge.to(seen[0]))
    scale = scales[0].flatten(0, -2).mean(0)
    largest = float(scale.abs().max())
    apart = max(float((each - scale).abs().max()) for each in scales)
    # a softmax is blind to a nudge of all keys, so that an answer of nothing is no fixed multiple
    return scale if largest > FAINT and apart <= CLOSE * largest else None


def _collect(work: Work, runs: Model, before: str, last: str, site: tuple[str, Tensor]) -> tuple[Moments, Moments]:
    """Run the samples through both networks; return the sums over those to fit and those to check."""
    name, scale = site
    given = work.given
    assert given is not None
    linear: Any = runs.module.get_submodule(name)
    place = place_of(runs.module)
    fitted, checked = (Moments(linear.in_features, linear.out_features, solver_device(place)) for _ in range(2))
    hidden: list[Tensor] = []
    wanted: dict[str, Tensor] = {}

    def saw(key: str) -> Callable[..., None]:
        return lambda _name, _before, after: wanted.update({key: tokens_of(after, is_channels_last(runs))})

    counts = _tokens_that_count(work, runs, before)
    scale = torch.where(scale.abs() > 1e-6, scale, torch.full_like(scale, torch.inf)).to(place)
    number = len(given.train)
    with (
        layers.tapped(work.runs.module, [last], saw("whole")),
        layers.tapped(runs.module, [before], saw("shorter")),
        registered([linear.register_forward_hook(lambda _module, args, _output: hidden.append(args[0]))]),
        progress.track("closing the gap", number) as advance,
    ):
        done = 0
        for batch in given.train.batches(work.samples_at_once):
            each = moved(runs, batch.inputs)
            outputs(work.runs, each)
            outputs(runs, each)
            h = hidden.pop().flatten(1, -2)
            t = (wanted["whole"] - wanted["shorter"]) / scale
            chosen = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
            for some in (counts, inputs.mask_of(each)):
                if some is not None and some.shape[-1:] == h.shape[1:2]:
                    chosen &= some.bool().to(h.device)
            last_of_few = (torch.arange(done, done + len(h), device=h.device) % CHECKED == CHECKED - 1)[:, None]
            fitted.add(h[chosen & ~last_of_few], t[chosen & ~last_of_few])
            checked.add(h[chosen & last_of_few], t[chosen & last_of_few])
            done += len(h)
            for _ in range(len(h)):
                advance("")
    return fitted, checked


def _tokens_that_count(work: Work, runs: Model, layer: str) -> Tensor | None:
    """Return (tokens,) which tokens of what a layer gives reach the network's output; None for all."""
    given = work.given
    assert given is not None
    each = moved(runs, given.train.batch(range(min(4, len(given.train)))).inputs)
    held: list[Tensor] = []

    def leaf(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensor = main(output)
        assert tensor is not None
        held.append(tensor.detach().requires_grad_(True))
        return layers.in_place_of(output, held[0])

    with registered([runs.module.get_submodule(layer).register_forward_hook(leaf)]), torch.enable_grad():
        total = inputs.forward(runs, each).float().square().sum()
        (gradient,) = torch.autograd.grad(total, held)
    reached = tokens_of(gradient, is_channels_last(runs)).abs().amax((0, 2)) > 0
    return None if bool(reached.all()) or not bool(reached.any()) else reached


def _fit(fitted: Moments, checked: Moments, *, shift: bool) -> tuple[float, Tensor, Tensor] | None:
    """Return the error left on the checked rows, weight and bias of the best map; None where none is of use."""
    if not fitted.rows or not checked.rows:
        return None
    errors = {ridge: checked.error(*fitted.solve(ridge, shift=shift)) for ridge in RIDGES}
    ridge = min(errors, key=lambda one: errors[one])
    if not errors[ridge] < 1:
        return None
    return errors[ridge], *fitted.with_(checked).solve(ridge, shift=shift)


def _fold(models: Sequence[Model], name: str, weight: Tensor, bias: Tensor) -> None:
    """Add a map to a linear module of both networks, as new tensors: the old ones belong to the whole network too."""
    for model in models:
        linear: Any = model.module.get_submodule(name)
        changes = {"weight": weight, **({} if linear.bias is None else {"bias": bias})}
        for leaf, change in changes.items():
            old = getattr(linear, leaf)
            new = (old.detach().double() + change.to(old.device)).to(old.dtype)
            surgery.place(linear, {leaf: nn.Parameter(new, requires_grad=old.requires_grad)})
            model.infos.pop(f"{name}.{leaf}", None)
