"""How long modules and models take on a device, dense and with factors of some rank in their place.

The time of a product does not depend on the numbers in it, so no weight is factored to be timed: random factors serve.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftc.errors import PlanError, reason_of
from peftc.measure import costs
from peftc.measure.costs import Speedup
from peftc.models.inputs import DOES_NOT_RUN, outputs
from peftc.models.layers import registered
from peftc.models.model import Model, detached
from peftc.models.place import place_of
from peftc.nn import lowrank, surgery
from peftc.nn.skipped import first_tensor
from peftc.plans.allocate import Curve
from peftc.plans.plan import Target

SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)  # of the way from the smallest rank to break-even
SHAPE_ROUNDS = 9
MODEL_SECONDS = 20.0  # for one run of whole models, as far as the rounds below allow
MODEL_ROUNDS = (7, 30)
RUNS = 3  # at most, one after another, until what they say together is steady
STEADY = 1.03

FormOf = Callable[[str, str], str]  # name of a module, name of the target whose weight it uses -> form


# -- one module -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """All that decides how long one call of a module takes."""

    form: str  # as what its factors would be built
    module: str  # the module in words: class, sizes, stride, padding, bias
    given: tuple[int, ...]  # shape of the input


@dataclass(frozen=True)
class SiteTimes:
    """Seconds of one call at a site, each the least that was seen: what other programs take is not the module's.

    Attributes:
        dense: of the module itself.
        noise: what the module shows against itself, at least 1.01; a smaller factor is no difference.
        ranks, seconds: of the low-rank modules that were timed, smallest first.
    """

    dense: float
    noise: float
    ranks: tuple[int, ...]
    seconds: tuple[float, ...]


def sites_of(model: Model, targets: Mapping[str, Target], batch: Any, form_of: FormOf) -> dict[str, list[Site]]:
    """Return what is called for each target in one forward pass, once per call (PlanError: it does not run)."""
    found: dict[str, list[Site]] = {name: [] for name in targets}
    handles = []
    for name, target in targets.items():
        for each in (name, *target.aliases):
            module, form = model.module.get_submodule(each), form_of(each, name)

            def add(module: nn.Module, given: Any, named: Any, name: str = name, form: str = form) -> None:
                read = first_tensor(given, named)
                if read is not None:
                    found[name].append(Site(form, repr(module), tuple(read.shape)))

            handles.append(module.register_forward_pre_hook(add, with_kwargs=True))
    try:
        with registered(handles):
            outputs(model, batch)
    except DOES_NOT_RUN as error:
        if costs.out_of_memory(error):
            raise
        why = f"it does not run on a random input: {reason_of(error)}"
        hint = "give another budget, as `--target-macs` or `--ratio`"
        raise PlanError(f"`{model.name}` cannot be timed", why=why, hint=hint) from error
    return found


def grid(ranks: Sequence[int]) -> list[int]:
    """Return the few of ``ranks`` that are timed, the first and the last among them."""
    return list(dict.fromkeys(ranks[round(share * (len(ranks) - 1))] for share in SHARES)) if ranks else []


def time_site(module: nn.Module, site: Site, ranks: Sequence[int], title: str) -> SiteTimes:
    """Time a module and its low-rank stand-ins on random inputs, all in one interleaved run, the dense one twice."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        given = torch.randint(0, module.num_embeddings, site.given, device=weight.device)
    else:
        given = torch.randn(site.given, device=weight.device, dtype=weight.dtype)

    forward = torch.inference_mode()(lambda module: module(given))
    timed = {"dense": module, "control": module, **{str(rank): stand_in(module, site.form, rank) for rank in ranks}}
    calls = {label: functools.partial(forward, each) for label, each in timed.items()}
    least = dict.fromkeys(calls, math.inf)
    for _ in range(RUNS):
        times = costs.latency(calls, rounds=SHAPE_ROUNDS, device=weight.device, title=title)
        least = {label: min(*times[label], seconds) for label, seconds in least.items()}
        dense, control = sorted((least["dense"], least["control"]))
        if control / dense <= STEADY:
            break
    noise = max(control / dense, 1 + costs.FLOOR)
    return SiteTimes(dense, noise, tuple(ranks), tuple(least[str(rank)] for rank in ranks))


