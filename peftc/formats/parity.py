"""An export beside the artifact it was made from: the same inputs, what both give, and how long both take."""

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftc.data import open_data
from peftc.errors import ExportError
from peftc.formats.exported import Exported, Inputs, computed, named
from peftc.measure import costs
from peftc.models.inputs import probe
from peftc.models.model import Model
from peftc.options import Reading
from peftc.tasks import unlabelled
from peftc.tasks.table import guess, task_of

ROUNDED = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # allowed where products of factors are stored in half precision
UNSURE = "so no export can be compared with it"
NOTHING = 1e-6  # of the largest output: samples that differ by less do not differ


def example(model: Model, batch: int, *, image_size: int | None, max_length: int | None, seed: int = 0) -> Inputs:
    """Return random inputs with all that the network's tokenizer would give it."""
    inputs = named(model, probe(model, batch=batch, image_size=image_size, max_length=max_length, seed=seed))
    takes = inspect.signature(model.module.forward).parameters
    types = getattr(getattr(model.module, "config", None), "type_vocab_size", 0) or 0
    if model.kind == "text" and "token_type_ids" in takes and types > 1:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def probes(model: Model, *, image_size: int | None, max_length: int | None) -> list[Inputs]:
    """Return random inputs of one sample, and of three that are shorter and padded, as no export has seen them."""
    one = example(model, 1, image_size=image_size, max_length=max_length, seed=1)
    if "input_ids" not in one:
        return [one, example(model, 3, image_size=image_size, max_length=max_length, seed=2)]
    length = one["input_ids"].shape[1]
    three = example(model, 3, image_size=image_size, max_length=max(2, length // 2 + 1), seed=2)
    if model.kind == "text" and "attention_mask" in three:
        three["attention_mask"][0, -1] = 0
    return [one, three]


def real_inputs(model: Model, data: str, reading: Reading, batch_size: int) -> list[Inputs]:
    """Return samples of the user's data in batches."""
    row = task_of(model, reading.task)
    how: Any = {"num_samples": reading.num_samples, "seed": reading.seed, "streaming": reading.streaming}
    dataset = open_data(data, task=row.name if row else None, **how)
    encoded = unlabelled.encode(model, dataset, row, reading)
    indices = [range(encoded.size)[start : start + batch_size] for start in range(0, encoded.size, batch_size)]
    return [named(model, encoded.batch(each).inputs) for each in indices]


@dataclass(frozen=True)
class Parity:
    """How near an export is to what it was made from.

    Attributes:
        deviation: largest difference of an output, as a share of the largest output.
        agreement: share of predictions that are the same, or mean cosine of vectors.
        is_share: whether it is such a share.
        spread: largest difference between outputs of the model for different samples, as a share of the largest output.
    """

    deviation: float
    agreement: float
    is_share: bool
    spread: float


def compare(model: Model, written: Exported, batches: Sequence[Inputs]) -> Parity:
    """Compute batches in memory and in the runtime of an export; padding is left out."""
    row = guess(model)
    is_share = row is not None and (row.has_classes or row.is_language)
    deviation, spread, agreed, count = 0.0, 0.0, 0.0, 0
    for inputs in batches:
        before, after = computed(model, inputs)[0], written.run(inputs)
        if before.shape != after.shape:
            what = f"the export gives outputs of shape {list(after.shape)}, the model {list(before.shape)}"
            raise ExportError(what, why=f"for inputs of shape {[list(each.shape) for each in inputs.values()]}")
        deviation = max(deviation, _of_vectors(written, before, inputs))
        before, after = (_without_padding(each, inputs) for each in (before, after))
        if not torch.isfinite(after).all():
            raise ExportError("the export gives NaN or infinite outputs", why=f"it ran in {written.runtime}")
        largest = float(before.abs().max())
        deviation = max(deviation, float((before - after).abs().max()) / (largest or 1.0))
        one, other = before.flatten(0, -2), after.flatten(0, -2)
        spread = max(spread, float((one - one[0]).abs().max()) / (largest or 1.0))
        same = one.argmax(-1) == other.argmax(-1) if is_share else F.cosine_similarity(one, other, dim=-1)
        agreed, count = agreed + float(same.sum()), count + len(same)
    return Parity(deviation, agreed / count, is_share, spread)


def _of_vectors(written: Exported, tokens: Tensor, inputs: Inputs) -> float:
    """Return how far vectors of sentences deviate from what follows of vectors of tokens, as a share of the largest."""
    if written.vectors is None:
        return 0.0
    make, by_runtime = written.vectors
    with torch.inference_mode():
        wanted, found = make(tokens, inputs["attention_mask"]), by_runtime(inputs)
    if found.shape != wanted.shape or not torch.isfinite(found).all():
        what = f"the export gives vectors of sentences of shape {list(found.shape)}, and some may be no numbers"
        raise ExportError(what, why=f"the model gives {list(wanted.shape)}; it ran in {written.runtime}")
    return float((wanted - found).abs().max()) / (float(wanted.abs().max()) or 1.0)


def refuse_unsteady(model: Model, batches: Sequence[Inputs]) -> None:
    """Refuse a model that no export can be compared with: it gives other outputs for the same inputs, or no numbers."""
    for inputs in batches:
        once, again = (_without_padding(computed(model, inputs)[0], inputs) for _ in range(2))
        if not torch.isfinite(once).all():
            what = f"`{model.name}` cannot be exported: it gives NaN or infinite outputs itself"
            raise ExportError(what, why=UNSURE, hint="no format takes it: export what it was made from")
        gap = float((once - again).abs().max()) / (float(once.abs().max()) or 1.0)
        if gap > NOTHING:
            what = f"`{model.name}` cannot be exported: it draws at random in its forward pass"
            why = f"two runs on the same input differ by {gap:.2g} of the largest output, {UNSURE}"
            hint = "give what it draws to a module of your own, and export that, as `python:MODULE:FACTORY`"
            raise ExportError(what, why=why, hint=f"no format takes it as it is: {hint}")


def _without_padding(output: Tensor, inputs: Inputs) -> Tensor:
    mask = inputs.get("attention_mask")
    is_of_tokens = mask is not None and output.ndim == 3 and output.shape[:2] == mask.shape
    return output[mask.bool()] if is_of_tokens and mask is not None else output


def refuse_other(name: str, parity: Parity, written: Exported) -> None:
    """Refuse an export that deviates by more than its format promises."""
    if written.tolerance is not None and not parity.deviation <= written.tolerance:
        far = f"{parity.deviation:.2g} of the largest, over {written.tolerance:g}"
        why, hint = f"in {written.runtime} its outputs deviate by {far}", "this is a bug in peftc, or in that runtime"
        raise ExportError(f"the export of `{name}` computes something else", why=why, hint=f"{hint}: please report it")


def refuse_merged(name: str, written: Exported) -> None:
    """Refuse a graph in which factors were multiplied out: one is the weight of no product."""
    if written.products is None:
        return
    there = Counter(tuple(sorted(shape)) for shape in written.products)
    lost = Counter(tuple(sorted(shape)) for shape in written.expected) - there
    if lost:
        what = f"{lost.total()} of {len(written.expected)} factors of `{name}` are gone from the graph"
        why = f"no product has a weight of {' x '.join(map(str, next(iter(lost))))}"
        raise ExportError(what, why=why, hint="this is a bug in peftc, or in the exporter: please report it")


def times(model: Model, written: Exported, batches: Sequence[Inputs], rounds: int) -> dict[str, Any]:
    """Time the model in torch, the same once more, and the export in its runtime, interleaved; by batch size."""
    found: dict[str, Any] = {}
    for inputs in batches:
        size, in_torch = len(next(iter(inputs.values()))), partial(computed, model, inputs)
        calls: dict[str, Any] = {"torch": in_torch, "control": in_torch, "export": written.prepare(inputs)}
        run = costs.latency(calls, rounds=rounds, device=torch.device("cpu"), title=f"timing batches of {size}")
        seconds = {f"{label}_seconds": costs.quantile(run[label], 0.5) for label in ("torch", "export")}
        change = costs.speedup(run["torch"], run["control"], run["export"])
        found[str(size)] = {**seconds, "speedup": asdict(change)}
    return found


def in_runtime(model: Model, written: Exported) -> Model:
    """Return a model that computes in the runtime of its export, for whoever evaluates networks."""

    def forward(*inputs: Tensor, **by_name: Tensor) -> Tensor:
        return written.run(by_name or named(model, inputs[0]))

    module: Any = nn.Module()
    module.config = getattr(model.module, "config", None)
    module.main_input_name = getattr(model.module, "main_input_name", "")
    forward.__signature__ = inspect.signature(model.module.forward)  # type: ignore[attr-defined]
    module.forward = forward
    return replace(model, module=module, notes=[])
