"""Fit each module on the inputs that the modules before it, already factored, produce.

Ranks are decided on the dense model. Then the network is walked in the order in which it runs: for every set of modules
that share an input, one pass over the calibration set, ended as soon as they have been called, collects the second
moments that they see now; they are factored under those and put into the network, and the walk goes on.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from peftc import progress
from peftc.calibration import statistics
from peftc.calibration.collection import matrix_of
from peftc.calibration.prepared import Prepared
from peftc.calibration.statistics import Collector, Found, Site
from peftc.errors import UsageError
from peftc.factors.factoring import Factoring
from peftc.factors.ranks import Ranks
from peftc.models.dual import matching
from peftc.models.inputs import outputs
from peftc.models.layers import registered
from peftc.models.place import dtype_of, moved
from peftc.models.weights import read_note, save_part
from peftc.nn import lowrank
from peftc.tasks.task import batches

NEEDS = ("second_moment", "input_magnitude")  # what the modules before one change; gradients stay the dense model's


class _Reached(Exception):
    """All modules of a stage have been called: the rest of the pass is of no use."""


def refuse_unfit(source: object, needs: Sequence[str]) -> None:
    """Refuse, as UsageError, a sequential fit without a calibration set, or by a method that looks at no inputs."""
    if not isinstance(source, Prepared) or not set(needs) & set(NEEDS):
        what = "`--sequential` needs a calibration set to run, and a method with statistics of inputs"
        raise UsageError(what, hint="name it: `--data DATA`, with `--method kfac`, `whitened` or `asvd`")


def factor(work: Factoring, prepared: Prepared, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Compute and keep the factors of every module with a rank, in order; return what `Factoring.factor` does.

    The copy of the model in ``prepared`` takes the factors as they come.
    """
    known = work.factorize.statistics
    assert known is not None
    runs = batches(prepared.encoded.lengths, prepared.encoded.size, known.batch_size)
    sites = statistics.sites(prepared.model, work.targets, lambda: _pass(prepared, runs[:1], None))
    cuts: dict[str, dict[str, Any]] = {}
    with progress.track("factors, in order", sum(ranks.get(name) is not None for name in sites)) as advance:
        for _, group in groupby(sites.values(), key=lambda site: site.leader):
            some = list(group)  # what else shares the input but runs later is a stage of its own
            stage = {site.target.name: replace(site, leader=some[0].target.name) for site in some}
            chosen = {name: rank for name in stage if (rank := ranks.get(name)) is not None}
            parts = {name: work.part(work.targets[name], "factors") for name in chosen}
            if chosen and not all(part.is_file() for part in parts.values()):
                now = replace(work.factorize, statistics=_collect(work, prepared, stage, runs))
                for name, rank in chosen.items():
                    work.factor_one(work.targets[name], rank, parts[name], now)
            for name, part in parts.items():
                _place(work, prepared, name, part)
                cuts[name] = read_note(part) or {}
                advance(name)
    return {name: cuts[name] for name in work.targets if name in cuts}


def _collect(work: Factoring, prepared: Prepared, stage: Mapping[str, Site], runs: list[list[int]]) -> Any:
    """Return what stands for `Statistics` of a stage as it is now, with the dense model's gradients, from one pass."""
    known = work.factorize.statistics
    assert known is not None
    collector = Collector(prepared.model, stage, [need for need in NEEDS if need in work.factorize.needs])
    with collector.watching() as sums:
        _pass(prepared, runs, collector)
    found = {}
    for name, site in stage.items():
        before, inputs = known.of(name, work.device), sums.running.get(f"{site.leader}.input")
        patch = sums.running.get(f"{site.leader}.patch")
        seen = sums.running.get(f"{name}.output") if site.side == "output" else inputs
        output_mean = None
        if site.side == "output" and seen is not None:  # without the bias
            output_mean = seen.mean if inputs is None else matrix_of(prepared.model, site.target).double() @ inputs.mean
        others = dict(before.others)
        magnitude = sums.totals.get(f"{site.leader}.magnitude")
        if isinstance(magnitude, Tensor) and inputs is not None:
            others["input_magnitude"] = magnitude / inputs.count
        found[name] = Found(
            site.side,
            mean=None if inputs is None else inputs.mean,
            covariance=None if seen is None or seen.scatter is None else seen.covariance().float(),
            output_mean=output_mean,
            others=others,
            rows=before.rows,
            patch=None if patch is None else patch.mean,
        )
    return SimpleNamespace(is_lookup=known.is_lookup, of=lambda name, device: found[name].to(device))


def _pass(prepared: Prepared, runs: list[list[int]], collector: Collector | None) -> None:
    """Run the calibration set forward, each batch as far as the watched modules."""
    model = prepared.model
    last = (
        []
        if collector is None or matching(model.module)  # its text encoder runs again after the fusion layers
        else [each for site in collector.sites.values() for each in statistics.called(model, site.target)]
    )
    waiting: set[str] = set()

    def reached(name: str) -> Any:
        def hook(*_: object) -> None:
            waiting.discard(name)
            if not waiting:
                raise _Reached

        return hook

    with (
        registered(model.module.get_submodule(name).register_forward_hook(reached(name)) for name in last),
        closing(prepared.encoded.batches(runs)) as arriving,
    ):
        for batch in arriving:
            if collector is not None:
                collector.see(batch.inputs)
            waiting.update(last)
            try:
                outputs(model, moved(model, batch.inputs))
            except _Reached:
                continue


def _place(work: Factoring, prepared: Prepared, name: str, part: Path) -> None:
    """Give a module of the running network the product of its factors."""
    network: Any = prepared.model.module
    target, module = work.targets[name], network.get_submodule(name)
    like = {"device": module.weight.device, "dtype": dtype_of(network)}
    tensors = {key: tensor.to(**like) for key, tensor in load_file(part).items()}
    bias = tensors.pop("up.bias", None)
    product = lowrank.dense_weight(tensors, target.shape, target.form)
    if work.model.max_memory is not None:  # all products together are as large as the model: they are mapped, as it was
        stored = part.with_name(f"{part.stem}-product.safetensors")
        save_part(stored, {"weight": product}, {})
        product = load_file(stored)["weight"].to(**like)
    for each in (name, *target.aliases):
        network.get_submodule(each).weight.data = product
    if bias is not None:
        module.bias.data = bias
