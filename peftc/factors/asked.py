"""What was asked of a decomposition: the budget, the plan, and which modules may be factored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.errors import PlanError, UsageError
from peftc.factors.joint import arrange, gathered
from peftc.models.model import Model
from peftc.models.targets import find_targets
from peftc.options import Budgets
from peftc.plans.plan import Budget, Plan, Target, budget_of, check_plan, read_plan
from peftc.report import grouped

APART = {  # options that cannot be combined, and why
    ("joint", "keep_all_ranks"): "the ordered factors of a module are kept apart, so that each can be cut",
    ("joint", "plan"): "a plan says itself which modules share a factor, under `joint`",
    ("joint", "speedup"): "modules are timed one by one, and a shared factor is not the time of any one of them",
    ("sequential", "keep_all_ranks"): "each module is fitted to the ranks of those before it",
    ("sequential", "joint"): "the statistics of a group's members are not collected again",
}


def refuse_together(given: Mapping[str, Any]) -> None:
    """Refuse two options that cannot be combined, among the parameters of a step; a UsageError names both."""
    there = {name for name, value in given.items() if value is not None and value is not False}
    for (one, other), why in APART.items():
        if there >= {one, other}:
            what = f"`--{one}` and `--{other.replace('_', '-')}` cannot be combined"
            raise UsageError(what, why=why, hint="leave one of them out")


def asked_budget(plan: str | Path | Plan | None, budgets: Budgets, *, keep_all_ranks: bool = False) -> Budget | None:
    """Return the budget, None with a plan or where all ranks are kept; UsageError unless it is one of these."""
    asked = vars(budgets)
    if plan is None and not keep_all_ranks:
        return budget_of(**asked)
    other = next((f"`--{name.replace('_', '-')}`" for name, value in asked.items() if value is not None), None)
    if keep_all_ranks and (other or plan is not None):
        other = other or "`--plan`"
        why = "every rank is kept; the budget comes when they are cut"
        hint = f"leave {other} out here, and give it to `peftc truncate`"
        raise UsageError(f"`--keep-all-ranks` takes no budget, but {other} is given", why=why, hint=hint)
    if other:
        why = "a plan already says the ranks"
        raise UsageError(f"`--plan` and {other} contradict each other", why=why, hint="give one of them")
    return None


def asked_plan(
    plan: str | Path | Plan | None, targets: dict[str, Target], model: Model | None = None, *, joint: bool = False
) -> Plan | None:
    """Return the plan that was asked for, checked against the eligible modules.

    Args:
        plan: as it was asked for.
        targets: those that share a down factor by the plan, or are ``joint``, become one.
        model: whose they are; None where factors cannot be shared.
        joint: whether modules that read one input are to share a down factor.
    """
    given = read_plan(Path(plan)) if isinstance(plan, str | Path) else plan
    if model is not None:
        arrange(model, targets, given, joint)
    elif given is not None and given.joint:
        hint = "decompose the dense model by this plan: `peftc decompose MODEL --plan FILE`"
        raise PlanError("the plan lets modules share a down factor, and ordered factors are kept apart", hint=hint)
    if given is not None:
        check_plan(gathered(given), targets)
    return given


def request_of(budget: Budget | None, allocation: str, plan: Plan | None) -> dict[str, Any]:
    """Return what a request says of how far to factor."""
    return {
        "budget": {budget.kind: str(budget.amount)} if budget else None,
        "allocation": allocation if budget else None,
        "plan": plan.to_json() if plan else None,
    }


def words(budget: Budget | None, allocation: str, plan: object) -> tuple[str, str]:
    """Return what was asked, and why a module stays dense under it."""
    if budget is None:
        return f"--plan {plan}", "the plan keeps it"
    if budget.kind in ("rank", "energy"):  # these two leave nothing to allocate
        return str(budget), "its factors would not be smaller"
    greedy = "the budget keeps it, or its factors would not shrink"
    return f"{budget}, {allocation}", "its factors would not be smaller" if allocation == "uniform" else greedy


def eligible(
    model: Model, *, conv_method: str, include: Sequence[str], skip: Sequence[str]
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the modules to factor and the reasons why others stay dense; PlanError where there are none to factor."""
    targets, reasons = find_targets(model, conv_method=conv_method, include=include, skip=skip)
    if not targets:
        groups = grouped(reasons)
        listed = ", ".join(f"`{kind}` ({reasons[names[0]]})" for kind, names in list(groups.items())[:4])
        raise PlanError(
            f"`{model.name}` has no eligible module",
            why=f"left dense: {listed}" if listed else "it has no Linear, Conv2d or Embedding module",
            hint="make some eligible: `--include PATTERN`"
            if model.manifest is None or not model.manifest.modules
            else "what could be factored is: decompose its base again, to another budget",
        )
    return targets, reasons
