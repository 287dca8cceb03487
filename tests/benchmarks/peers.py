"""Peers of `decompose` for language models, restated from their papers and code in plain torch, to be measured against.

SVD-LLM (arXiv 2403.07378), Swift-SVD (2604.01609), KFAC-SVD and LEMS (lems-svd/lems), ZS-SVD (2602.02848). They are run
on the CPU as the authors wrote them: their damping, their clipping, their searches. Where this differs, it is said.
Made for models with a large vocabulary: logits are computed for some rows at a time, one weight is swapped at a time,
and a layer that is tried alone is reached from its stored input.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = 2048  # whose logits are computed at once
DOUBLE = torch.float64
Ranks = dict[str, int | None]  # None is dense
Triple = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None]  # left, U, S, V, right: W ~ left^-1 U S V right^-1


@dataclass(frozen=True)
class Subject:
    """A causal language model of transformers: an embedding, layers in a row, a norm and a head."""

    model: Any

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears of the layers."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        return self.model.model.layers

    def layer_of(self, name: str) -> int:
        """Return the number of a linear's layer."""
        return int(name.split(".layers.")[1].split(".")[0])

    def hidden(self, ids: Tensor) -> Tensor:
        """Return what the head reads."""
        return self.model.model(input_ids=ids, use_cache=False).last_hidden_state

    def _tiles(self, *hidden: Tensor, temperature: float = 1.0) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the logits of rows (n, width) for some words at a time, and the first of these words."""
        table = self.model.lm_head.weight
        for start in range(0, len(table), WORDS):
            yield start, [rows @ table[start : start + WORDS].T / temperature for rows in hidden]

    @torch.no_grad()
    def nll(self, hidden: Tensor, ids: Tensor) -> float:
        """Return the summed negative log-likelihood of one window."""
        rows, words = hidden[0, :-1], ids[0, 1:]
        highest, total, said = torch.full((len(rows),), -torch.inf), torch.zeros(len(rows)), torch.zeros(len(rows))
        for start, (z,) in self._tiles(rows):
            here = (words >= start) & (words < start + z.shape[1])
            said[here] = z[here, words[here] - start]
            before, highest = highest, torch.maximum(highest, z.amax(1))
            total = total * (before - highest).exp() + z.sub_(highest[:, None]).exp_().sum(1)
        return float((highest + total.log() - said).double().sum())

    @torch.no_grad()
    def kl(self, dense: Tensor, hidden: Tensor, rows: slice, temperature: float = 1.0) -> float:
        """Return the mean divergence from the dense model on some rows of one window, in nats per token."""
        one, other = dense[0, rows], hidden[0, rows]
        number = len(one)
        tops = [torch.full((number,), -torch.inf) for _ in range(2)]
        sums, apart = [torch.zeros(number) for _ in range(2)], torch.zeros(number)
        for _, (p, q) in self._tiles(one, other, temperature=temperature):
            gap = p - q
            for at, z in enumerate((p, q)):
                before, tops[at] = tops[at], torch.maximum(tops[at], z.amax(1))
                scale = (before - tops[at]).exp()
                z.sub_(tops[at][:, None]).exp_()
                sums[at] = sums[at] * scale + z.sum(1)
                if at == 0:
                    apart = apart * scale + (z * gap).sum(1)
        each = apart / sums[0] - (tops[0] + sums[0].log()) + (tops[1] + sums[1].log())
        return float(each.double().mean())

    @torch.no_grad()
    def pull(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the gradient of the summed negative log-likelihood of one window by what the head reads."""
        rows, words, table = hidden[0, :-1], ids[0, 1:], self.model.lm_head.weight
        highest, total, mean = torch.full((len(rows),), -torch.inf), torch.zeros(len(rows)), torch.zeros_like(rows)
        for start, (z,) in self._tiles(rows):
            before, highest = highest, torch.maximum(highest, z.amax(1))
            scale = (before - highest).exp()
            z.sub_(highest[:, None]).exp_()
            total = total * scale + z.sum(1)
            mean = mean * scale[:, None] + z @ table[start : start + z.shape[1]]
        found = torch.zeros_like(hidden)
        found[0, :-1] = mean / total[:, None] - table[words]
        return found


