"""From a speed-up that is asked for to ranks: time the modules, solve, then measure the whole model and correct.

The times of modules by themselves do not add up to the time of the model, so they only say where to look. What counts
is the ratio measured on the whole model. The outcome is a plan, and a plan no longer depends on the clock.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from peftc import progress
from peftc.errors import PlanError
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import Decision, Ranks, uniform_within
from peftc.measure import latency
from peftc.measure.latency import Measured, Pace, Site, SiteTimes
from peftc.models.inputs import probe
from peftc.models.model import detached
from peftc.models.place import runnable
from peftc.plans import allocate
from peftc.plans.plan import Aim
from peftc.report import Report, Table, grouped

BATCH_SIZE = 16
MISSED = 0.05  # a measured speed-up that is further from what was asked is refused
TRIES = 6
NOISY = 1.05  # a noise band that reaches further leaves the last digits open
BUSY = 1.2  # what modules may show against themselves at most, in the least of their times
QUIET = "end other programs and run again, or leave them a core: `OMP_NUM_THREADS=1`"


def unusual(aim: Aim | None) -> dict[str, Any]:
    """Return what a request says besides, where it is not as always; requests of earlier versions keep their ids."""
    if aim is None:
        return {}
    said: dict[str, Any] = {"rank_multiple": aim.multiple} if aim.multiple > 1 else {}
    if aim.budget.kind == "speedup":
        said["timed"] = [aim.timed.batch_size or BATCH_SIZE, aim.timed.image_size, aim.timed.max_length]
    return said


def timed(work: Factoring, aim: Aim) -> Decision:
    """Return the ranks at which the model is as fast as asked, as timed here; PlanError where that cannot be had."""
    given, asked = aim.timed, float(aim.budget.amount)
    model = runnable(replace(work.model, module=detached(work.model.module)), device=given.device)
    size = given.batch_size or BATCH_SIZE
    batch = probe(model, batch=size, image_size=given.image_size, max_length=given.max_length, seed=given.seed)
    sites = latency.sites_of(model, work.targets, batch, work.form_of)
    most = {name: allocate.break_even_rank(target.shape, target.form) for name, target in work.targets.items()}
    ranks = {name: range(aim.multiple, most[name] + 1, aim.multiple) for name in work.targets}
    chosen = {site: latency.grid(ranks[name]) for name, each in sites.items() for site in each if ranks[name]}
    modules = {repr(module): module for module in model.module.modules()}
    times = {
        site: latency.time_site(modules[site.module], site, some, f"timing shape {number} of {len(chosen)}")
        for number, (site, some) in enumerate(chosen.items(), 1)
    }
    called = [times[site] for each in sites.values() for site in each if site in times]
    total = sum(each.dense for each in called)
    noise = sum(each.dense * each.noise for each in called) / total if called else 1.0
    if noise > BUSY:  # then the times of their factors would mean nothing either
        raise PlanError(
            f"a speed-up of {asked:g}x cannot be told from noise here",
            why=f"the time of a module was measured to be {noise:.2f}x its own, in the mean over all modules",
            hint=QUIET,
        )
    paces = {name: latency.pace(ranks[name], [times[site] for site in sites[name] if site in times]) for name in sites}
    fast = {name: each for name, each in paces.items() if each.costs}
    if not fast:
        raise _unreachable(asked, 1.0, "no eligible module gets measurably faster by factors of any rank")
    solve = _solver(work, aim, fast)
    seconds, rounds = latency.model_seconds(model, batch)

    def measured(ranks: Ranks) -> Measured:
        return latency.compare(model, latency.factored(model, work.targets, ranks, work.form_of), batch, rounds)

    tries = search(asked, fast, round(1e9 * seconds), solve, measured)
    best, device = tries[-1], next(model.module.parameters()).device
    figures = {
        "asked": asked,
        **asdict(best.measured),
        "batch_size": size,
        "tries": len(tries),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "shapes": _shapes(sites, times, paces),
    }
    slow = {}
    for name, each in ranks.items():
        if name not in fast:
            why = "its factors are not measurably faster here" if sites[name] else "not called on a random input"
            slow[name] = why if each else "its factors would not be smaller"
    return Decision({name: best.ranks.get(name) for name in work.targets}, slow, figures)


def _solver(work: Factoring, aim: Aim, paces: Mapping[str, Pace]) -> Callable[[int], Ranks]:
    """Return a function from nanoseconds to the ranks that lose least within them."""
    targets = {name: work.targets[name] for name in paces}
    if aim.allocation == "uniform":

        def uniform(limit: int) -> Ranks:
            ranks = uniform_within(targets, limit, lambda target, rank: paces[target.name].cost(rank), aim.multiple)
            return {name: rank if rank in paces[name].costs else None for name, rank in ranks.items()}

        return uniform
    rule, curves = allocate.ALLOCATIONS[aim.allocation], {}
    with progress.track("spectra", len(targets)) as advance:
        for name in targets:
            curves[name] = paces[name].curve(rule.weigh(work.losses_of(name)))
            advance(name)

    def greedy(limit: int) -> Ranks:
        ranks = allocate.spend(curves, limit, foresee_dense=rule.foresee_dense)
        return allocate.fill(curves, ranks, limit)

    return greedy


# -- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    """A plan, the nanoseconds that its modules take by themselves, and the speed-up of the model under it."""

    ranks: Ranks
    cost: int
    measured: Measured


def search(
    asked: float,
    paces: Mapping[str, Pace],
    whole: int,
    solve: Callable[[int], Ranks],
    measured: Callable[[Ranks], Measured],
) -> list[Try]:
    """Return the plans that were measured, the chosen one last; PlanError where none comes close enough.

    Args:
        asked: above 1.
        paces: of the modules that get faster.
        whole: nanoseconds of the dense model.
        solve: the ranks for so many nanoseconds in these modules.
        measured: speed-up of the whole model at some ranks.
    """
    dense = sum(pace.dense for pace in paces.values())
    floor = sum(min(pace.costs.values()) for pace in paces.values())
    allowed = min(MISSED, (asked - 1) / 2)  # of a speed-up of 1.02, 5 % less would be none at all
    limit = dense - whole * (1 - 1 / asked)
    tries: list[Try] = []
    while len(tries) < TRIES:
        ranks = solve(max(floor, min(dense, math.floor(limit))))
        if any(ranks == before.ranks for before in tries):
            break
        cost = sum(paces[name].cost(rank) for name, rank in ranks.items())
        tries.append(Try(ranks, cost, measured(ranks)))
        last = tries[-1].measured
        value = last.value
        if last.noise_high >= asked:
            raise PlanError(
                f"a speed-up of {asked:g}x cannot be told from noise here: {value:.2f}x was measured",
                why=f"the model against itself shows {last.noise_low:.2f}x to {last.noise_high:.2f}x "
                f"in {last.rounds} rounds",
                hint=QUIET,
            )
        if abs(value / asked - 1) <= allowed / 2:
            return tries
        if cost <= floor and value < asked * (1 - allowed):
            raise _unreachable(asked, value, "the lowest ranks that were timed, in every module that gets faster")
        limit = _next_limit(asked, dense, tries)
    best = min(tries, key=lambda each: abs(math.log(each.measured.value / asked)))
    if abs(best.measured.value / asked - 1) > allowed:
        found = sorted(each.measured.value for each in tries)
        noise = max(each.measured.noise_high for each in tries)
        what = f"`--speedup {asked:g}` was not met: {', '.join(f'{value:.2f}x' for value in found)} were measured"
        why = f"the best that was measured is {found[-1]:.2f}x; the model against itself shows up to {noise:.2f}x"
        hint = "end other programs and run again, or time larger batches with `--batch-size`"
        raise PlanError(what, why=why, hint=hint)
    return [each for each in tries if each is not best] + [best]


def _next_limit(asked: float, dense: int, tries: Sequence[Try]) -> float:
    """Return the nanoseconds to try next: on the line through the two plans that enclose what is asked.

    The dense model, at a speed-up of 1, is one end of the first line; without a plan that is fast enough the line
    through it and the fastest one is followed beyond.
    """
    points = [(float(dense), 1.0), *((float(each.cost), 1 / each.measured.value) for each in tries)]
    wanted = 1 / asked
    slower = min(point for point in points if point[1] >= wanted)
    faster = max((point for point in points if point[1] < wanted), default=None)
    if faster is None:
        slope = (1 - slower[1]) / max(dense - slower[0], 1)
        return dense - (1 - wanted) / slope if slope > 0 else 0.0
    return faster[0] + (slower[0] - faster[0]) * (wanted - faster[1]) / (slower[1] - faster[1])


def _unreachable(asked: float, best: float, why: str) -> PlanError:
    within = math.floor(100 * best * (1 - MISSED / 2)) / 100
    return PlanError(
        f"`--speedup {asked:g}` is out of reach: the best that was measured is {best:.2f}x",
        why=why,
        hint=f"ask for at most `--speedup {within:g}`, or make more modules eligible with `--include`"
        if within > 1.02
        else "make more modules eligible with `--include`, or time larger batches with `--batch-size`",
    )


def _shapes(
    sites: Mapping[str, Sequence[Site]], times: Mapping[Site, SiteTimes], paces: Mapping[str, Pace]
) -> list[dict[str, Any]]:
    """Return what was timed, one entry per distinct shape, for people."""
    rows = []
    for site, each in times.items():
        names = [name for name, called in sites.items() if site in called]
        rows.append(
            {
                "modules": list(grouped(names)),
                "count": sum(list(called).count(site) for called in sites.values()),
                "form": site.form,
                "input": list(site.given),
                "dense_seconds": each.dense,
                "noise_high": each.noise,
                "ranks": list(each.ranks),
                "seconds": list(each.seconds),
                "faster_to_rank": max(paces[names[0]].costs, default=None),
            }
        )
    return rows


def tell_timed(report: Report, decided: Decision) -> None:
    """Add what was timed to a report, where anything was."""
    if not decided.figures:
        return
    found = report.data["speedup"] = decided.figures
    for row in report.data["modules"]:
        row["reason"] = decided.slow.get(row["name"], row["reason"])
    report.tables.insert(0, _table(found["shapes"]))
    noise = f"noise {found['noise_low']:.3f} to {found['noise_high']:.3f}"
    report.notes.append(
        f"measured {found['value']:.3f}x ({found['low']:.3f} to {found['high']:.3f}; {noise}) where "
        f"{found['asked']:g}x was asked: batches of {found['batch_size']}, {found['rounds']} rounds on "
        f"{found['device']}, threads: {found['threads']}; {found['tries']} plans were measured"
    )
    if found["noise_high"] > NOISY:
        report.warnings.append(f"this machine is busy ({noise}): measure again with `peftc bench`")


def _table(shapes: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for row in shapes:
        kinds, some = row["modules"], list(zip(row["ranks"], row["seconds"], strict=True))
        others = f" and {len(kinds) - 1} like it" if len(kinds) > 1 else ""
        times = ", ".join(f"{1000 * seconds:.3g} at {rank}" for rank, seconds in some[:: len(some) // 4 or 1])
        dense, largest = f"{1000 * row['dense_seconds']:.3g}", row["faster_to_rank"]
        last = "none" if largest is None else str(largest)
        lines.append([kinds[0] + others, row["count"], "x".join(map(str, row["input"])), dense, times, last])
    return Table("timed shapes", ["module", "calls", "input", "dense, ms", "ms at rank", "faster to rank"], lines)
