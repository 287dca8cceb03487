"""Model > a copy whose weights are frozen, with a head for the data, and beside it what a method lets learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.data import open_data
from peftc.data.classes import match
from peftc.errors import DataError, PlanError, UsageError, named
from peftc.methods import registry
from peftc.models import adapting, delta, halved, heads, sharding, targets, write
from peftc.models.adapting import Placed
from peftc.models.heads import Headed
from peftc.models.layers import layers
from peftc.models.load import refuse_non_finite
from peftc.models.model import Model, detached
from peftc.models.place import device_of, place_of, runnable
from peftc.nn import surgery
from peftc.nn.adapted import Adapted, adapted_modules, without_scratch
from peftc.options import Reading, Recipe
from peftc.report import Report, Table
from peftc.tasks.table import task_of
from peftc.training import parallel, samples
from peftc.training.schedule import mixed

HEAD, UPDATES = 1, 2  # what random numbers are drawn for
LEARNT = "learnt.safetensors"  # what learnt in pieces, in the working folder


@dataclass
class Student:
    """A model that learns a task."""

    model: Model  # whose module learns, with its updates beside it
    head: Headed  # the same before, as it is stored, with the head that the data needs
    placed: Placed  # what learns, module by module

    @property
    def stored(self) -> Model:
        """The model before, as it is stored, with the head that the data needs."""
        return self.head.model

    @property
    def learned(self) -> list[str]:
        """Names of the tensors that learning changed: parameters that learn, and buffers that differ from before."""
        before = surgery.tensors_of(self.stored.module)
        found = []
        for name, tensor in surgery.tensors_of(self.model.module).items():
            was = before.get(before_updates(name, self.placed.adapters))
            if isinstance(tensor, nn.Parameter):
                changed = tensor.requires_grad
            else:
                changed = was is None or not torch.equal(tensor.cpu(), was.to(tensor.dtype))
            found += [name] if changed else []
        return found


def headed(model: Model, data: str, reading: Reading, head: str) -> Headed:
    """Return the model with a head for the classes of the data: a new one, or its own.

    Args:
        model: as stored.
        data: a `--data` spec.
        reading: how it is read; ``seed`` is of the first values of a new head, too.
        head: ``auto`` gives a new one where the classes do not fit, ``new`` always, ``keep`` never.
    """
    task, seed = reading.task, reading.seed
    row, own = task_of(model, task), Headed(model, [], {})
    if row is not None and not row.has_classes and not (task is None and row.name == "sentence-similarity"):
        return own
    dataset = open_data(data, num_samples=None, seed=seed, task=task, role="training", streaming=reading.streaming)
    classes = dataset.classes
    if classes is None or (row is None and model.library == "python"):
        return own
    if head == "keep" or (head == "auto" and row is not None and row.has_classes and _fits(model, classes)):
        return own
    samples.refuse_one_class(
        dataset, "keep the head and imitate a teacher: `--head keep --teacher MODEL --loss features=1`"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed(seed, 0, HEAD))
        return heads.with_head(model, classes)


def _fits(model: Model, classes: Sequence[str]) -> bool:
    """Return whether the model's outputs are the classes, by name, or by number where it has no names."""
    if model.labels is None:
        width = model.config.get("num_classes")
        if width is None:  # a class of the user's own
            found = write.probe_outputs(model)
            width = len(classes) if found is None else found.shape[-1]
        return width == len(classes)
    try:
        match(list(classes), model.labels, len(model.labels))
    except DataError:
        return False
    return True