@dataclass
class Sums:
    """What a pass and its backward pass tell of a linear; all but ``dw`` are means over windows of sums over tokens."""

    c: Tensor  # (in, in), inputs
    g: Tensor  # (out, out), gradients as LEMS clips them
    dw: Tensor  # (out, in), the gradient of the mean loss


def collect(subject: Subject, windows: Sequence[Tensor]) -> tuple[dict[str, Sums], Tensor]:
    """Return the sums of every linear and the block influence of every layer, mean over tokens."""
    linears, layers = subject.linears, subject.layers
    shapes = {name: module.weight.shape for name, module in linears.items()}
    found = {
        name: Sums(*(torch.zeros(size, dtype=DOUBLE) for size in ((i, i), (o, o), (o, i))))
        for name, (o, i) in shapes.items()
    }
    influence, tokens = torch.zeros(len(layers), dtype=DOUBLE), 0

    def watch(name: str) -> Callable[..., None]:
        def backward(x: Tensor, gradient: Tensor) -> None:
            sums, g = found[name], gradient[0]
            sums.dw += g.T @ x
            cut = int(0.125 * len(g))
            g = g[cut : len(g) - cut]
            norm = g.norm(dim=-1, keepdim=True)
            there = norm > 1e-10
            mean = (norm * there).sum() / there.sum().clamp(min=1)
            scale = torch.minimum(torch.maximum(norm, 0.1 * mean), 10 * mean) / norm.clamp(min=1e-10)
            g = torch.where(there, g * scale, g)
            sums.g += g.T @ g / len(windows)

        def forward(_module: nn.Module, inputs: Any, output: Tensor) -> None:
            x = inputs[0][0].detach()
            found[name].c += x.T @ x / len(windows)
            output.register_hook(lambda gradient: backward(x, gradient))

        return forward

    def between(at: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            given = output[0] if isinstance(output, tuple) else output
            influence[at] += (1 - F.cosine_similarity(inputs[0], given, dim=-1)).mean().item() / len(windows)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    hooks += [layer.register_forward_hook(between(at)) for at, layer in enumerate(layers)]
    subject.model.requires_grad_(False)
    embedding = subject.model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _m, _i, output: output.detach().requires_grad_()))
    for ids in windows:
        hidden = subject.hidden(ids)
        hidden.backward(subject.pull(hidden.detach(), ids))
        tokens += ids.shape[1] - 1
    for hook in hooks:
        hook.remove()
    for sums in found.values():
        sums.dw /= tokens
    return found, influence


def _cholesky(moment: Tensor, shrink: float = 0.0, ridge: float = 0.0) -> Tensor:
    eye = torch.eye(len(moment), dtype=DOUBLE)
    moment = (1 - shrink) * moment + (shrink * moment.diagonal().mean() + ridge) * eye
    for _ in range(4):
        lower, bad = torch.linalg.cholesky_ex(moment)
        if not bad:
            return lower
        moment = moment + (1e-6 - torch.linalg.eigvalsh(moment)[0]) * eye
    raise RuntimeError("not positive definite")


def triple(factors: str, weight: Tensor, sums: Sums, number: int) -> Triple:
    """Return the decomposition of a weight: ``svd-llm``, ``swift``, ``zs``, ``kfac`` (as derived), ``lems`` (as coded).

    ``number`` of windows undoes the mean where a method takes the sum.
    """
    weight = weight.to(DOUBLE)
    if factors == "swift":
        values, vectors = torch.linalg.eigh(weight @ (sums.c * number) @ weight.T)
        keep = min(weight.shape)
        vectors = vectors.flip(1)[:, :keep]
        return None, vectors, values.flip(0)[:keep].clamp(min=0).sqrt(), vectors.T @ weight, None
    both = factors in ("kfac", "lems")
    right = _cholesky(sums.c, 0.1) if both else _cholesky(sums.c * number, ridge=1e-4 if factors == "zs" else 0.0)
    left = _cholesky(sums.g, 0.3) if both else None
    left = left.T if left is not None and factors == "kfac" else left
    u, s, v = torch.linalg.svd((weight if left is None else left @ weight) @ right, full_matrices=False)
    return left, u, s, v, right


