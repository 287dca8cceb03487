"""Build a network again with fewer layers: its own config corrected, the tensors of the kept layers renamed.

The shorter network is one that its library builds by itself, so per-layer lists, layer indices and caches are right by
construction. Where no config builds one that takes exactly the kept tensors, `skip` puts modules that hand on what they
read in the place of the dropped layers; such a model is built with peftc alone.
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import count
from typing import Any

from torch import nn

from peftc.errors import PeftcError, PlanError
from peftc.models import adapting, families, from_timm
from peftc.models.model import Model, detached
from peftc.models.skeleton import UNBUILDABLE, on_meta
from peftc.nn import surgery


@dataclass(frozen=True)
class Stack:
    """A container, how many layers it has, and the positions, from 0, of those that stay."""

    path: str
    number: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Shorter:
    """A shorter model, and what its manifest says of its modules."""

    model: Model  # whose module and config are new; it shares the tensors of the one that it was made from
    modules: dict[str, dict[str, Any]]  # name -> entry of each factored module that is left
    adapters: dict[str, dict[str, Any]]  # name -> entry of each update that is left
    renamed: dict[str, str]  # old name -> new name of each kept layer
    tensors: dict[str, str]  # new name -> old name of each tensor
    skipped: dict[str, list[int]] = field(default_factory=dict)  # dropped in place -> lengths of output tuples


def renumbered(kept: Sequence[str]) -> dict[str, str]:
    """Return old name -> new name of kept layers, those of one container counted from 0."""
    numbers: dict[str, Iterator[int]] = defaultdict(count)
    parents = ((name, name.removesuffix(name.rpartition(".")[2])) for name in kept)  # with their dot
    return {name: f"{parent}{next(numbers[parent])}" for name, parent in parents}


def in_base(model: Model, names: Sequence[str] = ()) -> dict[str, str]:
    """Return layer -> what it is called in the base, of a model whose layers are ``names`` where none was dropped."""
    if model.manifest is not None and model.manifest.skipped:
        return {name: name for name in model.manifest.kept_layers}
    if model.manifest is not None and model.manifest.kept_layers:
        return {name: was for was, name in renumbered(model.manifest.kept_layers).items()}
    return {name: name for name in names}


def shorten(model: Model, names: Sequence[str], kept: Sequence[str]) -> Shorter:
    """Return a model, itself unchanged, without the layers that are not kept (PlanError: no config builds that)."""
    stacks = _stacks(model, names, kept)
    new = renumbered(kept)
    dropped = [name for name in names if name not in set(kept)]
    left, tied = _left(model, dropped, new)
    tensors, wanted = surgery.tensors_of(model.module), left.tensors
    likely = {"timm": _of_timm, "transformers": _of_transformers}
    if model.library not in likely:
        raise PlanError(f"`{model.name}` is built by your own code", why="peftc cannot tell it to build fewer layers")
    why = "no argument or config key was found that counts its layers"
    for network, config in likely[model.library](model, stacks):
        try:
            surgery.apply_edits(network, left.modules)
            adapting.rebuild(network, left.adapters)
            surgery.tie(network, tied)
            first = surgery.fill(network, wanted, lambda name: tensors[wanted[name]], where=model.name)
        except PeftcError as error:
            why = f"{error.what}: {error.why}" if error.why else error.what
            continue
        infos = {name: model.infos[wanted[there]] for name, there in first.items() if wanted[there] in model.infos}
        return replace(left, model=replace(model, module=network.eval(), config=config, infos=infos, files=[]))
    what = f"`{model.name}` cannot be built without {', '.join(f'`{name}`' for name in dropped[:4])}"
    raise PlanError(what, why=why, hint="choose other layers with `--drop`: some of its layers are not like the others")


def skip(model: Model, kept: Sequence[str], dropped: Mapping[str, list[int]]) -> Shorter:
    """Return a model, unchanged itself, whose ``dropped`` layers (-> lengths of tuples) hand on what they read."""
    left, _ = _left(model, list(dropped), {name: name for name in kept})
    module = detached(model.module)
    surgery.skip(module, dropped)
    infos = {name: info for name, info in model.infos.items() if name in left.tensors}
    made = replace(model, module=module.eval(), infos=infos, files=[])
    earlier = model.manifest.skipped if model.manifest else {}
    return replace(left, model=made, skipped={**earlier, **dropped})


def _left(model: Model, dropped: Sequence[str], new: Mapping[str, str]) -> tuple[Shorter, dict[str, str]]:
    """Return what is left of a model under the new names of its layers, not yet in a network, and its ties."""

    def rename(name: str) -> str | None:
        """Return the new name of a tensor or module; None for one that goes."""
        if any(name == layer or name.startswith(f"{layer}.") for layer in dropped):
            return None
        layer = next((layer for layer in new if name == layer or name.startswith(f"{layer}.")), None)
        return name if layer is None else new[layer] + name[len(layer) :]

    wanted = {there: name for name in surgery.tensors_of(model.module) if (there := rename(name)) is not None}
    record = model.manifest
    if record is None:
        return Shorter(model, {}, {}, dict(new), wanted), {}
    adapters = {there: dict(entry) for name, entry in record.adapters.items() if (there := rename(name)) is not None}
    edits = {there: dict(entry) for name, entry in record.modules.items() if (there := rename(name)) is not None}
    leaders: dict[str, str] = {}
    for there, entry in edits.items():
        if "shares" in entry:  # where the first of a group goes, the next one that stays leads it
            entry["shares"] = rename(entry["shares"]) or leaders.setdefault(entry["shares"], there)
    groups: dict[str, list[str]] = {}
    for alias, first in record.tied.items():
        groups.setdefault(first, [first]).append(alias)
    tied: dict[str, str] = {}
    for group in groups.values():
        stays = [there for name in group if (there := rename(name)) is not None]
        tied |= {alias: stays[0] for alias in stays[1:]}
    return Shorter(model, edits, adapters, dict(new), wanted), tied


def _stacks(model: Model, names: Sequence[str], kept: Sequence[str]) -> list[Stack]:
    found = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        own = [name for name in names if name.rpartition(".")[0] == path]
        children = [name for name, _ in model.module.get_submodule(path).named_children()]
        leaves = [name.rpartition(".")[2] for name in own]
        stays = tuple(at for at, name in enumerate(own) if name in set(kept))
        if len(stays) == len(own):
            continue
        if leaves != [str(at) for at in range(len(children))]:
            raise PlanError(
                f"the layers in `{path}` of `{model.name}` cannot be renumbered",
                why=f"they are {', '.join(f'`{name}`' for name in children[:4])}, and in a row run "
                f"{', '.join(f'`{name}`' for name in leaves[:4])}",
            )
        found.append(Stack(path, len(own), stays))
    return found


def _of_timm(model: Model, stacks: Sequence[Stack]) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield networks on the meta device with fewer layers, and their configs."""
    arguments: dict[str, Any] = {}
    stages: dict[int, int] = {}  # of containers whose paths differ in one number: how many layers each has
    for stack in stacks:
        parts = re.fullmatch(r"(.*?)(\d+)(\D*)", stack.path)
        if parts is None:
            arguments |= dict.fromkeys(families.known("counts", "timm"), len(stack.kept))
            continue
        alike = re.compile(rf"{re.escape(parts[1])}(\d+){re.escape(parts[3])}")
        for path, container in model.module.named_modules():
            if found := alike.fullmatch(path):
                stages.setdefault(int(found[1]), len(list(container.children())))
        stages[int(parts[2])] = len(stack.kept)
    for key in families.known("stages", "timm") if stages else ("",):
        config = copy.deepcopy(model.config)
        listed = {key: [stages[at] for at in sorted(stages)]} if stages else {}
        config["model_args"] = {**(config.get("model_args") or {}), **arguments, **listed}
        with suppress(PeftcError):
            yield from_timm.network(config, model.folder)