def build(
    head: Headed,
    method: str,
    settings: Mapping[str, Any],
    *,
    include: Sequence[str],
    skip: Sequence[str],
    on_product: bool,
    task: str | None,
    device: str,
    seed: int,
    recipe: Recipe,
) -> Student:
    """Return a runnable copy of a model in which only what a method says learns, and the head of a classifier.

    Raises:
        UsageError: the method, one of its settings or a pattern is unknown.
        WeightError: a weight is not finite.
        PlanError: nothing would learn, or the model has updates of another method.
    """
    model, row = head.model, task_of(head.model, task)
    refuse_non_finite(model)
    function = registry.find("adapter", method, "--method")
    chosen = registry.with_settings(function, method, settings)
    beside = registry.trait(function, "BESIDE_HALF", False) and not on_product  # a product is made of whole factors
    halves = beside and halved.suits(model.module, recipe)
    copied = replace(model, module=_copied(model.module, widened=not (recipe.spread or halves)), infos={}, files=[])
    if halves:
        halved.widen(copied.module, device_of(device))
    elif not recipe.spread:
        runnable(copied, device=device)
    before = adapted_modules(copied.module)
    if before:
        placed = _again(model, copied, before, method)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed(seed, 0, UPDATES))
            placed = adapting.place(copied, method, chosen, include=include, skip=skip, on_product=on_product)
    if row is not None and row.has_classes:
        for name in sorted(_outputs(copied)):
            placed.own[name] = tuple(copied.module.get_submodule(name)._parameters)
    for name, leaves in placed.own.items():
        for parameter in (getattr(copied.module.get_submodule(name), leaf) for leaf in leaves):
            if parameter is not None:
                if not recipe.spread:
                    own = parameter.detach().clone()  # it may be a window on a file
                    parameter.data = own.float() if halves else own
                parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in copied.module.parameters()):
        why = "no module takes an update of that method"
        hint = "see `peftc methods finetune`, or name modules: `--include`"
        raise PlanError(f"nothing of `{model.name}` would learn by `{method}`", why=why, hint=hint)
    if recipe.spread:
        copied = parallel.in_pieces(copied, layers(model), recipe, device, learns=True)
    elif halves:
        halved.attach(copied)
    return Student(copied, head, placed)


def refuse_others(model: Model, method: str) -> None:
    """Refuse to train a model by one method that has updates of another: a `UsageError`."""
    entries = model.manifest.adapters.values() if model.manifest else ()
    for other in sorted({entry["method"] for entry in entries} - {method}):
        hint = f"go on with `--method {other}`, or take them in first: `peftc merge {model.source.spec}`"
        raise UsageError(f"`{model.name}` has updates of `{other}`, and `--method` is `{method}`", hint=hint)


def _again(model: Model, copied: Model, before: Mapping[str, Adapted], method: str) -> Placed:
    """Let the updates that a model has learn on."""
    assert model.manifest is not None
    record = model.manifest
    refuse_others(model, method)
    copied.module.requires_grad_(False)
    function = registry.find("adapter", method, "--method")
    for name, each in before.items():
        kept = each.update.state_dict()
        fresh: Any = function(each.base, **record.adapters[name]["settings"])  # with what only training needs
        fresh.load_state_dict({**fresh.state_dict(), **kept})
        each.update = fresh.to(place_of(copied.module)).requires_grad_(True)
    placed = Placed(adapters={name: dict(entry) for name, entry in record.adapters.items()})
    settings = next(iter(placed.adapters.values()))["settings"]
    held, outputs = delta.held(model), _outputs(copied)
    for name, module in copied.module.named_modules():  # whose weight the method trained, as no update was smaller
        given = function(module, **settings) if f"{name}.weight" in held and name not in outputs else None
        if isinstance(given, tuple):
            placed.own[name] = given
            placed.whole.append(name)
    return placed


def _outputs(model: Model) -> set[str]:
    return targets.heads(model, {name: each for name, each in model.module.named_modules() if each._parameters})


def _copied(module: nn.Module, *, widened: bool) -> nn.Module:
    """Return a copy that shares parameters but not buffers, which may learn; half precision is widened as asked."""
    copied = detached(module)
    for each in copied.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = buffer.clone()
    if widened and surgery.uniform_dtype(copied) not in (torch.float32, torch.float64):
        copied.float()
    return copied


def together(model: Model, stored: nn.Module, updates: Mapping[str, Any], folder: Path) -> Model:
    """Return a model whole again, what it learnt on a file in the precision in which it is stored; itself if whole.

    Args:
        model: that learnt.
        stored: the network before, as it is stored.
        updates: of the module.
        folder: for that file.
    """
    if model.shards is None:
        return model
    types = {name: tensor.dtype for name, tensor in surgery.tensors_of(stored).items()}
    frozen = {name for name, each in model.module.named_parameters() if not each.requires_grad}
    learnt = [name for name in surgery.tensors_of(model.module) if name not in frozen]
    of_stored = lambda name: types.get(before_updates(name, updates))  # noqa: E731
    return sharding.together(model, folder / LEARNT, learnt, of_stored)