class Factors:
    """All ranks of one linear: two matrices in float32 whose first r columns and rows are the factors of rank r."""

    def __init__(self, factors: str, found: Triple) -> None:
        left, u, s, v, right = found
        self.values = s
        if factors == "swift":
            self.up, self.down = u.float(), v.float()
            return
        up, down = u * s.sqrt(), s.sqrt()[:, None] * v
        up = up if left is None else torch.linalg.solve(left, up)
        assert right is not None
        self.up = up.float()
        self.down = torch.linalg.solve_triangular(right, down, upper=False, left=False).float()

    def product(self, rank: int) -> Tensor:
        """Return the weight at a rank."""
        return self.up[:, :rank] @ self.down[:rank]


@contextmanager
def cut(subject: Subject, factors: Mapping[str, Factors], ranks: Ranks) -> Iterator[None]:
    """Put products of factors in the place of weights within a context."""
    before = {name: subject.linears[name].weight.data for name, rank in ranks.items() if rank is not None}
    for name in before:
        subject.linears[name].weight.data = factors[name].product(ranks[name])  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, weight in before.items():
            subject.linears[name].weight.data = weight


@contextmanager
def resumed(subject: Subject, start: int, given: Sequence[Tensor], at: list[int]) -> Iterator[None]:
    """Run layers from ``start`` on within a context, from the dense model's input of it for window ``at[0]``."""
    before = [layer.forward for layer in subject.layers]
    for number, layer in enumerate(subject.layers[:start]):
        last = number == start - 1
        layer.forward = lambda hidden, *_args, _last=last, **_named: given[at[0]] if _last else hidden
    try:
        yield
    finally:
        for layer, forward in zip(subject.layers, before, strict=True):
            layer.forward = forward


def size(module: nn.Linear) -> int:
    """Return the entries of a weight."""
    return module.weight.numel()


def most(module: nn.Linear) -> int:
    """Return the rank at which factors are as large as the weight."""
    return int(size(module) / sum(module.weight.shape))


def uniform(subject: Subject, ratio: float) -> Ranks:
    """Return the ranks of SVD-LLM."""
    return {n: max(1, int(size(m) * ratio / sum(m.weight.shape))) for n, m in subject.linears.items()}


def kept(subject: Subject, ranks: Ranks) -> float:
    """Return the share of the linears' entries that ranks keep."""
    linears = subject.linears
    parts = (size(m) if ranks[n] is None else ranks[n] * sum(m.weight.shape) for n, m in linears.items())
    return sum(parts) / sum(size(m) for m in linears.values())


def swift_dynamic(
    subject: Subject, factors: Mapping[str, Factors], influence: Tensor, ratio: float, alpha: float = 0.6
) -> Ranks:
    """Return the ranks of Swift-SVD's dynamic allocation; its rank formula, wrong for grouped queries, put right."""
    linears, kinds, ranks = subject.linears, dict[str, list[str]](), Ranks()
    for name in linears:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    importance = 1 + (influence - influence.min()) / (influence.max() - influence.min())
    for names in kinds.values():
        even, full = uniform(subject, ratio)[names[0]], [len(factors[n].values) for n in names]
        base = [int(0.25 * ratio * k) for k in full]
        rest = len(names) * (even or 0) - sum(base)
        norms = [torch.log1p(factors[n].values.norm()).item() for n in names]
        scores = [
            importance[subject.layer_of(n)].item() ** alpha * norm ** (1 - alpha)
            for n, norm in zip(names, norms, strict=True)
        ]
        given = [min(k, b + int(rest * s / sum(scores))) for k, b, s in zip(full, base, scores, strict=True)]
        left = len(names) * (even or 0) - sum(given)
        order = sorted(range(len(names)), key=lambda at: -scores[at])
        while left > 0 and any(given[at] < full[at] for at in order):
            for at in order:
                if left > 0 and given[at] < full[at]:
                    given[at] += 1
                    left -= 1
        ranks |= dict(zip(names, (max(1, rank) for rank in given), strict=True))
    return ranks


