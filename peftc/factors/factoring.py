"""Carry out a plan on a loaded model: spectra, ranks, factors, surgery; finished parts are kept for a resume."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from peftc import processes, progress
from peftc.calibration import hooks, memory
from peftc.calibration.statistics import Statistics
from peftc.errors import ArtifactError, MethodError, PeftcError
from peftc.factors import joint, ranks, spectra
from peftc.factors.ranks import Losses, Whole, needs_spectra
from peftc.factors.spectra import Factorizer
from peftc.measure import costs
from peftc.methods.spectrum import Solution, Spectrum, Truncation
from peftc.models import write
from peftc.models.families import matches
from peftc.models.inputs import DOES_NOT_RUN
from peftc.models.model import Model
from peftc.models.parts import read_note, save_part
from peftc.models.place import HALF, one_dtype
from peftc.models.weights import pieces_of
from peftc.nn import lowrank, surgery
from peftc.nn.lowrank import Factors
from peftc.nn.surgery import parameters
from peftc.plans.allocate import Use
from peftc.plans.plan import Budget, Plan, Target
from peftc.report import Report, size_table
from peftc.store.artifact import Piece, from_file
from peftc.store.header import read_header
from peftc.store.job import Job
from peftc.store.manifest import Manifest

Kept = tuple[dict[str, Tensor], dict[str, Piece]]  # factors by their names in `nn.lowrank.build`, and as stored
BASIS = 8  # bytes of an entry of a basis, at most


@dataclass
class Factoring:
    """The eligible modules of one model, and what is known about them so far.

    Attributes:
        model: its module is edited in place by `edit`.
        targets: eligible modules.
        factorize: the methods.
        device: where to compute.
        job: where finished parts are kept; None keeps them in memory (analysis, dry runs).
        scratch: folder for the bases of modules that an analysis or a dry run looks at more than once.
        losses: module -> squared errors by rank, of every spectrum that a decision has seen.
    """

    model: Model
    targets: dict[str, Target]
    factorize: Factorizer
    device: torch.device
    job: Job | None = None
    scratch: Path | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def whole(self) -> Whole:
        """Size of the model before anything is changed; fills in how often each module runs."""
        total = parameters(self.model.module)
        try:
            work = costs.work(one_dtype(self.model))
        except (PeftcError, *DOES_NOT_RUN):
            return Whole(total, None)  # no input could be made up for it, or it does not run on meta tensors
        for name, target in self.targets.items():
            uses = [
                Use(self.form_of(each, name), work.positions.get(each, 0), work.between.get(each, 0))
                for each in (name, *target.aliases)
            ]
            self.targets[name] = replace(target, uses=tuple(uses))
        return Whole(total, work.macs)

    def use(self, known: Statistics, reasons: dict[str, str]) -> None:
        """Take statistics; a module without any stays dense."""
        for name in [name for name in self.targets if name not in known]:
            del self.targets[name]
            reasons[name] = known.why_not(name)
        self.factorize = replace(self.factorize, statistics=known)

    def leave_uncalled(self, reasons: dict[str, str], include: Sequence[str]) -> None:
        """Leave modules dense that a forward pass never calls: factors would be multiplied out, or never be used."""
        if self.whole.macs is None:
            return
        for name, target in list(self.targets.items()):
            if not any(use.positions for use in target.uses) and not any(matches(name, each) for each in include):
                del self.targets[name]
                reasons[name] = "never called on a random input: its parent reads the weight itself, or it did not run"

    def decide(
        self, budget: Budget, allocation: str, known: Mapping[str, Losses] | None = None, multiple: int = 1
    ) -> dict[str, int | None]:
        """Return the rank of each eligible module under a budget; spectra that are ``known`` are not computed again."""
        whole = self.whole
        if not needs_spectra(budget, allocation):
            return ranks.decide(self.targets, budget, allocation, self.spectrum, whole, multiple)
        with progress.track("spectra", len(self.targets)) as advance:

            def seen(target: Target) -> Losses:
                found = (known or {}).get(target.name) or self.spectrum(target)
                self.losses[target.name] = found.losses().cpu()
                advance(target.name)
                return found

            return ranks.decide(self.targets, budget, allocation, seen, whole, multiple)

    def losses_of(self, name: str) -> Tensor:
        """Return the squared errors of a module by rank, from its spectrum where they are not known yet."""
        if name not in self.losses:
            self.losses[name] = self.spectrum(self.targets[name]).losses().cpu()
        return self.losses[name]

    def plan(self, ranks: Mapping[str, int | None], reasons: dict[str, str], method: str, asked: str) -> Plan:
        """Return what was decided as a plan, which leads to the same ranks whatever they hung on."""
        forms = {name: target.form for name, target in self.targets.items()}
        plan = Plan(dict(ranks), forms, dict(reasons), method, dict(self.factorize.settings), asked)
        return joint.spelled_out(plan, self.model, self.targets)

    def spectrum(self, target: Target) -> Spectrum:
        """Return a module's decomposition; with a job or a scratch folder, its basis is computed once and kept on disk.

        One that was kept holds no statistics: they are read again where another rung must be climbed.
        """
        if self.job is None and self.scratch is None:
            return self._fresh(target)
        part = self.part(target, "spectrum")
        if not part.is_file():
            self._keep_basis(target, part)
        note = read_note(part)
        assert note is not None

        def again(matrix: Tensor, vectors: bool, rung: str) -> Solution | None:
            return self._fresh(target).rungs[rung](matrix, vectors)

        # clones are aligned as fresh memory is: same kernels, same bits
        read = {name: tensor.clone() for name, tensor in _read(part).items()}
        solution = Solution(read["values"], read.get("up"), read.get("down"), note["rung"], note["exact"])
        weight = lowrank.matrix(spectra.weight_of(self.model, target, self.device), target.form).contiguous()
        found = Spectrum(weight, {rung: functools.partial(again, rung=rung) for rung in note["rungs"]})
        found.resume(solution, note["climbed"])
        return found

    def _fresh(self, target: Target, factorize: Factorizer | None = None) -> Spectrum:
        """Return a module's decomposition from its statistics, where nothing is solved yet."""
        weight = spectra.weight_of(self.model, target, self.device)
        with _named(target.name):
            return (factorize or self.factorize)(weight, target)

    def keep_bases(self, folder: Path) -> None:
        """Keep the basis of every module in a folder from now on, where the disk has room for all of them."""
        sides = [hooks.matrix_shape(target) for target in self.targets.values()]
        if sum(BASIS * min(side) * sum(side) for side in sides) < shutil.disk_usage(folder).free // 2:
            self.scratch = folder

    def _keep_basis(self, target: Target, part: Path) -> None:
        """Solve for the basis of a module and keep it in ``part``."""
        found = self._fresh(target)
        with _named(target.name):
            solution = found.solution
        basis = {"values": solution.values, "up": solution.up, "down": solution.down}
        note = {
            "rung": solution.rung,
            "exact": solution.exact,
            "climbed": list(found.climbed),
            "rungs": list(found.rungs),
        }
        save_part(part, {key: tensor for key, tensor in basis.items() if tensor is not None}, note)
        self._tidy()

    def _tidy(self) -> None:
        """Give back the holes that solving a module left in the heap: over some hundred modules they add up."""
        if self.model.max_memory is not None:
            memory.return_freed()

    def part(self, target: Target, kind: str) -> Path:
        """Return the file in which something finished about a module is kept."""
        folder = self.scratch if self.job is None else self.job.work
        assert folder is not None
        return folder / f"{list(self.targets).index(target.name):05d}-{kind}.safetensors"

    def share_spectra(self) -> None:
        """Of several processes, let each compute and keep the decompositions of its share of the modules."""
        if self.job is None or processes.size() == 1:
            return
        mine = processes.share(list(self.targets))
        with processes.together(), progress.track("spectra", len(mine)) as advance:
            for name in mine:
                if not self.part(self.targets[name], "spectrum").is_file():
                    self.spectrum(self.targets[name])
                advance(name)

    def factor(self, ranks: Mapping[str, int | None]) -> dict[str, dict[str, Any]]:
        """Compute and keep the factors of every module with a rank, each process those of its share.

        Returns:
            error, excess, rung and climbs of each; nothing to any process but the first.
        """
        chosen = {name: rank for name, rank in ranks.items() if rank is not None}
        mine = processes.share(list(chosen))
        with processes.together(), progress.track("factors", len(mine)) as advance:
            for name in mine:
                part = self.part(self.targets[name], "factors")
                if not part.is_file():
                    self.factor_one(self.targets[name], chosen[name], part)
                advance(name)
        notes = {} if processes.rank() else {name: self.part(self.targets[name], "factors") for name in chosen}
        return {name: dict(read_note(part) or {}) for name, part in notes.items()}

    def factor_one(self, target: Target, rank: int, part: Path, factorize: Factorizer | None = None) -> dict[str, Any]:
        """Compute the factors of one module and keep them in ``part``; return what `factor` says of it.

        Args:
            target, rank: of the module.
            part: where the factors go.
            factorize: other statistics than those that the kept spectra stand on.
        """
        by = factorize or self.factorize
        if factorize is None and self.part(target, "spectrum").is_file():
            found = self.spectrum(target)
        else:
            found = self._fresh(target, by)
        with _named(target.name):
            cut: Truncation = found.truncate(rank)
            losses = found.losses()
        del found  # and with it the statistics that it was solved from
        dense = self.model.module.get_submodule(target.name).weight
        if target.members:
            dense = joint.stacked(self.model, target, torch.device("cpu"), dense.dtype)  # type: ignore[union-attr, arg-type]
        named = lowrank.tensors(cut.factors, target.shape, target.form)
        named = {key: tensor.to(dense.dtype).cpu() for key, tensor in named.items()}  # type: ignore[union-attr, arg-type]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in named.values()):
            raise MethodError(f"the factors of `{target.name}` do not fit into {dense.dtype}")  # type: ignore[union-attr]
        error = cut.error if dense.dtype not in HALF else _stored_error(dense, named, target)  # type: ignore[arg-type, union-attr]
        total = float(losses.flatten()[0])
        weighted = (float(losses[rank]) / total) ** 0.5 if total else 0.0
        note = {
            "error": error,
            "loss": weighted,
            "excess": cut.excess,
            "rung": cut.rung,
            "climbed": list(cut.climbed),
            "squared": [float(losses[rank]), total],
        }
        if target.members:
            named = self._by_member(target, cut.factors, named, by)
        elif (bias := self.corrected_bias(target, cut.factors, by)) is not None:
            named = {**named, "up.bias": bias}
        save_part(part, named, note)
        self._tidy()
        return note

    def _by_member(
        self, target: Target, factors: Factors, named: dict[str, Tensor], by: Factorizer
    ) -> dict[str, Tensor]:
        """Return the factors of a group's stack as its members' ``<place>.up.weight`` and one ``down.weight``."""
        parts = {"down.weight": named["down.weight"]}
        ups = zip(named["up.weight"].split(target.outs), factors.up.split(target.outs), strict=True)
        for at, (stored, up) in enumerate(ups):
            parts[f"{at}.up.weight"] = stored.contiguous()
            bias = self.corrected_bias(joint.member(self.model, target, at), Factors(up, factors.down), by)
            if bias is not None:
                parts[f"{at}.up.bias"] = bias
        return parts

    def _bias(self, target: Target) -> Tensor | None:
        """Return the bias that may make up for what factors lose of the mean: the target's own, and nobody else's."""
        owners = [self.model.module.get_submodule(name) for name in target.members or (target.name,)]
        biases = [bias for owner in owners if isinstance(bias := getattr(owner, "bias", None), Tensor)]
        return biases[0] if len(biases) == len(owners) and not target.aliases else None

    def corrected_bias(self, target: Target, factors: Factors, factorize: Factorizer | None = None) -> Tensor | None:
        """Return bias + (W - up down) E[x], or None where nothing is corrected."""
        bias, by = self._bias(target), factorize or self.factorize
        if bias is None or "second_moment" not in by.needs or not by.correct_bias or by.statistics is None:
            return None
        found = by.statistics.of(target.name, self.device)
        if found.mean is None:
            return None
        weight = spectra.weight_of(self.model, target, self.device)
        spatial = target.form == "spatial"  # every column of the kernel meets columns of its own
        stored = self.model.module.get_submodule(target.name).weight.dtype  # its rounding is lost as well
        up, down = (each.to(stored).double() for each in (factors.up, factors.down))  # type: ignore[arg-type, call-overload]
        named = lowrank.tensors(Factors(up, down), target.shape, target.form)
        error = weight.double() - lowrank.dense_weight(named, target.shape, target.form)
        mean: Any = found.patch if spatial else found.mean
        lost = lowrank.matrix(error, "channel" if spatial else target.form) @ mean
        return (bias.detach().double().cpu() + lost.cpu()).to(bias.dtype)

    def kept(self, name: str, _rank: int) -> Kept:
        """Return the factors of a module that `factor` kept, and its bias where it was corrected, mapped."""
        part = self.part(self.targets[name], "factors")
        return _read(part), {key: from_file(info) for key, info in read_header(part)[0].items()}

    def edit(
        self, ranks: Mapping[str, int | None], kept: Callable[[str, int], Kept] | None = None
    ) -> tuple[dict[str, Piece], dict[str, dict[str, Any]]]:
        """Put factors into the network; return all tensors to be stored and the manifest's module entries.

        Args:
            ranks: module -> rank, None to leave it as it is.
            kept: (module, rank) -> its factors, and a new ``up.bias`` if any; those of `factor` when None.
        """
        network = self.model.module
        pieces = pieces_of(self.model)
        modules = dict(self.model.manifest.modules) if self.model.manifest else {}
        for name, rank in ranks.items():
            if rank is None:
                continue
            tensors, parts = (kept or self.kept)(name, rank)
            if self.targets[name].members:
                modules |= joint.edit(network, self.targets[name], rank, tensors, parts, pieces)
                continue
            factors = {key: nn.Parameter(tensor) for key, tensor in tensors.items()}
            for each in (name, *self.targets[name].aliases):
                form = self.form_of(each, name)
                old = network.get_submodule(each)
                new = lowrank.build(old, form, rank)
                surgery.replace(network, old, new)
                surgery.place(new, {"up.bias": getattr(old, "bias", None), **factors})
                if f"{each}.bias" in pieces:
                    pieces[f"{each}.up.bias"] = pieces[f"{each}.bias"]
                pieces.update({f"{each}.{key}": part for key, part in parts.items()})
                modules[each] = {"form": form, "rank": rank}
        return {name: pieces[name] for name in surgery.stored_names(network)}, modules

    def form_of(self, each: str, name: str) -> str:
        """Return the form of a module; one tied to it may be an embedding where it is an output head."""
        if isinstance(self.model.module.get_submodule(each), nn.Embedding):
            return "embedding"
        return "linear" if self.targets[name].form == "embedding" else self.targets[name].form


