"""Ordered factors: every rank of every eligible module, solved once, stored beside the dense weights, cut in seconds.

The factors of rank r are the first r columns of ``up`` and rows of ``down`` of those of any larger rank. They are
stored up to the break-even rank, above which a module is smaller dense, with the squared errors of all ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftc import processes, progress
from peftc.errors import ArtifactError
from peftc.factors import spectra, tables
from peftc.factors.factoring import Factoring, Kept
from peftc.models import weights, write
from peftc.models.model import Model
from peftc.models.targets import find_targets
from peftc.models.weights import piece, pieces_of
from peftc.nn import lowrank
from peftc.nn.surgery import tensor_bytes
from peftc.plans import allocate
from peftc.plans.plan import Target
from peftc.report import Report, Table, size_table
from peftc.store import artifact
from peftc.store.manifest import Manifest

MEANS = ("weight_mean", "down_mean")
MAKE = "make one: `peftc decompose MODEL --keep-all-ranks -o all`"
AGAIN = "build it again: `peftc show --commands` prints how"


def refuse_ordered(model: Model) -> None:
    """Refuse, as ArtifactError, to decompose what already holds the factors of every rank."""
    if model.manifest is not None and model.manifest.ordered:
        why = "it was written with `--keep-all-ranks`, so no budget needs another decomposition"
        hint = f"cut it: `peftc truncate {model.folder} --ratio 0.5 -o small`"
        raise ArtifactError(f"`{model.folder}` already holds the factors of every rank", why=why, hint=hint)


# -- writing ----------------------------------------------------------------------------------------------------------


def every_rank(targets: Mapping[str, Target]) -> dict[str, int]:
    """Return the largest rank of each module that makes it smaller; 0 where none does."""
    return {name: allocate.break_even_rank(target.shape, target.form) for name, target in targets.items()}


def keep_all(work: Factoring, base: dict[str, Any], request: dict[str, Any]) -> Report:
    """Write a model with the factors of every rank beside its weights, which stay as they are."""
    job, model = work.job, work.model
    assert job is not None
    job.require(4 * tensor_bytes(model.module))
    computed, ranks = {}, every_rank(work.targets)
    work.share_spectra()
    with progress.track("spectra", len(ranks)) as advance:
        for name, target in work.targets.items() if processes.rank() == 0 else ():
            computed[f"{name}.losses"] = work.spectrum(target).losses().cpu()
            advance(name)
    cuts = work.factor({name: rank or None for name, rank in ranks.items()})
    report = report_on(work, cuts)
    if processes.rank():
        return report
    for name in cuts:
        computed |= {f"{name}.{key}": mean for key, mean in _means(work, name, ranks[name]).items()}
    factors = {name: piece(tensor) for name, tensor in computed.items()}
    for name in cuts:
        tensors, parts = work.kept(name, ranks[name])
        factors |= {f"{name}.{key}": part for key, part in parts.items() if key != "up.bias"}
        computed |= {f"{name}.{key}": tensor for key, tensor in tensors.items() if key != "up.bias"}
    record = write.write_artifact(
        job,
        model,
        base,
        request,
        pieces_of(model),
        dict(model.manifest.modules) if model.manifest else {},
        max_shard_bytes=request["max_shard_bytes"],
        factors=factors,
        ordered={name: {"form": work.targets[name].form, "rank": rank} for name, rank in ranks.items()},
    )
    report.warnings += write.verify(job.folder, model)
    table = artifact.tensor_table(job.folder, record, factors=True)
    there = weights.from_infos(str(job.folder), table)
    for key, tensor in computed.items():
        if key not in table or not torch.equal(tensor, there.read(key)):
            raise write.differs(job.folder, f"the factor `{key}` is not what was written")
    report.data["size"]["after"]["bytes"] = record.weight_bytes
    report.tables[-1] = size_table(report.data["size"])
    report.notes.append(f"cut it to any budget: `peftc truncate {job.output} --ratio 0.5 -o small`")
    write.finish(job, record, report, work.device)
    return report


def _means(work: Factoring, name: str, rank: int) -> dict[str, Tensor]:
    """Return what the bias of any rank is corrected by, float64, or nothing for a module whose bias stays.

    Returns:
        ``weight_mean`` (out,), the mean of the outputs without the bias, and ``down_mean`` (rank, columns), that of
        what the rows of ``down`` make of the same inputs; a spatial kernel meets every column with other pixels.
    """
    factors, target, known = work.kept(name, rank)[0], work.targets[name], work.factorize.statistics
    if known is None or "up.bias" not in factors:
        return {}
    form, mean = known.of(name, work.device).seen_as(target.form)
    weight = lowrank.matrix(spectra.weight_of(work.model, target, work.device), form)
    inputs = mean.view(-1, target.shape[3]) if target.form == "spatial" else mean[:, None]  # (in kh, kw) or (in, 1)
    down = factors["down.weight"].to(work.device).double().flatten(1)
    return {"weight_mean": (weight.double() @ mean).cpu(), "down_mean": (down @ inputs).cpu()}


def report_on(work: Factoring, cuts: Mapping[str, Mapping[str, Any]]) -> Report:
    """Say up to which rank each module can be cut, and what the folder takes."""
    targets, ranks = work.targets, every_rank(work.targets)
    rows = [tables.module(targets[name], None, cuts.get(name, {}), "kept with all ranks") for name in targets]
    added = 0
    for row, (name, target) in zip(rows, targets.items(), strict=True):
        row["stored_rank"] = ranks[name]
        added += target.cost(ranks[name], "entries") * tables.entry_bytes(work, name)
        added += 8 * (allocate.max_rank(target.shape, target.form) + 1)  # of the losses
    lines = [cells for cells, _ in tables.by_kind(rows, "stored_rank")]
    table = Table("ordered factors", ["module", "count", "shape", "form", "up to rank"], lines)
    change, ratio = {"parameters": 0, "macs": 0, "bytes": added}, {"asked": "--keep-all-ranks", "eligible": 1.0}
    shown = [table, tables.dense_table([], work.reasons)]
    report = tables.base_report("decompose", work, rows, shown, change, ratio)
    report.notes.insert(
        0,
        f"{sum(map(bool, ranks.values()))} of {len(ranks)} eligible modules can be cut to any rank that makes them "
        "smaller; until then they keep their weights",
    )
    return report


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ordered:
    """The ordered factors of one module, windows on their file.

    Attributes:
        tensors: ``losses`` (k + 1,), squared errors at ranks 0 to the full one, float64; beside them, where factors
            make the module smaller, ``up.weight`` and ``down.weight`` as the module of `nn.lowrank.build` holds them,
            and where the bias makes up for the mean of what a rank loses ``weight_mean`` and ``down_mean``.
        bias: (out,) of the dense module, or None.
    """

    tensors: Mapping[str, Tensor]
    bias: Tensor | None = None

    @property
    def losses(self) -> Tensor:
        """Squared errors (k + 1,) at ranks 0 to k."""
        return self.tensors["losses"]

    def error(self, rank: int) -> float:
        """Return the error at ``rank``, relative to the module's norm, as the method measures both."""
        return float((self.losses[rank] / self.losses[0]).sqrt()) if self.losses[0] else 0.0

    def kept(self, rank: int) -> Kept:
        """Return the factors of the ``rank`` most important components, windows, and the bias that goes with them."""
        cut = {"up.weight": self.tensors["up.weight"][:, :rank], "down.weight": self.tensors["down.weight"][:rank]}
        if self.bias is not None and MEANS[0] in self.tensors:
            up = cut["up.weight"].double()
            up = up.flatten(2) if up.ndim > 2 else up[:, :, None]  # (out, rank, columns)
            made = torch.einsum("orc,rc->o", up, self.tensors["down_mean"][:rank])
            lost = self.tensors["weight_mean"] - made
            cut["up.bias"] = (self.bias.detach().double() + lost).to(self.bias.dtype)
        return cut, {name: piece(tensor) for name, tensor in cut.items()}


