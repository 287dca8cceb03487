"""Carry out a plan on a loaded model: spectra, ranks, factors, surgery; finished parts are kept for a resume."""

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc import processes, progress
from peftc.calibration import collection, memory, statistics
from peftc.calibration.collection import Statistics
from peftc.calibration.prepared import Prepared
from peftc.errors import ArtifactError, MethodError, PeftcError
from peftc.factors import joint, ranks, spectra
from peftc.factors.ranks import Ranks, Whole
from peftc.factors.spectra import Factorizer
from peftc.measure import costs
from peftc.methods.spectrum import Rungs, Solution, Spectrum
from peftc.models import write
from peftc.models.families import matches
from peftc.models.inputs import DOES_NOT_RUN
from peftc.models.model import Model
from peftc.models.place import HALF, one_dtype
from peftc.models.weights import pieces_of, read_note, save_part
from peftc.nn import lowrank, surgery
from peftc.nn.lowrank import Factors
from peftc.nn.surgery import parameters
from peftc.plans.allocate import Use
from peftc.plans.plan import Aim, Plan, Target
from peftc.report import Report, size_table
from peftc.store.artifact import Piece, from_file
from peftc.store.header import read_header
from peftc.store.job import Job

Kept = tuple[dict[str, Tensor], dict[str, Piece]]  # factors by their names in `nn.lowrank.build`, and as stored
BASIS = 8  # bytes of an entry of a basis, at most
CPU = torch.device("cpu")


