"""Which modules vLLM computes as one, as q, k and v, and where each lies in the tensors that they then have together.

`peftc.runtimes.vllm` makes and loads tensors by it. It needs neither torch nor vLLM.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from peftc.errors import SourceError

Span = tuple[int, int]  # where it begins, and how much it is
HELD = ("linear", "embedding")
DENSE = "multiply the factors out: `peftc export FOLDER --format hf --dense`"


@dataclass(frozen=True)
class Shard:
    """One of the modules that are computed as one.

    Attributes:
        name: of the module.
        rank: of its factors; None where it is dense.
        first: its place among them; where it shares a down factor, the place of the one whose factor that is.
    """

    name: str
    rank: int | None
    first: int


def refuse_unheld(told: Mapping[str, Any]) -> None:
    """Refuse what `quantization.entry` can say and vLLM does not hold (SourceError)."""
    modules: Mapping[str, Mapping[str, Any]] = told["modules"]
    if skipped := next(iter(told.get("skipped", {})), None):
        what = f"vLLM builds every layer, and `{skipped}` of this folder was dropped in its place"
        raise SourceError(what, hint="load it with `peftc.load` or with transformers")
    if other := next((name for name, edit in modules.items() if edit["form"] not in HELD), None):
        what = f"vLLM does not hold the factors of `{other}`"
        raise SourceError(what, why=f"their form is `{modules[other]['form']}`", hint=DENSE)
    if expert := next((name for name in modules if re.search(r"(^|\.)experts\.", name)), None):
        raise SourceError(f"vLLM does not hold the factors of the expert `{expert}`", hint=DENSE)


def shards(names: Sequence[str], modules: Mapping[str, Mapping[str, Any]]) -> list[Shard]:
    """Return the modules of these names (SourceError: one shares the down factor of a module that is not among them).

    Args:
        modules: as `quantization.entry` tells them; what they do not name is dense.
    """
    found = []
    for place, name in enumerate(names):
        edit = modules.get(name)
        leader = name if edit is None else edit.get("shares", name)
        if leader not in names:
            what = f"`{name}` shares the down factor of `{leader}`, which vLLM computes apart from it"
            raise SourceError(what, hint=f"{DENSE}, or factor the model without `--joint`")
        found.append(Shard(name, edit["rank"] if edit else None, names.index(leader) if edit else place))
    return found


def spans(found: Sequence[Shard], outs: Sequence[int]) -> dict[str, list[Span]]:
    """Return for each kind of tensor where each shard lies in the one that holds it for all of them.

    Args:
        outs: how many outputs each shard has.

    Returns:
        ``down`` (ranks, in), ``weight`` (outs of dense shards, in), ``bias`` (outs), in rows; and ``up``, in numbers,
        for ranks differ. Shards that share a down factor lie in one place; what a shard does not have has no length.
    """
    pairs = list(zip(found, outs, strict=True))
    lengths = {
        "down": [(shard.rank or 0) if shard.first == place else 0 for place, shard in enumerate(found)],
        "up": [out * (shard.rank or 0) for shard, out in pairs],
        "weight": [0 if shard.rank else out for shard, out in pairs],
        "bias": list(outs),
    }
    laid = {kind: list(zip(accumulate(each, initial=0), each, strict=False)) for kind, each in lengths.items()}
    laid["down"] = [laid["down"][shard.first] for shard in found]
    return laid


def held(found: Sequence[Shard], *, bias: bool) -> set[tuple[str, int]]:
    """Return kind and place of each tensor that the files have to give; ``bias`` says whether biases are among them."""
    needed = {("up" if shard.rank else "weight", place) for place, shard in enumerate(found)}
    needed |= {("down", shard.first) for shard in found if shard.rank}
    return needed | ({("bias", place) for place in range(len(found))} if bias else set())