def refuse_unordered(model: Model) -> Manifest:
    """Return the manifest of an artifact with ordered factors; ArtifactError where there is none of them."""
    if model.manifest is None:
        raise ArtifactError(f"`{model.name}` is a model, not an artifact with factors of every rank", hint=MAKE)
    if not model.manifest.ordered:
        why = "it was not written with `--keep-all-ranks`"
        raise ArtifactError(f"`{model.folder}` holds no factors of every rank", why=why, hint=MAKE)
    return model.manifest


def request_of(record: Manifest) -> dict[str, Any]:
    """Return the request that kept all ranks."""
    return next(step["request"] for step in reversed(record.steps) if step["request"].get("keep_all_ranks"))


def ordered_targets(model: Model, record: Manifest) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the modules with stored factors, in order, and why others stay dense; ArtifactError where one differs."""
    asked = {"conv_method": "spatial", **request_of(record)}
    patterns = {name: asked.get(name, ()) for name in ("include", "skip")}
    found, reasons = find_targets(model, conv_method=asked["conv_method"], **patterns)
    for name, entry in record.ordered.items():
        target = found.get(name)
        there = target and (target.form, allocate.break_even_rank(target.shape, target.form))
        if there != (entry["form"], entry["rank"]):
            what = f"`{model.folder}` holds factors of `{name}` as `{entry['form']}` up to rank {entry['rank']}"
            why = f"in its network that is `{there[0]}` up to rank {there[1]}" if there else "it may not be factored"
            raise ArtifactError(what, why=why, hint=AGAIN)
    reasons |= dict.fromkeys(found.keys() - record.ordered.keys(), "no factors of it are stored")
    return {name: target for name, target in found.items() if name in record.ordered}, reasons


def stored(model: Model, record: Manifest, targets: Mapping[str, Target]) -> dict[str, Ordered]:
    """Return the ordered factors of each module, mapped from their files; ArtifactError where they do not fit it."""
    assert model.folder is not None
    table = artifact.tensor_table(model.folder, record, factors=True)
    needed = {
        name: _shapes(model, target, record.ordered[name]["rank"], corrected=f"{name}.{MEANS[0]}" in table)
        for name, target in targets.items()
    }
    expected = {f"{name}.{key}": shape for name, shapes in needed.items() for key, shape in shapes.items()}
    for key in sorted(expected.keys() | table.keys()):
        there = table[key].shape if key in table else None
        if there != expected.get(key):
            what = f"`{key}` among the factors of `{model.folder}` is {_text(there)}, not {_text(expected.get(key))}"
            raise ArtifactError(what, hint=AGAIN)
    files = weights.from_infos(str(model.folder), table)
    found = {}
    for name, shapes in needed.items():
        module: Any = model.module.get_submodule(name)
        tensors = {key: files.read(f"{name}.{key}") for key in shapes}
        found[name] = Ordered(tensors, getattr(module, "bias", None))
    return found


def _shapes(model: Model, target: Target, rank: int, *, corrected: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is stored of one module."""
    shapes: dict[str, tuple[int, ...]] = {"losses": (allocate.max_rank(target.shape, target.form) + 1,)}
    if rank:
        module = lowrank.build(model.module.get_submodule(target.name), target.form, rank)
        shapes |= {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        bias = shapes.pop("up.bias", None)
        if bias is not None and corrected:
            columns = target.shape[3] if target.form == "spatial" else 1
            shapes |= dict(zip(MEANS, (bias, (rank, columns)), strict=True))
    return shapes


def _text(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