@dataclass
class Factoring:
    """The eligible modules of one model, and what is known about them so far.

    Attributes:
        model: its module is edited in place by `write`.
        targets: eligible modules.
        factorize: the methods.
        device: where to compute.
        reasons: module -> why it stays dense, of the others.
        losses: module -> (k + 1,) squared errors at ranks 0 to k, of those that a decision has looked at.
        job: where finished parts are kept; None keeps them in memory (analysis, dry runs).
        scratch: folder for the bases of modules that an analysis or a dry run looks at more than once.
        cut: (module, rank) -> its factors, and a new ``up.bias`` if any; those of `factor` when None.
    """

    model: Model
    targets: dict[str, Target]
    factorize: Factorizer
    device: torch.device
    reasons: dict[str, str] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    job: Job | None = None
    scratch: Path | None = None
    cut: Callable[[str, int], Kept] | None = None

    # -- which modules, and at which ranks ----------------------------------------------------------------------------

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

    def calibrate(self, source: Prepared | Statistics, folder: Path, *, planned: bool = False) -> None:
        """Take statistics, of a group's members one by one, collected in ``folder`` where they are not there yet."""
        known = collection.obtain(source, joint.one_by_one(self.model, self.targets), self.factorize.needs, folder)
        joint.take_apart(self.model, self.targets, known, planned=planned)
        self.use(known)
        memory.return_freed(self.model)

    def use(self, known: Statistics) -> None:
        """Take statistics; a module without any stays dense."""
        for name in [name for name in self.targets if name not in known]:
            del self.targets[name]
            self.reasons[name] = known.why_not(name)
        self.factorize = replace(self.factorize, statistics=known)

    def leave_uncalled(self, include: Sequence[str]) -> None:
        """Leave modules dense that a forward pass never calls: factors would be multiplied out, or never be used."""
        if self.whole.macs is None:
            return
        for name, target in list(self.targets.items()):
            if not any(use.positions for use in target.uses) and not any(matches(name, each) for each in include):
                del self.targets[name]
                why = "never called on a random input: its parent reads the weight itself, or it did not run"
                self.reasons[name] = why

    def decide(self, aim: Aim) -> dict[str, int | None]:
        """Return the rank of each eligible module under a budget; losses that are known are not computed again."""
        if not aim.needs_spectra:
            return ranks.decide(self.targets, aim, self.losses_of, self.whole)
        whole = self.whole
        with progress.track("spectra", len(self.targets)) as advance:

            def seen(name: str) -> Tensor:
                found = self.losses_of(name)
                advance(name)
                return found

            return ranks.decide(self.targets, aim, seen, whole)

    def losses_of(self, name: str) -> Tensor:
        """Return the squared errors of a module by rank, from its spectrum where they are not known yet."""
        if name not in self.losses:
            self.losses[name] = self.spectrum(self.targets[name]).losses().cpu()
        return self.losses[name]

    def plan(self, ranks: Ranks, asked: str) -> Plan:
        """Return what was decided as a plan, which leads to the same ranks whatever they hung on."""
        forms, by = {name: target.form for name, target in self.targets.items()}, self.factorize
        plan = Plan(dict(ranks), forms, dict(self.reasons), by.name, dict(by.settings), asked)
        return joint.spelled_out(plan, self.model, self.targets)

    # -- spectra and factors ------------------------------------------------------------------------------------------

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
        basis = {name: tensor.clone() for name, tensor in load_file(part).items()}
        solution = Solution(basis["values"], basis.get("up"), basis.get("down"), note["rung"], note["exact"])
        weight = lowrank.matrix(spectra.weight_of(self.model, target, self.device), target.form).contiguous()
        rungs: Rungs = {rung: functools.partial(again, rung=rung) for rung in note["rungs"]}
        return Spectrum(weight, rungs, solution, note["climbed"])

    def _fresh(self, target: Target, factorize: Factorizer | None = None) -> Spectrum:
        """Return a module's decomposition from its statistics, where nothing is solved yet."""
        weight = spectra.weight_of(self.model, target, self.device)
        with _named(target.name):
            return (factorize or self.factorize)(weight, target)

    def keep_bases(self, folder: Path) -> None:
        """Keep the basis of every module in a folder from now on, where the disk has room for all of them."""
        sides = [statistics.matrix_shape(target) for target in self.targets.values()]
        if sum(BASIS * min(side) * sum(side) for side in sides) < shutil.disk_usage(folder).free // 2:
            self.scratch = folder

    def _keep_basis(self, target: Target, part: Path) -> None:
        found = self._fresh(target)
        with _named(target.name):
            solution = found.solution
        basis = {"values": solution.values, "up": solution.up, "down": solution.down}
        note = {"rung": solution.rung, "exact": solution.exact, "climbed": found.climbed, "rungs": list(found.rungs)}
        save_part(part, {key: tensor for key, tensor in basis.items() if tensor is not None}, note)
        memory.return_freed(self.model)

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

    def factor(self, ranks: Ranks) -> dict[str, dict[str, Any]]:
        """Compute and keep the factors of every module with a rank, each process those of its share.

        Returns:
            error, excess, rung and climbs of each; nothing to any process but the first.
        """
        chosen = {name: rank for name, rank in ranks.items() if rank is not None}
        parts = {name: self.part(self.targets[name], "factors") for name in chosen}
        mine = processes.share(list(chosen))
        with processes.together(), progress.track("factors", len(mine)) as advance:
            for name in mine:
                if not parts[name].is_file():
                    self.factor_one(self.targets[name], chosen[name], parts[name])
                advance(name)
        return {} if processes.rank() else {name: dict(read_note(part) or {}) for name, part in parts.items()}

    def factor_one(self, target: Target, rank: int, part: Path, factorize: Factorizer | None = None) -> dict[str, Any]:
        """Keep the factors of one module in ``part``, and return their figures; ``factorize`` has newer statistics."""
        by = factorize or self.factorize
        solved = factorize is None and self.part(target, "spectrum").is_file()
        found = self.spectrum(target) if solved else self._fresh(target, by)
        with _named(target.name):
            cut, losses = found.truncate(rank), found.losses()
        del found  # and with it the statistics that it was solved from
        dense: Any = self.model.module.get_submodule(target.name).weight
        if target.members:
            dense = joint.stacked(self.model, target, CPU, dense.dtype)
        named = lowrank.tensors(cut.factors, target.shape, target.form)
        named = {key: tensor.to(dense.dtype).cpu() for key, tensor in named.items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in named.values()):
            raise MethodError(f"the factors of `{target.name}` do not fit into {dense.dtype}")
        lost, total = float(losses[rank]), float(losses[0])
        note = {
            "error": _stored_error(dense, named, target) if dense.dtype in HALF else cut.error,
            "loss": (lost / total) ** 0.5 if total else 0.0,
            "excess": cut.excess,
            "rung": cut.rung,
            "climbed": list(cut.climbed),
            "squared": [lost, total],
        }
        if target.members:
            named = self._by_member(target, cut.factors, named, by)
        elif (bias := self.corrected_bias(target, cut.factors, by)) is not None:
            named["up.bias"] = bias
        save_part(part, named, note)
        memory.return_freed(self.model)
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

    def corrected_bias(self, target: Target, factors: Factors, factorize: Factorizer | None = None) -> Tensor | None:
        """Return bias + (W - up down) E[x], or None where nothing is corrected: the bias must be the module's alone."""
        module: Any = self.model.module.get_submodule(target.name)
        bias, by = getattr(module, "bias", None), factorize or self.factorize
        if bias is None or target.aliases:
            return None
        if "second_moment" not in by.needs or not by.correct_bias or by.statistics is None:
            return None
        found = by.statistics.of(target.name, self.device)
        if found.mean is None:
            return None
        weight = spectra.weight_of(self.model, target, self.device).double()
        up, down = (each.to(module.weight.dtype).double() for each in (factors.up, factors.down))  # as rounded
        named = lowrank.tensors(Factors(up, down), target.shape, target.form)
        error = weight - lowrank.dense_weight(named, target.shape, target.form)
        form, mean = found.seen_as(target.form)
        lost = lowrank.matrix(error, form) @ mean
        return (bias.detach().double().cpu() + lost.cpu()).to(bias.dtype)

    # -- surgery ------------------------------------------------------------------------------------------------------

    def kept(self, name: str, rank: int) -> Kept:
        """Return the factors of a module, and its bias where it was corrected, mapped."""
        if self.cut is not None:
            return self.cut(name, rank)
        part = self.part(self.targets[name], "factors")
        return load_file(part), {key: from_file(info) for key, info in read_header(part)[0].items()}

    def write(self, report: Report, ranks: Ranks, base: dict[str, Any], request: dict[str, Any]) -> None:
        """Put factors into the network, write it, reload it, and complete the plan's report: the first process does.

        Args:
            report, ranks: of the plan.
            base, request: what the manifest records.
        """
        if processes.rank():
            return
        assert self.job is not None
        pieces, modules = self._edit(ranks)
        size = request["max_shard_bytes"]
        record = write.write_artifact(self.job, self.model, base, request, pieces, modules, max_shard_bytes=size)
        report.warnings += write.verify(self.job.folder, self.model)
        after = report.data["size"]["after"]
        if record.parameters != after["parameters"]:
            what = f"the artifact holds {record.parameters:,} parameters, the plan said {after['parameters']:,}"
            raise ArtifactError(what, hint="this is a bug in peftc: please report it")
        if after["macs"] is not None:
            after["macs"] = costs.work(one_dtype(self.model)).macs
            asked = int((request["budget"] or {}).get("target-macs", after["macs"]))
            if after["macs"] > asked:
                report.warnings.append(f"the result takes {after['macs']:,} multiply-adds, not {asked:,} as asked")
        after["bytes"] = record.weight_bytes
        report.tables[-1] = size_table(report.data["size"])
        write.finish(self.job, record, report, self.device)

    def _edit(self, ranks: Ranks) -> tuple[dict[str, Piece], dict[str, dict[str, Any]]]:
        """Put factors into the network; return all tensors to be stored and the manifest's module entries."""
        network = self.model.module
        pieces = pieces_of(self.model)
        modules = dict(self.model.manifest.modules) if self.model.manifest else {}
        for name, rank in ranks.items():
            if rank is None:
                continue
            target, (tensors, parts) = self.targets[name], self.kept(name, rank)
            if target.members:
                modules |= joint.edit(network, target, rank, tensors, parts, pieces)
                continue
            factors = {key: nn.Parameter(tensor) for key, tensor in tensors.items()}
            for each in (name, *target.aliases):
                form = self.form_of(each, name)
                joint.put(network, each, form, rank, factors)
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
        why = str(error)
        raise MethodError(f"cannot decompose `{name}`", why=why, hint=f"leave it dense: `--skip {name}`") from error