def _stored_error(dense: Tensor, named: dict[str, Tensor], target: Target) -> float:
    """Return the relative error of factors as stored, after rounding to half precision."""
    product = lowrank.dense_weight({key: tensor.float() for key, tensor in named.items()}, target.shape, target.form)
    total = torch.linalg.vector_norm(dense.detach(), dtype=torch.float32)
    return float(torch.linalg.vector_norm(dense.detach().float() - product) / total) if total else 0.0


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which module a failure of linear algebra was about."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise MethodError(
            f"cannot decompose `{name}`", why=str(error), hint=f"leave it dense: `--skip {name}`"
        ) from error


def _read(part: Path) -> dict[str, Tensor]:
    with safe_open(part, "pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def carry_out(
    report: Report,
    work: Factoring,
    ranks: Mapping[str, int | None],
    base: dict[str, Any],
    request: dict[str, Any],
    budget: Budget | None,
    *,
    max_shard_bytes: int,
    kept: Callable[[str, int], Kept] | None = None,
) -> None:
    """Put factors into the network, write it, reload it, and complete the report: the first process does.

    Args:
        report: of the plan.
        work: with a job.
        ranks: of each module.
        base, request, budget: what the manifest records.
        max_shard_bytes: per weight file.
        kept: where the factors are; `Factoring.factor` made them when None.
    """
    if processes.rank():
        return
    assert work.job is not None
    pieces, modules = work.edit(ranks, kept)
    record = write.write_artifact(work.job, work.model, base, request, pieces, modules, max_shard_bytes=max_shard_bytes)
    report.warnings += write.verify(work.job.folder, work.model)
    _check_size(report, record, work.model, budget)
    write.finish(work.job, record, report, work.device)


def _check_size(report: Report, record: Manifest, model: Model, budget: Budget | None) -> None:
    """Complete the sizes with what was written and measured; refuse to report a count that the folder does not have."""
    after = report.data["size"]["after"]
    if record.parameters != after["parameters"]:
        raise ArtifactError(
            f"the artifact holds {record.parameters:,} parameters, the plan said {after['parameters']:,}",
            hint="this is a bug in peftc: please report it",
        )
    if after["macs"] is not None:
        after["macs"] = costs.work(one_dtype(model)).macs
        if budget is not None and budget.kind == "target-macs" and after["macs"] > budget.amount:
            report.warnings.append(f"the result takes {after['macs']:,} multiply-adds, not {budget.amount:,} as asked")
    after["bytes"] = record.weight_bytes
    report.tables[-1] = size_table(report.data["size"])