def stand_in(module: nn.Module, form: str, rank: int) -> nn.Module:
    """Return a low-rank module with random factors, where the dense one is and in its dtype."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    new = lowrank.build(module, form, rank).to(weight.dtype).to_empty(device=weight.device)
    for parameter in new.parameters():
        parameter.requires_grad_(False)
        fan_in = max(parameter.shape[1:].numel(), 1)
        # outputs of ordinary size: numbers that vanish or overflow have speeds of their own
        parameter.normal_(std=fan_in**-0.5)
    return new


# -- from a few ranks to all ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """Nanoseconds that a target takes in one forward pass, by rank."""

    costs: Mapping[int, int]  # of each rank at which it is measurably faster than dense, rising; empty where none is
    dense: int  # of the dense module

    def cost(self, rank: int | None) -> int:
        """Return the nanoseconds at a rank; where that is not measurably faster, the module is to stay dense."""
        return self.dense if rank is None else self.costs.get(rank, self.dense)

    def curve(self, losses: Tensor) -> Curve:
        """Return loss against time, from losses by rank; of ranks that take the same time only the largest."""
        by_cost = {cost: rank for rank, cost in self.costs.items()}
        kept = [float(losses[rank]) for rank in by_cost.values()]
        return Curve(tuple(by_cost.values()), tuple(by_cost), kept, self.dense)


def pace(ranks: Sequence[int], calls: Sequence[SiteTimes]) -> Pace:
    """Return the time of a target at each of ``ranks``, smallest first, from the few at which each call was timed.

    Times are made to rise with rank, and between two timed ranks time is taken to rise evenly.
    """
    dense = sum(each.dense for each in calls)
    if not ranks or not calls:
        return Pace({}, round(1e9 * dense))
    at = [ranks.index(rank) for rank in calls[0].ranks]
    rising = isotonic([sum(seconds) for seconds in zip(*(each.seconds for each in calls), strict=True)])
    fast = dense / max(each.noise for each in calls)
    seconds = np.interp(np.arange(len(ranks)), at, rising)
    faster = {rank: round(1e9 * each) for rank, each in zip(ranks, seconds, strict=True) if each < fast}
    return Pace(faster, round(1e9 * dense))


def isotonic(values: Sequence[float]) -> list[float]:
    """Return the rising sequence that is nearest to ``values`` in squared distance (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [value for value, length in pools for _ in range(length)]


# -- the whole model --------------------------------------------------------------------------------------------------


def factored(model: Model, targets: Mapping[str, Target], ranks: Mapping[str, int | None], form_of: FormOf) -> Model:
    """Return a copy of a model with random factors of some ranks; it shares all other tensors with the original."""
    network = detached(model.module)
    for name, rank in ranks.items():
        for each in (name, *targets[name].aliases) if rank is not None else ():
            old = network.get_submodule(each)
            surgery.replace(network, old, stand_in(old, form_of(each, name), rank))  # type: ignore[arg-type]
    return replace(model, module=network)


def model_seconds(model: Model, batch: Any) -> tuple[float, int]:
    """Return the seconds of one forward pass, the median of three, and how many rounds `compare` is to take."""
    calls, place = {"dense": lambda: outputs(model, batch)}, place_of(model.module)
    times = costs.latency(calls, rounds=3, device=place, title="timing the model")
    seconds = costs.quantile(times["dense"], 0.5)
    fewest, most = MODEL_ROUNDS
    return seconds, max(fewest, min(most, round(MODEL_SECONDS / (3 * max(seconds, 1e-6)))))


@dataclass(frozen=True)
class Measured(Speedup):
    """A speed-up, and how many rounds it was measured in."""

    rounds: int


def compare(dense: Model, candidate: Model, batch: Any, rounds: int) -> Measured:
    """Time a model, the same once more, and its factored copy, interleaved, in up to three runs of so many rounds."""
    models = {"dense": dense, "control": dense, "factored": candidate}
    calls = {label: functools.partial(outputs, model, batch) for label, model in models.items()}
    seconds: costs.Seconds = {label: [] for label in calls}
    for _ in range(RUNS):
        times = costs.latency(calls, rounds=rounds, device=place_of(dense.module), title="timing the factored model")
        seconds = {label: before + times[label] for label, before in seconds.items()}
        found = costs.speedup(seconds["dense"], seconds["control"], seconds["factored"])
        if found.high / found.low <= STEADY:
            break
    return Measured(**asdict(found), rounds=len(seconds["dense"]))
