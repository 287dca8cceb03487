"""Groups of modules that read the same input, factored as one stack with one shared down factor.

The stack [W_q; W_k; W_v] (sum of outs, in) is one matrix to every method, so its factors of rank r are the best under
the method's own objective for all members together; up is cut into the members' rows, down is theirs in common. That
costs r (in + sum of outs) entries and, since the product with down is computed once, as many multiply-adds an input.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc.calibration.collection import Statistics
from peftc.calibration.statistics import Found
from peftc.errors import PeftcError, PlanError, named
from peftc.factors.ranks import Ranks
from peftc.models.inputs import DOES_NOT_RUN, forward, probe
from peftc.models.layers import registered
from peftc.models.model import Model
from peftc.models.place import one_dtype
from peftc.nn import lowrank, shared, surgery
from peftc.plans.plan import Plan, Target
from peftc.report import grouped
from peftc.store.artifact import Piece

FORMS = ("linear", "transposed")


# -- which modules ----------------------------------------------------------------------------------------------------


def arrange(model: Model, targets: dict[str, Target], plan: Plan | None, asked: bool) -> None:
    """Put the groups that a plan names, or that share an input, in the place of their members."""
    if plan is not None:
        groups = plan.joint
        _check_planned(targets, groups)
    else:
        groups = of_one_input(model, targets) if asked else []
    leads = {names[0]: names for names in groups}
    others = {name for names in groups for name in names[1:]}
    arranged = {}
    for name, target in targets.items():
        if name in leads:
            some = [targets[each] for each in leads[name]]
            outs = tuple(each.entries // _in(each) for each in some)
            arranged[name] = Target(name, "linear", (sum(outs), _in(target)), members=tuple(leads[name]), outs=outs)
        elif name not in others:
            arranged[name] = target
    targets.clear()
    targets.update(arranged)


def of_one_input(model: Model, targets: Mapping[str, Target]) -> list[list[str]]:
    """Return the groups of two or more eligible modules that read the same tensor, once each, in one forward pass.

    Plain linear maps that share their weight with nobody take part, on the meta device too. A model for which no input
    can be made up has no group.
    """
    subject = one_dtype(model)
    fit = [name for name, target in targets.items() if target.form in FORMS and not target.aliases]
    seen: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in fit}  # the tensors stay, and so their identity

    def watch(calls: list[tuple[Tensor, int]]) -> Callable[..., None]:
        def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs:
                calls.append((inputs[0], inputs[0]._version))

        return note

    watched = [(subject.module.get_submodule(name), calls) for name, calls in seen.items()]
    try:
        batch = probe(subject)
        with (
            registered(module.register_forward_pre_hook(watch(calls)) for module, calls in watched),
            torch.no_grad(),  # inference tensors have no version
        ):
            forward(subject, batch)
    except (PeftcError, *DOES_NOT_RUN):
        return []
    groups: dict[tuple[int, int], list[str]] = {}
    for name, calls in seen.items():
        if len(calls) == 1:
            tensor, version = calls[0]
            groups.setdefault((id(tensor), version), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _check_planned(targets: Mapping[str, Target], groups: Sequence[Sequence[str]]) -> None:
    for names in groups:
        unknown = [name for name in names if name not in targets]
        if unknown:
            what = f"the plan lets `{unknown[0]}` share a down factor, but it is not among the eligible modules"
            raise PlanError(what, hint=f"include it: `--include {unknown[0]}`, or take the group out of `joint`")
        some = [targets[name] for name in names]
        if any(each.form not in FORMS or each.aliases for each in some) or len({_in(each) for each in some}) > 1:
            why = "only linear modules of one input width that share their weight with no other can"
            raise _unplannable(names, why)


def _unplannable(names: Sequence[str], why: str, otherwise: str = "") -> PlanError:
    listed = ", ".join(f"`{name}`" for name in names)
    hint = f"take the group out of `joint`{otherwise}"
    return PlanError(f"the plan lets {listed} share a down factor", why=why, hint=hint)


def _in(target: Target) -> int:
    return target.shape[1] if target.form == "linear" else target.shape[0]


def one_by_one(model: Model, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Return the targets with every group as its members again."""
    found: dict[str, Target] = {}
    for name, target in targets.items():
        members = [member(model, target, at) for at in range(len(target.members))]
        found |= {each.name: each for each in members} or {name: target}
    return found


def member(model: Model, target: Target, at: int) -> Target:
    """Return a member of a group as a target of its own."""
    name = target.members[at]
    module: Any = model.module.get_submodule(name)
    form = form_of(module)
    uses = tuple(replace(use, form=form) for use in target.uses)
    return Target(name, form, tuple(module.weight.shape), uses=uses)


def form_of(module: nn.Module) -> str:
    """Return the form of a member."""
    return "linear" if isinstance(module, nn.Linear) else "transposed"


# -- their statistics and weights -------------------------------------------------------------------------------------


