"""Tuned model - its base > a low-rank update per module > a delta on the base > Artifact > Report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import PlanError
from peftc.methods.difference import low_rank_difference
from peftc.models import adapting, delta, write
from peftc.models.load import load
from peftc.models.model import Model, detached
from peftc.models.place import place_of
from peftc.models.weights import piece
from peftc.nn import surgery
from peftc.nn.adapted import adapted_modules
from peftc.pages import brief
from peftc.report import Report, Table
from peftc.store.source import Source
from peftc.training import imitation, student

LOST = 0.5  # of a module's change: below it the update says little of what was learnt


def extract_lora(
    model: str | Path | Source | nn.Module | Model,
    *,
    against: str | Path | Source | nn.Module | Model,
    output_dir: str | Path | None = None,
    rank: int = 8,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    overwrite: bool = False,
) -> Report:
    """Write the difference between a tuned model and its base as a delta of low rank on the base.

    Args:
        model: the tuned one; a live network is not changed.
        against: the base, of the same architecture; its head may have other classes.
        output_dir: the artifact's folder; ``<model>-extract-lora`` when None.
        rank: of the updates of linear modules and convolutions; tensors of other modules that differ are kept whole.
        include, skip: patterns of modules, as for `finetune`.
        overwrite: replace another artifact at ``output_dir``.

    Raises:
        PeftcError: with the cause; nothing is written then.
    """
    tuned, base = load(model), load(against)
    theirs, mine = surgery.tensors_of(base.module), surgery.tensors_of(tuned.module)
    _refuse_strangers(tuned, base)
    settings = {"rank": rank, "alpha": float(rank)}
    adapted = replace(tuned, module=_copied(base, tuned))
    placed = adapting.place(adapted, "lora", settings, include=include, skip=skip)
    report = Report("extract-lora", notes=[*tuned.notes, *base.notes])
    same = []
    rows: list[list[Any]] = []
    for name, module in adapted_modules(adapted.module).items():
        before, after = theirs[f"{name}.weight"], mine[f"{name}.weight"]
        if torch.equal(before, after):
            surgery.replace(adapted.module, module, module.base)
            del placed.adapters[name]
            same.append(name)
            continue
        update: Any = module.update
        up, down, energy = low_rank_difference(after.float() - before.float(), rank)
        update.up.data, update.down.data = _padded(up, rank, 1), _padded(down, rank, 0)
        rows.append([name, f"{energy:.4f}"])
    if all(name in theirs and torch.equal(mine[name], theirs[name]) for name in mine):
        raise PlanError(f"`{tuned.name}` and `{base.name}` do not differ", hint="name the tuned model first")
    _tell(report, rows, same, rank)
    request = {
        "command": "extract-lora",
        "rank": rank,
        "include": list(include),
        "skip": list(skip),
        "delta": True,
        "tuned": write.base_record(tuned).get("files") if tuned.manifest is None else tuned.manifest.id,
    }
    output = write.output_folder(output_dir, tuned, "extract-lora")
    stored = replace(
        base, config=tuned.config, labels=tuned.labels, base={**base.base, "architecture": tuned.architecture}
    )
    with write.writing(stored, output, request, overwrite=overwrite) as (job, record):
        if job.done:
            return write.already(job, "extract-lora")
        network = student.as_stored(adapted.module, tuned.module, placed.adapters)
        names, there = _changed(network, mine, theirs, placed.adapters)
        found = surgery.tensors_of(network)
        written = write.write_artifact(
            job,
            replace(stored, module=network),
            record,
            request,
            {name: piece(found[name]) for name in names},
            imitation.factored(base),
            max_shard_bytes=5 * 10**9,
            adapters=placed.adapters,
            delta=delta.reference(base, record, there),
        )
        expected = load(Source(str(job.folder), allow_code=True))
        write.close(job, written, report, expected, place_of(network))
    asked = f"what `{tuned.name}` changed in `{base.name}`, as updates of rank {rank}"
    brief.tell(report, asked, then=brief.command("merge", report.artifact, "-o", "whole"))
    return report


def _refuse_strangers(tuned: Model, base: Model) -> None:
    """Refuse two models that are not of one architecture, heads apart.

    Raises:
        PlanError: with the first tensors that only one has.
    """
    shapes = [{n: t.shape for n, t in surgery.tensors_of(each.module).items()} for each in (tuned, base)]
    common = sum(shapes[1].get(name) == shape for name, shape in shapes[0].items())
    other = sorted(name for name in shapes[0].keys() ^ shapes[1].keys())
    if common * 2 < len(shapes[0]) or len(other) > 8:
        raise PlanError(
            f"`{tuned.name}` and `{base.name}` are not of one architecture",
            why=f"{common} of {len(shapes[0])} tensors have the same name and shape"
            + (f"; only one has {', '.join(f'`{name}`' for name in other[:3])}" if other else ""),
            hint="name the model that the tuned one was made from: `--against MODEL`",
        )


def _copied(base: Model, tuned: Model) -> nn.Module:
    """Return a copy of the tuned network that holds the weights of the base where it has them."""
    network = detached(tuned.module)
    theirs = surgery.tensors_of(base.module)
    for names in surgery.stored_names(network).values():
        own = surgery.tensors_of(network)[names[0]]
        if names[0] in theirs and theirs[names[0]].shape == own.shape:
            surgery.assign(network, names, theirs[names[0]])
    return network


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Return a factor with zeros where the matrix has a smaller rank than asked for."""
    missing = rank - factor.shape[axis]
    if not missing:
        return factor.contiguous()
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _changed(
    network: nn.Module, mine: dict[str, Tensor], theirs: dict[str, Tensor], adapters: dict[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """Give what is not adapted and differs its tuned value; return what the delta holds, and other names beneath."""
    names, there = [], {}
    for name, group in surgery.stored_names(network).items():
        was = student.before_updates(name, adapters)
        weight_of_update = was != name and name.endswith(".base.weight")
        if ".update." in name:
            names.append(name)
        elif not weight_of_update and (was not in theirs or not torch.equal(mine[was], theirs[was])):
            surgery.assign(network, group, mine[was])
            names.append(name)
        elif was != name:
            there[name] = was
    return names, there


def _tell(report: Report, rows: list[list[Any]], same: list[str], rank: int) -> None:
    weak = [name for name, energy in rows if float(energy) < LOST]
    report.data["energy"] = {name: float(energy) for name, energy in rows}
    report.tables.append(Table(f"share of the squared change kept at rank {rank}", ["module", "kept"], rows))
    if same:
        report.notes.append(f"{len(same)} modules did not change and have no update")
    if weak:
        report.warnings.append(
            f"rank {rank} keeps less than half of the change of {len(weak)} modules, as `{weak[0]}`: raise `--rank`"
        )
