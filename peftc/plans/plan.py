"""A budget, and the plan that it leads to: the rank of every module, printable and editable JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from peftc.errors import PlanError, UsageError, did_you_mean
from peftc.plans import allocate
from peftc.plans.allocate import Use
from peftc.report import AMOUNTS, scaled
from peftc.store import documents

SCHEMA_VERSION = 1
OTHERS = {  # fields of a plan beside its ranks; the last is for those who write one by hand
    "forms": {str: str},
    "reasons": {str: str},
    "method": str,
    "settings": dict,
    "asked": str,
    "joint": [[str]],
    "note": str,
}


@dataclass(frozen=True)
class Budget:
    """Exactly one of ratio, rank, energy, target-params, target-macs, speedup, and its amount."""

    kind: str
    amount: Fraction | int

    def __str__(self) -> str:
        return f"--{self.kind} {self.amount}"


def ratio_of(value: str | float | Fraction, option: str = "--ratio") -> Fraction:
    """Return a share in (0, 1], as ``2/3``, ``0.667`` or 2 / 3, which is exactly two thirds; UsageError for others."""
    share = _fraction(value)
    if not 0 < share <= 1:
        why = "it is a share kept: above 0, at most 1, as `0.5` or `2/3`"
        raise UsageError(f"`{option} {value}` is out of range", why=why)
    return share


def _fraction(asked: Any) -> Fraction:
    """Return a number as people write it, or 0 where it is none."""
    try:
        return Fraction(asked if isinstance(asked, Fraction) else str(asked)).limit_denominator(1_000_000)
    except (ValueError, ZeroDivisionError, OverflowError):
        return Fraction(0)


def _positive(option: str, asked: Any) -> int:
    try:
        value = float(asked) if not isinstance(asked, str) else scaled(asked, AMOUNTS)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise UsageError(f"`{option} {asked}` is out of range", why="it is a whole number, 1 or more")
    return int(value)


@dataclass(frozen=True)
class Input:
    """What a model is timed on: 16 samples at once, of the model's own size in pixels or tokens, where None says so."""

    batch_size: int | None
    image_size: int | None
    max_length: int | None
    device: str
    seed: int


@dataclass(frozen=True)
class Aim:
    """How far to factor: a budget, its allocation, what ranks are multiples of, and what a speed-up is timed on."""

    budget: Budget
    allocation: str
    multiple: int = 1
    timed: Input = Input(None, None, None, "auto", 0)

    @property
    def needs_spectra(self) -> bool:
        """Whether ranks depend on the weights, not on their shapes alone."""
        return self.budget.kind == "energy" or (self.budget.kind != "rank" and self.allocation != "uniform")

    @property
    def needs_weights(self) -> bool:
        """Whether a network without numbers is not enough to decide."""
        return self.budget.kind == "speedup" or self.needs_spectra


def multiple_of(asked: Any, *, planned: bool = False) -> int:
    """Return what ranks are to be multiples of; UsageError where it is no number from 1, or they are ``planned``."""
    multiple = _positive("--rank-multiple", asked)
    if planned and multiple > 1:
        why = "a plan already says the ranks"
        hint = "give `--rank-multiple` where the plan is made: `peftc analyze MODEL --plan FILE --rank-multiple N`"
        raise UsageError("`--plan` and `--rank-multiple` contradict each other", why=why, hint=hint)
    return multiple


ASK = "`peftc analyze MODEL --data DATA` says which ratio is safe to try"
KINDS = ("ratio", "rank", "energy", "target-params", "target-macs", "speedup")


def budget_of(**asked: str | float | Fraction | None) -> Budget:
    """Return the one budget that was asked for; UsageError where none or several were, or its amount is out of range.

    Args:
        asked: by kind, as ``target_params``; None where it was not.
    """
    given = {kind.replace("_", "-"): amount for kind, amount in asked.items() if amount is not None}
    if len(given) != 1:
        options = ", ".join(f"`--{kind}`" for kind in given or KINDS)
        what = f"give exactly one budget; {'these contradict each other' if given else 'there is none'}: {options}"
        hint = "for half the weights of the eligible modules: `--ratio 0.5`"
        raise UsageError(what, hint=hint if given else f"{hint}; {ASK}")
    ((kind, amount),) = given.items()
    if kind in ("ratio", "energy"):
        return Budget(kind, ratio_of(amount, f"--{kind}"))
    if kind == "speedup":
        value = _fraction(amount)
        if value > 1:
            return Budget(kind, value)
        why = "it is how many times faster the model is to be: above 1, as 1.5"
        raise UsageError(f"`--speedup {amount}` is out of range", why=why)
    return Budget(kind, _positive(f"--{kind}", amount))


