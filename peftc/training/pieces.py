"""Checkpoints in pieces, by `torch.distributed.checkpoint`: each process writes and reads its share of the tensors.

One is a folder whose name ends in its step. It is written beside, by all, and renamed by the first when all are done;
then earlier ones go. However many processes read it again, cut or whole, each finds its share.
"""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoints
from torch import Tensor

from peftc import processes
from peftc.store import documents

STEM, TOLD = "checkpoint-", "told.json"
KINDS = ("module", "average", "best")  # of tensors by name
TOLD_OF = ("step", "outcome", "mark")  # what is no tensor


def newest(folder: Path) -> Path | None:
    """Return the last checkpoint in a folder that is whole."""
    found = [path for path in folder.glob(f"{STEM}*") if path.name.removeprefix(STEM).isdecimal()]
    return max(found, key=lambda path: int(path.name.removeprefix(STEM)), default=None)


def drop(folder: Path, but: Path | None = None) -> None:
    """Remove all checkpoints but one, and what a kill left of others."""
    for path in folder.glob(f"{STEM}*"):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Like:
    """What the tensors of a training look like in this process.

    Attributes:
        changing: those that a step may change, by name.
        learning: parameters in the optimizer's order.
    """

    changing: Mapping[str, Tensor]
    learning: Sequence[Tensor]

    def place(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return where to read a tensor of a checkpoint into: a piece where the one that it belongs to is one."""
        kind, _, of = name.partition("/")
        there = self.learning[int(of.partition("/")[0])] if kind == "optimizer" else self.changing[of]
        if there.shape == shape:
            return torch.zeros_like(there, dtype=dtype, requires_grad=False)
        return torch.zeros(shape, dtype=dtype)


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; all processes do it at once.

    Args:
        folder: for checkpoints.
        state: ``step``, ``outcome`` and ``mark``, tensors by name as ``module``, ``average`` and ``best``, and
            ``optimizer``.
    """
    tensors = {f"{kind}/{name}": each for kind in KINDS for name, each in state[kind].items()}
    for of, own in state["optimizer"]["state"].items():
        tensors |= {f"optimizer/{of}/{name}": each for name, each in own.items() if isinstance(each, Tensor)}
    target = folder / f"{STEM}{state['step']}"
    unfinished = target.with_name(f"{target.name}.partial")
    with processes.together():
        if not processes.rank():
            for leftover in (unfinished, target):
                shutil.rmtree(leftover, ignore_errors=True)
            unfinished.mkdir()
    with processes.together():
        checkpoints.save(tensors, storage_writer=checkpoints.FileSystemWriter(unfinished))
    with processes.together():
        if not processes.rank():
            documents.write_whole(unfinished / TOLD, json.dumps({each: state[each] for each in TOLD_OF}))
            unfinished.rename(target)
            documents.sync(folder)
            drop(folder, target)


def read(path: Path, like: Like) -> dict[str, Any]:
    """Return what `save` was given, the optimizer's settings apart; all processes do it at once."""
    reader = checkpoints.FileSystemReader(path)
    there = reader.read_metadata().state_dict_metadata
    found: dict[str, Any] = {name: like.place(name, each.size, each.properties.dtype) for name, each in there.items()}
    with warnings.catch_warnings():  # of a process on its own, that it is one
        warnings.simplefilter("ignore")
        checkpoints.load(found, storage_reader=reader)
    state = json.loads((path / TOLD).read_text(encoding="utf-8"))
    state["outcome"]["scores"] = [tuple(each) for each in state["outcome"]["scores"]]
    for kind in KINDS:
        state[kind] = {name.partition("/")[2]: each for name, each in found.items() if name.startswith(f"{kind}/")}
    own: dict[int, dict[str, Tensor]] = {}
    for name, each in found.items():
        if name.startswith("optimizer/"):
            _, of, key = name.split("/", 2)
            own.setdefault(int(of), {})[key] = each
    return state | {"optimizer": {"state": own}}
