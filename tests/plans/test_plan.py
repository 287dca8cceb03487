"""A budget is one and in range; a plan survives its file, and one that does not fit the model is refused by name."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import PlanError, UsageError
from peftc.plans import plan as plans
from peftc.plans.allocate import Use
from peftc.plans.plan import Budget, Plan, Target, budget_of, check_plan, ratio_of, read_plan

TARGETS = {
    "fc": Target("fc", "linear", (20, 30)),
    "conv": Target("conv", "channel", (8, 6, 3, 3)),
    "core": Target("core", "spatial", (8, 6, 3, 3)),
}


@pytest.mark.parametrize("value", ["2/3", 2 / 3, "0.666667", Fraction(2, 3), " 2/3 "])
def test_two_thirds_are_two_thirds_however_written(value: Any) -> None:
    expected = Fraction(666667, 1_000_000) if value == "0.666667" else Fraction(2, 3)
    assert ratio_of(value) == expected


@pytest.mark.parametrize("value", [1, "1", 1.0, "100/100"])
def test_all_of_it_is_a_ratio(value: Any) -> None:
    assert ratio_of(value) == 1


@pytest.mark.parametrize(
    "value", [0, -0.5, 1.01, "3/2", "half", "1/0", "nan", "inf", float("nan"), "", "1e-9", "1e9999"]
)
def test_a_ratio_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="`--ratio .*` is out of range") as refusal:
        budget_of(ratio=value)
    assert refusal.match("above 0, at most 1")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"ratio": "0.5"}, Budget("ratio", Fraction(1, 2))),
        ({"rank": 8}, Budget("rank", 8)),
        ({"energy": 0.9}, Budget("energy", Fraction(9, 10))),
        ({"target_params": 1e6}, Budget("target-params", 1_000_000)),
        ({"target_macs": 2.0}, Budget("target-macs", 2)),
    ],
)
def test_one_budget_is_one_budget(asked: dict[str, Any], found: Budget) -> None:
    assert budget_of(**asked) == found
    assert str(found) == f"--{found.kind} {found.amount}"


def test_no_budget_and_two_budgets_are_refused() -> None:
    options = "`--ratio`, `--rank`, `--energy`, `--target-params`"
    with pytest.raises(UsageError, match=f"there is none: {options}") as refusal:
        budget_of()
    assert "peftc analyze" in str(refusal.value.hint)
    with pytest.raises(UsageError, match="contradict each other: `--ratio`, `--rank`"):
        budget_of(ratio=0.5, rank=3)


@pytest.mark.parametrize("option", ["rank", "target_params", "target_macs"])
@pytest.mark.parametrize("value", [0, -1, 2.5, float("inf"), float("nan")])
def test_an_amount_is_a_whole_number_from_one(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"`--{option.replace('_', '-')} .*` is out of range"):
        budget_of(**{option: value})


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan({"fc": 3, "core": 4, "conv": None}, {"fc": "linear", "core": "spatial"}, {"conv": "skipped"}, "svd")
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    check_plan(plan, TARGETS)


def test_a_plan_may_be_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 1, "ranks": {"fc": 3}, "note": "mine"}')
    plan = read_plan(tmp_path / "plan.json")
    assert plan == Plan({"fc": 3}, {})
    check_plan(plan, TARGETS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the plan"),
        ("[" * 100_000, "cannot read the plan"),
        ("\udcff", "cannot read the plan"),
        ("[]", "is no plan"),
        ('{"schema_version": 1}', "is no plan"),
        ('{"schema_version": 1, "ranks": [3]}', "is no plan"),
        ('{"schema_version": 1, "ranks": {}, "forms": []}', "is no plan"),
        ('{"ranks": {}}', "schema version None; this peftc reads 1"),
        ('{"schema_version": 2, "ranks": {}}', "schema version 2; this peftc reads 1"),
        *[
            (json.dumps({"schema_version": 1, "ranks": {"fc": rank}}), "gives `fc` the rank")
            for rank in (0, -1, 1.5, "3", True, [1], [2, 3], {})
        ],
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_plan_that_cannot_be_opened_is_refused_with_how_to_write_one(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot read the plan") as refusal:
        read_plan(tmp_path / "plan.json")
    assert refusal.match("--plan plan.json")


@pytest.mark.parametrize(
    ("ranks", "forms", "message"),
    [
        ({"head": 3}, {}, "gives `head` the rank 3, but it is not among the eligible modules"),
        ({"fc": 3}, {"fc": "channel"}, "factors `fc` as `channel`; now it would be `linear`"),
        ({"conv": 3}, {"conv": "spatial"}, "`--conv-method spatial`"),
        ({"fc": 21}, {}, "cannot decompose `fc` at rank 21"),
        ({"core": 11}, {}, "its weight is 8 x 6 x 3 x 3; above rank 10 the factors hold no fewer entries"),
        ({"fc": 13}, {}, "above rank 11 the factors hold no fewer entries than the weight"),
    ],
)
def test_a_plan_for_another_model_is_refused(ranks: Any, forms: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError) as refusal:
        check_plan(Plan(ranks, forms), TARGETS)
    assert message in str(refusal.value)


@pytest.mark.parametrize("ranks", [{"gone": None}, {"fc": 11}, {"core": 4}, {}])
def test_a_plan_that_fits_is_accepted(ranks: Any) -> None:
    check_plan(Plan(ranks, {}), TARGETS)


def test_a_plan_is_readable_json(tmp_path: Path) -> None:
    Plan({"fc": 3}, {"fc": "linear"}, asked="--ratio 1/2").write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '  "ranks": {\n    "fc": 3\n  }' in text
    assert json.loads(text)["schema_version"] == plans.SCHEMA_VERSION


def test_a_target_knows_its_costs() -> None:
    target = Target("fc", "linear", (20, 30), uses=(Use("linear", 7),))
    assert target.entries == target.cost(None, "entries") == 600
    assert target.cost(3, "entries") == 150
    assert target.cost(3, "macs") == 7 * 150


def test_every_use_of_a_shared_weight_costs_multiply_adds_in_its_own_form() -> None:
    tied = Target("words", "embedding", (100, 8), ("head",), uses=(Use("embedding", 5), Use("linear", 4)))
    assert tied.cost(None, "macs") == 4 * 800
    assert tied.cost(2, "macs") == 5 * 2 * 8 + 4 * 2 * 108
    assert tied.cost(2, "entries") == 2 * 108