def zero_sum(
    subject: Subject, found: Mapping[str, Triple], sums: Mapping[str, Sums], ratio: float, floor: float
) -> Ranks:
    """Return the ranks of ZS-SVD in one shot: the least predicted change goes, of the sign that brings the sum back."""
    linears = subject.linears
    ranks = {name: len(found[name][2]) for name in linears}
    slopes = {}
    for name in linears:
        _, u, s, v, right = found[name]
        assert right is not None
        h = torch.linalg.solve_triangular(right.T, sums[name].dw, upper=True, left=False)
        slopes[name] = -s * ((u.T @ h) * v).sum(1)
    budget, removed, total = (1 - ratio) * sum(size(m) for m in linears.values()), 0, 0.0
    heaps: tuple[list[Any], list[Any]] = ([], [])

    def push(name: str) -> None:
        if ranks[name] > max(1, int(floor * most(linears[name]))):
            change = slopes[name][ranks[name] - 1].item()
            heapq.heappush(heaps[change > 0], (abs(change), name, change))

    for name in linears:
        push(name)
    while removed < budget and (heaps[0] or heaps[1]):
        wanted = total <= 0
        _, name, change = heapq.heappop(heaps[wanted] or heaps[not wanted])
        module, rank, even = linears[name], ranks[name], most(linears[name])
        each = sum(module.weight.shape)
        removed += 0 if rank > even else size(module) - even * each if rank == even else each
        total += change
        ranks[name] -= 1
        push(name)
    return {name: None if rank >= most(linears[name]) else rank for name, rank in ranks.items()}