def take_apart(model: Model, targets: dict[str, Target], known: Statistics, *, planned: bool) -> None:
    """Put the members in the place of the groups of which there are no statistics as one.

    These are groups of few outputs, of which only the second moments of each member's outputs are kept, and members
    that read different tensors on the calibration set.

    Raises:
        PlanError: such a group is ``planned``, with one rank for all.
    """
    apart = []
    arranged: dict[str, Target] = {}
    for name, target in targets.items():
        about = [known.note["modules"].get(member) for member in target.members]
        if not target.members or {each and (each["side"], each["leader"]) for each in about} <= {("input", name)}:
            arranged[name] = target
        elif planned:
            why = "there are no statistics of one input of theirs: they read different tensors, or have few outputs"
            raise _unplannable(target.members, why, ", or factor it without statistics: `--method svd`")
        else:
            arranged |= one_by_one(model, {name: target})
            apart.append(name)
    targets.clear()
    targets.update(arranged)
    if apart:
        listed = named(apart[:4]) + (" and others" if len(apart) > 4 else "")
        known.notes.append(f"factored apart, for want of statistics of the group's common input: the group of {listed}")


def statistics_of(known: Statistics, target: Target, device: torch.device) -> Found:
    """Return the statistics of a target; of a group those of its stack.

    The input side is common to the members. The stack's gram matrix is taken as block diagonal: how gradients of
    different members vary together is not collected. The Fisher information of an input feature is summed.
    """
    if not target.members:
        return known.of(target.name, device)
    found = [known.of(name, device) for name in target.members]
    others: dict[str, Any] = dict(found[0].others)
    if "output_gradient_gram" in others:
        grams = zip((each.others["output_gradient_gram"] for each in found), target.outs, strict=True)
        others["output_gradient_gram"] = tuple(
            gram if gram.ndim else gram * torch.eye(out, dtype=gram.dtype, device=device) for gram, out in grams
        )
    if "weight_fisher" in others:
        others["weight_fisher"] = torch.stack([each.others["weight_fisher"] for each in found]).sum(0)
    return replace(found[0], others=others)


def stacked(model: Model, target: Target, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return the members' matrices (out, in) one above the other, as float32 unless stored as float64 or said."""
    modules: list[Any] = [model.module.get_submodule(name) for name in target.members]
    parts = [lowrank.matrix(module.weight.detach(), form_of(module)) for module in modules]
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return torch.cat([part.to(device, dtype or wide) for part in parts])


# -- surgery and plans ------------------------------------------------------------------------------------------------


def put(network: nn.Module, name: str, form: str, rank: int, factors: Mapping[str, nn.Parameter]) -> nn.Module:
    """Put a low-rank module with these factors, and the bias that was there, in the place of a dense one; return it."""
    old = network.get_submodule(name)
    new = lowrank.build(old, form, rank)
    surgery.replace(network, old, new)
    surgery.place(new, {"up.bias": getattr(old, "bias", None), **factors})
    return new


def edit(
    network: nn.Module,
    target: Target,
    rank: int,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Piece],
    pieces: MutableMapping[str, Piece],
) -> dict[str, dict[str, Any]]:
    """Put a group's factors into the network and their pieces beside the others; return its manifest entries.

    ``tensors`` and ``parts`` hold ``down.weight``, and ``<place>.up.weight`` and maybe ``.up.bias`` of each member.
    """
    members: list[Any] = []
    entries = {}
    for at, name in enumerate(target.members):
        form = form_of(network.get_submodule(name))
        mine = {key: key.removeprefix(f"{at}.") for key in tensors if key.startswith(f"{at}.")}
        members.append(put(network, name, form, rank, {leaf: nn.Parameter(tensors[key]) for key, leaf in mine.items()}))
        if f"{name}.bias" in pieces:
            pieces[f"{name}.up.bias"] = pieces[f"{name}.bias"]
        for key, leaf in {"down.weight": "down.weight", **mine}.items():
            pieces[f"{name}.{leaf}"] = parts[key]
        entries[name] = {"form": form, "rank": rank, "shares": target.name}
    down = shared.share(members)
    down.weight = nn.Parameter(tensors["down.weight"])
    return entries


def gathered(plan: Plan) -> Plan:
    """Return a plan with one rank for each group, under the name of its first member."""
    others = {name for names in plan.joint for name in names[1:]}
    if not others:
        return plan
    forms = {name: form for name, form in plan.forms.items() if name not in others}
    forms |= {names[0]: "linear" for names in plan.joint}
    return replace(plan, ranks={name: rank for name, rank in plan.ranks.items() if name not in others}, forms=forms)


def spelled_out(plan: Plan, model: Model, targets: Mapping[str, Target]) -> Plan:
    """Return a plan that names every member of a group, and says what the groups are."""
    groups = {name: list(target.members) for name, target in targets.items() if target.members}
    if not groups:
        return plan
    ranks = {each: rank for name, rank in plan.ranks.items() for each in groups.get(name, [name])}
    forms = {name: form for name, form in plan.forms.items() if name not in groups}
    forms |= {each: form_of(model.module.get_submodule(each)) for names in groups.values() for each in names}
    return replace(plan, ranks=ranks, forms={name: forms[name] for name in ranks}, joint=list(groups.values()))


def said(targets: Mapping[str, Target], ranks: Ranks) -> list[str]:
    """Return a note on the groups that share a down factor, a kind of them at a time."""
    groups = [name for name, target in targets.items() if target.members and ranks[name] is not None]
    kinds = [
        f"`{kind}` and {len(targets[some[0]].members) - 1} more ({len(some)})" for kind, some in grouped(groups).items()
    ]
    return [f"modules that read one input share their down factor: {'; '.join(kinds)}"] if kinds else []