def _of_transformers(model: Model, stacks: Sequence[Stack]) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    config = copy.deepcopy(model.config)
    network = model.module
    for stack in stacks:
        after = next((made for made in _shorter_configs(model, config, stack) if _fits(network, made[0], stack)), None)
        if after is None:
            return
        network, config = after
    yield network, config


def _fits(before: nn.Module, after: nn.Module, stack: Stack) -> bool:
    """Return whether one container has so many layers as are kept, and every other what it had."""

    def layers(network: nn.Module) -> dict[str, int]:
        listed = (nn.ModuleList, nn.Sequential)
        paths = {path: len(each) for path, each in network.named_modules() if isinstance(each, listed)}
        return {path: number for path, number in paths.items() if not f"{path}.".startswith(f"{stack.path}.")}

    try:
        number = len(list(after.get_submodule(stack.path).children()))
    except AttributeError:
        return False
    return number == len(stack.kept) and layers(before) == layers(after)


def _shorter_configs(model: Model, config: dict[str, Any], stack: Stack) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield what comes of each key of a config, wherever it is nested, that may count the layers of a stack."""
    from huggingface_hub.errors import StrictDataclassError

    cls: Any = type(model.module)
    kind, lists = type(model.module.config), families.known("stages")  # type: ignore[arg-type]
    whole = json.loads(kind.from_dict(copy.deepcopy(config)).to_json_string(use_diff=False))  # type: ignore[attr-defined]
    for place, known in _levels(whole):
        per_layer = {
            key: [value[at] for at in stack.kept]
            for key, value in known.items()
            if isinstance(value, list) and "layer" in key and key not in lists and len(value) == stack.number
        }
        aliases = getattr(type(reduce(getattr, place, model.module.config)), "attribute_map", {})
        for key in (*families.known("counts"), *lists):
            value = known.get(key)
            ways: list[Any] = [len(stack.kept)] if value == stack.number else []
            if key in lists and isinstance(value, list):
                stages = [at for at, number in enumerate(value) if number == stack.number]
                ways = [[*value[:at], len(stack.kept), *value[at + 1 :]] for at in stages]
            dropped = [alias for alias, meant in aliases.items() if meant == key]
            if known.get("out_features") == [f"stage{stack.number}"]:  # the last stage, which is another one now
                dropped += ["stage_names", "out_features", "out_indices"]
            for way in ways:
                changed = copy.deepcopy(config)
                level = reduce(lambda level, part: level.setdefault(part, {}), place, changed)
                level |= {key: way, **per_layer}
                for word in dropped:
                    level.pop(word, None)
                with suppress(*UNBUILDABLE, StrictDataclassError):
                    network: Any = on_meta(partial(cls, kind.from_dict(copy.deepcopy(changed))))
                    network.tie_weights()
                    yield network, changed


def _levels(config: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a config and those nested in it."""
    yield place, config
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _levels(value, (*place, key))