class Search:
    """LEMS: one layer alone cut deep, a curve of loss for each, an integer programme, ten pairs of a depth bias.

    The pairs are drawn at random, the first of them (0, 0), where the authors let Optuna propose; and the integer
    programme is relaxed, which on convex hulls is within one candidate of it.

    Args:
        subject, factors: the model, and all ranks of every linear.
        windows: that nothing was collected on.
        every: of the second half of a window each so many-th token is looked at.
        first: of the windows, on which single layers are cut; plans are tried on all.
        step: of what ranks are multiples.
    """

    temperature = 0.6

    def __init__(
        self,
        subject: Subject,
        factors: Mapping[str, Factors],
        windows: Sequence[Tensor],
        *,
        every: int = 1,
        first: int | None = None,
        step: int = 8,
        known: Mapping[str, float] | None = None,
    ) -> None:
        self.subject, self.factors, self.windows, self.step = subject, factors, windows, step
        self.first = windows[:first]
        self.rows = slice(windows[0].shape[1] // 2, None, every)
        self.dense: list[Tensor] = []
        self.alone: dict[str, float] = dict(known or {})

    @torch.no_grad()
    def measure(self, said: Callable[[str], None] = lambda _: None) -> dict[str, float]:
        """Return the divergence with each linear alone at a tenth of its break-even rank."""
        subject = self.subject
        given: list[list[Tensor]] = [[] for _ in subject.layers]
        hooks = [
            layer.register_forward_hook(
                lambda _m, _i, out, _at=at: given[_at].append(out[0] if isinstance(out, tuple) else out)
            )
            for at, layer in enumerate(subject.layers)
        ]
        self.dense = [subject.hidden(ids) for ids in self.windows]
        for hook in hooks:
            hook.remove()
        for name, module in subject.linears.items():
            start, at, total = subject.layer_of(name), [0], 0.0
            if name in self.alone:
                continue
            with cut(subject, self.factors, {name: self.least(module)}), resumed(subject, start, given[start - 1], at):
                for number, ids in enumerate(self.first):
                    at[0] = number
                    total += subject.kl(self.dense[number], subject.hidden(ids), self.rows, self.temperature)
            self.alone[name] = total / len(self.first)
            said(name)
        return self.alone

    def least(self, module: nn.Linear) -> int:
        """Return the rank at which a linear is tried."""
        return max(1, int(0.1 * most(module)))

    def lost(self, ranks: Ranks) -> float:
        """Return the divergence with all linears cut."""
        with cut(self.subject, self.factors, ranks), torch.no_grad():
            each = [
                self.subject.kl(dense, self.subject.hidden(ids), self.rows, self.temperature)
                for dense, ids in zip(self.dense, self.windows, strict=True)
            ]
        return sum(each) / len(each)

    def plan(self, ratio: float, alpha: float, gamma: float) -> Ranks:
        """Return the ranks that lose least by prediction under a depth bias."""
        linears, depth = self.subject.linears, len(self.subject.layers)
        tails = torch.tensor([sum(1 / (k + 1) ** alpha for k in range(at, depth)) for at in range(depth)])
        tails = (tails - tails[-1]) / (tails[0] - tails[-1])
        floor = 0.3 if ratio >= 0.5 else 0.1
        ways: dict[str, list[tuple[float, float, int | None]]] = {}
        for name, module in linears.items():
            energy = self.factors[name].values.square().cumsum(0)
            tail = (1 - energy / energy[-1]).clamp(min=0)
            scale = self.alone[name] / max(tail[self.least(module) - 1].item(), 1e-6)
            scale *= 1 + gamma * tails[self.subject.layer_of(name)].item()
            even = most(module)
            ranks = [r for r in range(self.step, int(0.95 * even) + 1, self.step) if r >= floor * even]
            points = [(r / even * size(module), scale * tail[r - 1].item(), r) for r in ranks]
            ways[name] = _hull([*points, (float(size(module)), 0.0, None)])
        budget = ratio * sum(size(module) for module in linears.values())
        at = dict.fromkeys(linears, 0)
        spent = sum(way[0][0] for way in ways.values())
        steps = []
        for name, way in ways.items():
            for number in range(1, len(way)):
                (a, e, _), (b, f, _) = way[number - 1 : number + 1]
                steps.append(((e - f) / (b - a), name, number, b - a))
        for _, name, number, price in sorted(steps, key=lambda one: -one[0]):
            if spent + price <= budget and at[name] == number - 1:
                spent += price
                at[name] = number
        return {name: ways[name][at[name]][2] for name in linears}

    def best(self, ratio: float, trials: int = 10, seed: int = 42) -> tuple[Ranks, list[dict[str, float]]]:
        """Return the plan that loses least on the windows, and what every trial lost."""
        generator, tried, best = torch.Generator().manual_seed(seed), [], None
        for trial in range(trials):
            alpha, gamma = (torch.rand(2, generator=generator) * torch.tensor([3.0, 7.0])).tolist()
            alpha, gamma = (0.0, 0.0) if trial == 0 else (alpha, gamma)
            ranks = self.plan(ratio, alpha, gamma)
            loss = self.lost(ranks)
            tried.append({"alpha": alpha, "gamma": gamma, "loss": loss})
            if best is None or loss < best[0]:
                best = loss, ranks
        assert best is not None
        return best[1], tried


def _hull(points: Sequence[tuple[float, float, int | None]]) -> list[tuple[float, float, int | None]]:
    hull: list[tuple[float, float, int | None]] = []
    for c in points:
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0]):
                break
            hull.pop()
        hull.append(c)
    return hull