def as_stored(module: nn.Module, stored: nn.Module, updates: Mapping[str, Any]) -> nn.Module:
    """Put a trained network on the CPU and its tensors in the precision that they were stored in; updates as trained.

    Buffers that served the training alone go.
    """
    types = {name: tensor.dtype for name, tensor in surgery.tensors_of(stored).items()}
    halved.release(module)
    module = module.cpu().requires_grad_(False)
    for each in adapted_modules(module).values():
        settle(each.update)
        without_scratch(each.update)
    for name, tensor in surgery.tensors_of(module).items():
        there = before_updates(name, updates)
        if there in types and tensor.dtype != types[there]:
            tensor.data = tensor.data.to(types[there])
    return module


def settle(update: nn.Module) -> None:
    """Let what an update derives from its parameters follow them."""
    if hasattr(update, "settle"):
        update.settle()  # type: ignore[operator]


def before_updates(name: str, updates: Mapping[str, Any]) -> str:
    """Return what a tensor was called before updates were put beside its module."""
    path, base, leaf = name.rpartition(".base.")
    return f"{path}.{leaf}" if base and path in updates else name


def beneath(student: Student, learned: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the tensors that a delta holds, and of the others that are called otherwise in the model beneath, how."""
    record = student.stored.manifest
    stored = surgery.stored_names(student.model.module)
    earlier: Mapping[str, str] = {}
    held = {*learned, *student.head.new, *(name for name in stored if ".update." in name)}
    if record is not None and record.delta:
        earlier = record.delta["tensors"]
        held |= delta.held(student.stored)
    names, there = [], {}
    for name in stored:
        was = before_updates(name, student.placed.adapters) if not earlier else name
        was = student.head.renamed.get(was, was)
        if name in held:
            names.append(name)
        elif (called := earlier.get(name, was)) != name:
            there[name] = called
    return names, there


def tell(report: Report, student: Student) -> None:
    """Say what learns."""
    module, placed = student.model.module, student.placed
    updates = adapted_modules(module)
    counts = {name: sum(p.numel() for p in each.update.parameters()) for name, each in updates.items()}
    learning = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in module.parameters()) - sum(counts.values())
    own = learning - sum(counts.values())
    rows = [
        ["updates", f"{len(updates)}", f"{sum(counts.values()):,}"],
        ["own weights", f"{len(placed.own)}", f"{own:,}"],
    ]
    report.tables.append(Table("what learns", ["", "modules", "parameters"], rows))
    report.notes.append(f"{learning:,} of {total:,} parameters learn ({learning / total:.2%})")
    if student.head.new:
        report.notes.append(f"a new head for {len(student.stored.labels or [])} classes")
    if placed.whole:
        some = ", ".join(f"`{name}`" for name in placed.whole[:4])
        why = "for an update of theirs would be no smaller"
        report.notes.append(f"{len(placed.whole)} modules learn whole, {why}: {some}")
    left = {name: why for name, why in placed.left.items() if name not in placed.own}
    if updates and left:
        by_reason: dict[str, list[str]] = {}
        for name, why in left.items():
            by_reason.setdefault(why, []).append(name)
        some = ", ".join(f"{named(names, 1)} ({why})" for why, names in by_reason.items())
        report.notes.append(f"not adapted: {some}")
    report.data["learning"] = {
        "parameters": learning,
        "of": total,
        "updates": counts,
        "own": {n: list(v) for n, v in placed.own.items()},
        "whole": placed.whole,
        "left": left,
    }


def tell_sparsity(report: Report, student: Student) -> None:
    """Say how many entries of the weights the updates change, where they choose some; exact counts."""
    found = {
        name: each.update.report()  # type: ignore[operator]
        for name, each in adapted_modules(student.model.module).items()
        if hasattr(each.update, "report")
    }
    entries = sum(each["entries"] for each in found.values())
    if not entries:
        return
    changed, asked = (sum(each[key] for each in found.values()) for key in ("changed", "asked"))
    report.data["sparsity"] = {"modules": found, "changed": changed, "asked": asked, "entries": entries}
    report.notes.append(
        f"{changed:,} of {entries:,} entries of the adapted weights change ({changed / entries:.2%}); asked: {asked:,}"
    )
    shares = {name: each["changed"] / each["entries"] for name, each in found.items()}
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    if shares[most] > shares[least]:
        report.notes.append(f"from {shares[least]:.1%} of `{least}` to {shares[most]:.1%} of `{most}`")