@dataclass(frozen=True)
class Target:
    """One eligible module, or a group of them that share their input and are to share one down factor.

    Attributes:
        name: dotted; of a group, that of its first member.
        form: how its weight is seen as a matrix; ``linear`` for a group.
        shape: of the weight; of a group (sum of the members' outputs, in), that of the stack of their matrices.
        aliases: other modules that share the weight.
        uses: how one sample runs through the weight, by this module and its aliases.
        members: of a group, its modules in the order of the stack; else empty.
        outs: of a group, how many outputs each member has.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    uses: tuple[Use, ...] = ()
    members: tuple[str, ...] = ()
    outs: tuple[int, ...] = ()

    @property
    def entries(self) -> int:
        """Number of dense weight entries."""
        return math.prod(self.shape)

    def cost(self, rank: int | None, unit: str) -> int:
        """Return the entries, or with unit ``macs`` the multiply-adds, at ``rank``; None is dense."""
        if unit == "macs":
            return sum(allocate.macs(self.shape, use, rank) for use in self.uses)
        return allocate.entries(self.shape, self.form, rank)


@dataclass
class Plan:
    """What to do with each module, and why.

    Attributes:
        ranks: module -> rank, or None where it stays dense.
        forms: module -> form, for those with a rank.
        reasons: module -> why it stays dense.
        method, settings: of the decomposition; empty in a plan written by hand.
        asked: the budget and allocation that led here, in words.
        joint: the groups of modules that share one down factor, and so their rank.
    """

    ranks: dict[str, int | None]
    forms: dict[str, str]
    reasons: dict[str, str] = field(default_factory=dict)
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    asked: str = ""
    joint: list[list[str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values; ``joint`` only where there is a group."""
        values = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return values if self.joint else {key: value for key, value in values.items() if key != "joint"}

    def write(self, path: Path) -> None:
        """Write the plan for people to read and edit."""
        documents.write_whole(path, json.dumps(self.to_json(), indent=2) + "\n")


def read_plan(path: Path) -> Plan:
    """Return the plan in a JSON file; PlanError where it is unreadable, or no plan."""
    try:
        value = documents.read_json(path)
    except (OSError, ValueError) as error:
        usual = "`peftc analyze MODEL --ratio 0.5 --plan plan.json` writes one"
        reason = "the path does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise PlanError(f"cannot read the plan `{path}`", why=reason, hint=did_you_mean(path, usual)) from None
    if not isinstance(value, dict) or not isinstance(value.get("ranks"), dict):
        raise PlanError(f"`{path}` is no plan", why="it has no map `ranks` from module to rank")
    if value.get("schema_version") != SCHEMA_VERSION:
        what = f"`{path}` has schema version {value.get('schema_version')!r}; this peftc reads {SCHEMA_VERSION}"
        raise PlanError(what)
    unknown = sorted(value.keys() - OTHERS.keys() - {"schema_version", "ranks"})
    if unknown:
        known = ", ".join(f"`{name}`" for name in ("ranks", *OTHERS))
        raise PlanError(f"`{path}` has an unknown field `{unknown[0]}`", why=f"the fields of a plan are {known}")
    if why := documents.misfit(value, {f"{name}?": shape for name, shape in OTHERS.items()}):
        raise PlanError(f"`{path}` is no plan", why=why)
    ranks = value["ranks"]
    wrong = next(
        (name for name, rank in ranks.items() if rank is not None and (type(rank) is not int or rank < 1)), None
    )
    if wrong is not None:
        what = f"`{path}` gives `{wrong}` the rank {ranks[wrong]!r}"
        raise PlanError(what, why="a rank is a whole number from 1, or null for dense")
    _check_joint(path, value.get("joint", []), ranks)
    return Plan(ranks, **{"forms": {}, **{name: value[name] for name in OTHERS if name in value and name != "note"}})


def _check_joint(path: Path, groups: list[list[str]], ranks: Mapping[str, int | None]) -> None:
    if not all(len(names) > 1 for names in groups):
        raise PlanError(f"`{path}` is no plan", why="`joint` is not a list of groups of two or more modules")
    together = [name for names in groups for name in names]
    if len(set(together)) < len(together):
        raise PlanError(f"`{path}` is no plan", why="a module stands twice in `joint`")
    for names in groups:
        if len({ranks.get(name) for name in names}) > 1:
            listed = ", ".join(f"`{name}` {ranks.get(name) or 'dense'}" for name in names)
            what = f"`{path}` gives different ranks to modules that share a down factor: {listed}"
            why = "one factor has one rank"
            raise PlanError(what, why=why, hint="give them one rank, or take the group out of `joint`")


def check_plan(plan: Plan, targets: Mapping[str, Target]) -> None:
    """Refuse, as PlanError, a plan of modules that are not eligible, in another form, or at ranks that save nothing."""
    for name, rank in plan.ranks.items():
        if rank is None:
            continue
        if name not in targets:
            what = f"the plan gives `{name}` the rank {rank}, but it is not among the eligible modules"
            why = "the plan was made for another model, or with other `--include` and `--skip`"
            raise PlanError(what, why=why, hint=f"include it: `--include {name}`, or remove it from the plan")
        target = targets[name]
        if plan.forms.get(name, target.form) != target.form:
            what = f"the plan factors `{name}` as `{plan.forms[name]}`; now it would be `{target.form}`"
            raise PlanError(what, hint=f"use the plan's form: `--conv-method {plan.forms[name]}`")
        limit = allocate.break_even_rank(target.shape, target.form)
        if rank > limit:
            raise PlanError(
                f"cannot decompose `{name}` at rank {rank}",
                why=f"its weight is {' x '.join(map(str, target.shape))}; above rank {limit} the factors hold no fewer "
                "entries than the weight",
                hint="lower the rank in the plan, or set it to null to leave the module dense",
            )
