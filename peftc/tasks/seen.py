"""Whether samples already calibrated or taught the model that is measured on them."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftc.data import Dataset, parts_of
from peftc.data.dataset import HASH, SKETCH
from peftc.errors import DataError
from peftc.store.manifest import Manifest
from peftc.tasks.language import digest_of
from peftc.tasks.task import Encoded, Task

SHARED = 0.1  # of the smaller set: fewer are repeats that many data sets hold, as short messages do


def kept(spec: str, task: Task | None, dataset: Dataset, encoded: Encoded) -> dict[str, Any]:
    """Return what a step keeps of the samples that it reads, by which they are known again."""
    digest = digest_of(task, dataset, encoded)
    return {"spec": str(spec), "split": dataset.split, "digest": digest, "sketch": dataset.sketch}


def by(record: Manifest | None, spec: str, dataset: Dataset) -> str | None:
    """Return the command of the first step of an artifact that read these samples; None where none did.

    Of another model, without a ``record``, nothing is known. The spec is `--data` as it was typed.
    """
    steps = record.steps if record is not None else []
    known = (step for step in steps if any(among(about, spec, dataset) for about in _read(step)))
    return next((step["request"]["command"] for step in known), None)


def among(about: Mapping[str, Any], spec: str, dataset: Dataset) -> bool:
    """Return whether samples are among those that a step read, of which it kept the spec, a digest and a sketch."""
    same_place = (parts_of(about["spec"])[0], about.get("split")) == (parts_of(spec)[0], dataset.split)
    if "sketch" not in about:
        return same_place or about.get("digest") == dataset.digest
    sketches = (about["sketch"] if isinstance(about["sketch"], str) else "", dataset.sketch)
    theirs, ours = ({each[at : at + HASH] for at in range(0, len(each), HASH)} for each in sketches)
    largest = min((max(each) for each in (theirs, ours) if len(each) >= SKETCH), default=None)  # a full one ends there
    if largest is not None:
        theirs, ours = ({one for one in each if one <= largest} for each in (theirs, ours))
    common = len(theirs & ours)
    if same_place:
        return bool(common) or not (theirs and ours)
    return common > SHARED * min(len(theirs), len(ours))


def refuse_gate(command: str, dataset: Dataset) -> None:
    """Refuse to judge a model by samples that it knows (DataError, always)."""
    read = f"`{command}` has read split `{dataset.split}` of `{dataset.name}`"
    why = "what a model gives for samples that calibrated or taught it says nothing about others"
    hint = "measure on other samples: `--data NAME@SPLIT`, or without a gate"
    raise DataError(f"no gate is judged on samples that the model knows: {read}", why=why, hint=hint)


def _read(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what a step kept of the samples that it read."""
    request = step["request"]
    statistics = request.get("statistics") or {}
    collected = (statistics.get("collected") or {}).get("statistics") or {}
    for data in (request.get("data"), statistics.get("data"), collected.get("data")):
        if isinstance(data, Mapping) and isinstance(data.get("spec"), str):
            yield data
