"""A speed-up is measured on the whole model, the ranks that reach it are kept as a plan, and noise is never a result.

The clock of most tests counts multiply-adds and calls, so that they say the same on every machine.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peftc.errors import ArtifactError, PlanError, UsageError
from peftc.factors import factoring, speedup
from peftc.factors.speedup import search
from peftc.measure import costs, latency
from peftc.measure.costs import Seconds
from peftc.measure.latency import Measured, Pace, SiteTimes, isotonic, pace
from peftc.models import load as models
from peftc.models import write
from peftc.plans import plan
from peftc.steps.analyze import analyze
from peftc.steps.decompose import decompose
from peftc.store.source import Source
from tests.conftest import promised
from tests.networks import Convolutions, Perceptron, save_network

PER_MAC, PER_CALL = 1e-9, 1e-4


class Wide(nn.Module):
    """Three wide linears of two shapes, a narrow one that no factors make faster, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(256, 512)
        self.layers = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        self.narrow = nn.Linear(512, 12)
        self.last = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.narrow(self.layers(self.first(x))))


class Counted(TorchDispatchMode):
    """Count operations."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def counted(call: Callable[[], object]) -> float:
    """Return what a call costs on a clock of its own: multiply-adds, and something for each operation."""
    with Counted() as operations, FlopCounterMode(display=False) as products:
        call()
    return PER_MAC * products.get_total_flops() / 2 + PER_CALL * operations.calls


class Clock:
    """`measure.latency` without a clock; models that are factored run ``slack`` times as long as their products say."""

    def __init__(self, slack: float = 1.0) -> None:
        self.slack, self.titles = slack, list[str]()

    def __call__(self, calls: Mapping[str, Any], *, rounds: int, title: str = "", **_: Any) -> Seconds:
        self.titles.append(title)
        found = {}
        for label, call in calls.items():
            found[label] = [counted(call) * (self.slack if label == "factored" else 1)] * rounds
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock(slack=1.1)
    monkeypatch.setattr(costs, "latency", found)
    return found


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make every further measurement an error."""

    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("something was measured again")

    return lambda: monkeypatch.setattr(costs, "latency", measured)


@pytest.fixture
def wide(tmp_path: Path) -> Source:
    torch.save(Wide().state_dict(), tmp_path / "weights.pth")
    return Source("python:tests.factors.test_speedup:Wide", weights=tmp_path / "weights.pth", allow_code=True)


def seconds(model: nn.Module, batch: Tensor) -> float:
    def call() -> None:
        with torch.inference_mode():
            model(batch)

    return counted(call)


# the search


def measured(value: float, noise: float = 1.01) -> Measured:
    return Measured(value, value * 0.99, value * 1.01, 1 / noise, noise, f"{value:.2f}x faster", 9)


PACES = {name: Pace({rank: 100 * rank for rank in range(1, 90)}, 10_000) for name in "abcdefghijkl"}
MODULES, WHOLE = len(PACES), 10_000 * len(PACES)


def solve(limit: int) -> dict[str, int | None]:
    """Spend a limit module by module: dense the first ones, then one at a rank, then the smallest."""
    ranks: dict[str, int | None] = {}
    left = limit - 100 * MODULES
    for name in PACES:
        dense = left >= 9_900
        ranks[name] = None if dense else min(1 + max(left, 0) // 100, 89)
        left -= 9_900 if dense else 100 * (int(ranks[name] or 0) - 1)
    return ranks


def world(rest: float, slack: float, power: float = 1.0) -> Callable[[Any], Measured]:
    """Return a model in which modules take ``slack`` times as long as by themselves, and other things take ``rest``."""

    def value(ranks: Mapping[str, int | None]) -> Measured:
        shares = [PACES[name].cost(rank) / 10_000 for name, rank in ranks.items()]
        share = sum(slack * share**power if share < 1 else 1 for share in shares) / MODULES
        return measured((rest + 1) / (rest + share))

    return value


@pytest.mark.parametrize("rest", [0.1, 0.5])
@pytest.mark.parametrize("slack", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("asked", [1.1, 1.3, 1.8])
def test_the_search_ends_at_what_was_asked(rest: float, slack: float, power: float, asked: float) -> None:
    tries = search(asked, PACES, int(WHOLE * (1 + rest)), solve, world(rest, slack, power))
    assert tries[-1].measured.value == pytest.approx(asked, rel=0.05)
    assert len(tries) <= speedup.TRIES


def test_the_first_guess_serves_where_times_add_up() -> None:
    assert len(search(1.5, PACES, 3 * WHOLE // 2, solve, world(0.5, 1.0))) == 1


def test_what_the_lowest_ranks_do_not_reach_is_refused_with_the_best_that_was_measured() -> None:
    with pytest.raises(PlanError, match=r"`--speedup 4` is out of reach: the best that was measured is 2\.94x") as told:
        search(4, PACES, 3 * WHOLE // 2, solve, world(0.5, 1.0))
    assert "ask for at most `--speedup 2.86`" in str(told.value)


def test_a_machine_on_which_nothing_is_faster_is_told_so() -> None:
    with pytest.raises(PlanError, match=r"the best that was measured is 0\.90x") as told:
        search(1.5, PACES, 3 * WHOLE // 2, solve, lambda ranks: measured(0.9))
    assert "--include" in str(told.value) and "at most" not in str(told.value)


def test_a_model_that_jumps_over_what_was_asked_is_refused() -> None:
    def jump(ranks: Mapping[str, int | None]) -> Measured:
        return measured(1.2 if (ranks["f"] or 90) > 40 else 2.0)

    with pytest.raises(PlanError, match=r"`--speedup 1\.5` was not met: 1\.20x, .*2\.00x were measured"):
        search(1.5, PACES, 3 * WHOLE // 2, solve, jump)


def test_a_speed_up_inside_the_noise_is_refused() -> None:
    with pytest.raises(PlanError, match=r"1\.2x cannot be told from noise here: 1\.20x was measured"):
        search(1.2, PACES, 3 * WHOLE // 2, solve, lambda ranks: measured(1.2, noise=1.25))


def test_no_gain_is_not_close_to_a_small_one() -> None:
    with pytest.raises(PlanError, match="was not met"):
        search(1.03, PACES, 3 * WHOLE // 2, solve, lambda ranks: measured(1.0 if (ranks["f"] or 90) > 40 else 1.2))


def test_a_machine_too_busy_to_time_a_module_is_refused(wide: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(calls: Mapping[str, Any], *, rounds: int, **_: Any) -> Seconds:
        return {label: [2.0 if label == "control" else 1.0] * rounds for label in calls}

    monkeypatch.setattr(costs, "latency", busy)
    with pytest.raises(
        PlanError, match=r"1\.5x cannot be told from noise here\n  cause: .*measured to be 2\.00x its own"
    ):
        analyze(wide, speedup=1.5)


# from a few ranks to all


def test_isotonic_rises_and_keeps_what_rises() -> None:
    assert isotonic([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
    assert isotonic([1.0, 4.0, 2.0, 5.0]) == [1.0, 3.0, 3.0, 5.0]
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


def test_a_pace_lies_between_what_was_timed_and_ends_where_nothing_is_gained() -> None:
    timed = SiteTimes(10e-6, 1.3, (1, 11, 21), (1e-6, 3e-6, 13e-6))
    found = pace(range(1, 22), [timed, timed])
    assert found.dense == 20_000
    assert (found.costs[1], found.costs[6], found.costs[11]) == (2000, 4000, 6000)
    assert max(found.costs) == 15  # 14 us of the 20, and 16 us are within the noise
    assert found.cost(21) == found.cost(None) == 20_000
    assert list(found.costs.values()) == sorted(found.costs.values())


def test_a_module_that_is_slower_at_every_rank_has_no_rank() -> None:
    assert pace([1, 2], [SiteTimes(1e-6, 1.01, (1, 2), (0.995e-6, 2e-6))]).costs == {}
    assert pace([], []).costs == {}


def test_of_ranks_that_take_the_same_time_the_largest_is_left() -> None:
    found = pace([1, 2, 3, 4], [SiteTimes(9e-6, 1.01, (1, 2, 3, 4), (2e-6, 2e-6, 1e-6, 8e-6))])
    curve = found.curve(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5]) / 8)
    assert (curve.ranks, curve.losses) == ((3, 4), [1 / 8, 0.5 / 8])


def test_a_few_ranks_are_timed_the_first_and_the_last_among_them() -> None:
    some = latency.grid(range(8, 1000, 8))
    assert len(some) == len(latency.SHARES) and (some[0], some[-1]) == (8, 992)
    assert latency.grid([3]) == [3] and latency.grid([]) == []


# the whole step


@pytest.mark.parametrize("allocation", ["energy", "global", "convex", "uniform"])
def test_the_result_is_as_fast_as_asked(clock: Clock, wide: Source, tmp_path: Path, allocation: str) -> None:
    report = decompose(wide, output_dir=tmp_path / "small", speedup=1.5, allocation=allocation)
    found = report.data["speedup"]
    assert found["asked"] == 1.5 and found["value"] == pytest.approx(1.5, rel=0.05)
    batch = torch.randn(16, 256)
    small = models.load_module(tmp_path / "small", allow_code=True)
    assert seconds(Wide(), batch) / (1.1 * seconds(small, batch)) == pytest.approx(found["value"], rel=1e-6)
    assert sum(title.startswith("timing shape") for title in clock.titles) == len(found["shapes"]) == 3
    assert [row["count"] for row in found["shapes"]] == [1, 2, 1]
    reasons = {row["name"]: row["reason"] for row in report.data["modules"]}
    assert reasons["narrow"] == "its factors are not measurably faster here"
    assert any("where 1.5x was asked: batches of 16" in note for note in report.notes)


def test_what_is_recorded_is_the_plan_and_its_commands_rebuild_the_same_bytes(
    peftc, clock: Clock, wide: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [wide.spec, "--weights", "weights.pth", "--allow-code", "--speedup", "1.5", "--rank-multiple", 4]
    assert peftc("decompose", *words, "-o", "small").exit_code == 0
    request = json.loads((tmp_path / "small" / "peftc.json").read_text())["steps"][-1]["request"]
    assert request["budget"] is None and "timed" not in request and "rank_multiple" not in request
    ranks = [rank for rank in request["plan"]["ranks"].values() if rank]
    assert ranks and all(rank % 4 == 0 for rank in ranks)
    text, line = peftc("show", "small", "--commands").stdout.split("\nPLAN\n")
    first, _, content = text.partition("\n")
    assert first == "cat >01-decompose.json <<'PLAN'"
    (tmp_path / "01-decompose.json").write_text(content)
    again = peftc(*shlex.split(line)[1:])
    assert again.exit_code == 0, (line, again.stderr)
    assert promised(tmp_path / "01-decompose") == promised(tmp_path / "small")


def test_the_same_command_again_measures_nothing(
    clock: Clock, stopped: Callable[[], None], wide: Source, tmp_path: Path
) -> None:
    first = decompose(wide, output_dir=tmp_path / "small", speedup=1.5)
    before = promised(tmp_path / "small")
    stopped()
    again = decompose(wide, output_dir=tmp_path / "small", speedup="3/2", batch_size=16)
    assert "already done" in again.notes[-1]
    assert again.data["speedup"] == json.loads(json.dumps(first.data["speedup"]))
    assert promised(tmp_path / "small") == before
    with pytest.raises(ArtifactError, match=r"budget was speedup 3/2, now it is speedup 2"):
        decompose(wide, output_dir=tmp_path / "small", speedup=2)
    with pytest.raises(ArtifactError, match=r"timed was 16, none, none, now it is 8, none, none"):
        decompose(wide, output_dir=tmp_path / "small", speedup=1.5, batch_size=8)
    with pytest.raises(ArtifactError, match=r"rank-multiple was not given, now it is 2"):
        decompose(wide, output_dir=tmp_path / "small", speedup=1.5, rank_multiple=2)


@pytest.mark.parametrize(
    ("place", "moment"),
    [(write, "write_artifact"), (write, "verify"), (factoring, "save_part")],
    ids=["write", "verify", "part"],
)
def test_a_run_that_is_interrupted_goes_on_with_the_ranks_it_had_found(
    clock: Clock,
    stopped: Callable[[], None],
    wide: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    moment: str,
) -> None:
    decompose(wide, output_dir=tmp_path / "whole", speedup=1.5, allocation="uniform")
    with monkeypatch.context() as patch:
        patch.setattr(place, moment, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            decompose(wide, output_dir=tmp_path / "small", speedup=1.5, allocation="uniform")
    assert not (tmp_path / "small").exists()
    stopped()
    report = decompose(wide, output_dir=tmp_path / "small", speedup=1.5, allocation="uniform")
    assert promised(tmp_path / "small") == promised(tmp_path / "whole")
    assert report.data["speedup"]["shapes"]
    assert not (tmp_path / "small.partial").exists()


def test_analyze_plans_what_decompose_carries_out(
    clock: Clock, stopped: Callable[[], None], wide: Source, tmp_path: Path
) -> None:
    report = analyze(wide, speedup=1.5, plan=tmp_path / "plan.json")
    assert report.data["speedup"]["value"] == pytest.approx(1.5, rel=0.05)
    made = plan.read_plan(tmp_path / "plan.json")
    assert made.ranks["narrow"] is None and "not measurably faster" in made.reasons["narrow"]
    decompose(wide, output_dir=tmp_path / "other", speedup=1.5)
    stopped()
    decompose(wide, output_dir=tmp_path / "small", plan=tmp_path / "plan.json")
    files = promised(tmp_path / "small")
    theirs = models.load_module(tmp_path / "other", allow_code=True).state_dict()
    mine = models.load_module(tmp_path / "small", allow_code=True).state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert decompose(wide, output_dir=tmp_path / "small", plan=tmp_path / "plan.json").artifact == tmp_path / "small"
    assert promised(tmp_path / "small") == files


def test_a_dry_run_measures_and_writes_nothing(clock: Clock, wide: Source, tmp_path: Path) -> None:
    report = decompose(wide, output_dir=tmp_path / "small", speedup=1.5, allocation="uniform", dry_run=True)
    assert report.data["speedup"]["value"] == pytest.approx(1.5, rel=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.pth"]


def test_what_is_out_of_reach_leaves_nothing_behind(clock: Clock, wide: Source, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"`--speedup 1000` is out of reach: the best that was measured is \d+\.\d\dx"):
        decompose(wide, output_dir=tmp_path / "small", speedup=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.pth"]


def test_a_model_whose_modules_do_not_gain_is_refused(clock: Clock, tmp_path: Path) -> None:
    source = save_network(tmp_path / "model", "python", "Perceptron", {})
    with pytest.raises(
        PlanError, match=r"best that was measured is 1\.00x\n  cause: no eligible module gets measurably"
    ):
        decompose(source, output_dir=tmp_path / "small", speedup=1.2)


@pytest.mark.parametrize("conv_method", ["spatial", "channel"])
@pytest.mark.parametrize("allocation", ["energy", "uniform"])
def test_convolutions_are_timed_at_their_own_input(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conv_method: str, allocation: str
) -> None:
    monkeypatch.setattr("tests.factors.test_speedup.PER_CALL", 1e-7)
    source = save_network(tmp_path / "model", "python", "Convolutions", {})
    report = decompose(
        source, output_dir=tmp_path / "small", speedup=1.1, conv_method=conv_method, allocation=allocation,
        rank_multiple=2, image_size=64, batch_size=2,
    )  # fmt: skip
    assert report.data["speedup"]["value"] == pytest.approx(1.1, rel=0.05)
    inputs = {row["modules"][0]: row["input"] for row in report.data["speedup"]["shapes"]}
    assert inputs["odd"] == [2, 32, 14, 14]
    ranks = [row["rank"] for row in report.data["modules"] if row["rank"]]
    assert ranks and all(rank % 2 == 0 for rank in ranks)


def test_tied_weights_are_timed_in_both_their_places(clock: Clock, tiny_bert_mlm: Path, monkeypatch) -> None:
    monkeypatch.setattr("tests.factors.test_speedup.PER_CALL", 1e-9)
    report = analyze(tiny_bert_mlm, speedup=1.1, include=["word_embeddings", "decoder"], max_length=16, batch_size=4)
    forms = {(row["form"], tuple(row["modules"])) for row in report.data["speedup"]["shapes"] if "word" in str(row)}
    assert {form for form, _ in forms} == {"embedding", "linear"}


def test_a_model_that_does_not_run_is_refused(clock: Clock, wide: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("not today")

    monkeypatch.setattr(Wide, "forward", fail)
    with pytest.raises(PlanError, match="cannot be timed\n  cause: it does not run on a random input: not today"):
        analyze(wide, speedup=1.5)


def test_a_real_clock_gives_a_result_or_says_why_not(
    wide: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of any speed and load: what is claimed is measured, what is not claimed leaves nothing."""
    monkeypatch.setattr(latency, "RUNS", 1)
    monkeypatch.setattr(latency, "MODEL_SECONDS", 0.5)
    try:
        report = decompose(wide, output_dir=tmp_path / "small", speedup=1.2, batch_size=64)
    except PlanError as refusal:
        assert any(text in str(refusal) for text in ("out of reach", "was not met", "cannot be told from noise"))
        assert not list(tmp_path.glob("small*"))
    else:
        found = report.data["speedup"]
        assert abs(found["value"] / 1.2 - 1) <= 0.05 and found["noise_high"] < 1.2
        assert found["low"] <= found["value"] <= found["high"] and found["rounds"] >= 7
        assert any(row["rank"] for row in report.data["modules"])


# refusals


@pytest.mark.parametrize("value", [1, 0.5, "1/2", "nan", float("inf"), -2, 0, "fast", ""])
def test_a_speed_up_is_above_one(peftc, wide: Source, tmp_path: Path, value: Any) -> None:
    with pytest.raises(UsageError, match="`--speedup .*` is out of range"):
        decompose(wide, output_dir=tmp_path / "small", speedup=value)
    result = peftc("decompose", "nowhere", f"--speedup={value}")
    assert result.exit_code == 2 and "--speedup" in result.stderr and "Traceback" not in result.stderr


def test_two_budgets_contradict_each_other(wide: Source) -> None:
    with pytest.raises(UsageError, match="contradict each other: `--ratio`, `--speedup`"):
        decompose(wide, ratio=0.5, speedup=1.5)
    with pytest.raises(UsageError, match="`--plan` and `--speedup` contradict each other"):
        decompose(wide, plan="plan.json", speedup=1.5)


@pytest.mark.parametrize("step", [decompose, analyze])
@pytest.mark.parametrize("multiple", [0, -8, 1.5, "x"])
def test_a_multiple_is_a_whole_number_from_one(step: Callable[..., Any], wide: Source, multiple: Any) -> None:
    with pytest.raises(UsageError, match="`--rank-multiple .*` is out of range"):
        step(wide, ratio=0.5, rank_multiple=multiple)


def test_a_plan_has_its_multiples_already(peftc, wide: Source) -> None:
    with pytest.raises(UsageError, match="`--plan` and `--rank-multiple` contradict each other"):
        decompose(wide, plan="plan.json", rank_multiple=8)
    assert peftc("decompose", "nowhere", "--ratio", 0.5, "--rank-multiple", 0).exit_code == 2


# multiples under every other budget

BUDGETS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 21},
    "energy": {"energy": 0.7},
    "target-params": {"target_params": 6_000},
    **{f"ratio-{name}": {"ratio": 0.6, "allocation": name} for name in ("uniform", "global", "energy", "convex")},
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("network", [Perceptron, Convolutions])
@pytest.mark.parametrize("conv_method", ["spatial", "channel"])
def test_every_rank_is_a_multiple(budget: dict[str, Any], multiple: int, network: Any, conv_method: str) -> None:
    if network is Convolutions and "target_params" in budget:
        budget = {"target_params": 60_000}
    torch.manual_seed(0)
    report = decompose(network(), **budget, rank_multiple=multiple, conv_method=conv_method, dry_run=True)
    ranks = [row["rank"] for row in report.data["modules"] if row["rank"]]
    assert ranks, budget
    assert all(rank % multiple == 0 for rank in ranks)
    assert all(row["parameters_after"] <= row["parameters_before"] for row in report.data["modules"])


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_energy_is_kept_whatever_the_multiple(tmp_path: Path, multiple: int) -> None:
    source = save_network(tmp_path / "model", "python", "Perceptron", {"width": 96})
    report = decompose(source, output_dir=tmp_path / "small", energy=0.6, rank_multiple=multiple)
    errors = [row["error"] for row in report.data["modules"] if row["rank"]]
    assert errors and all(error**2 <= 0.4 + 1e-9 for error in errors)


def test_a_rank_is_rounded_down_but_to_one_multiple_at_least(wide: Source) -> None:
    def ranks(rank: int, multiple: int) -> dict[str, Any]:
        report = decompose(wide, rank=rank, rank_multiple=multiple, dry_run=True)
        return {row["name"]: row["rank"] for row in report.data["modules"]}

    assert ranks(100, 8)["first"] == 96
    assert ranks(3, 8) == {"first": 8, "layers.0": 8, "layers.2": 8, "narrow": 8}
    assert ranks(3, 16)["narrow"] is None, "sixteen would not make it smaller"


def test_multiples_are_part_of_the_question(wide: Source, tmp_path: Path) -> None:
    decompose(wide, output_dir=tmp_path / "small", ratio=0.5)
    with pytest.raises(ArtifactError, match="rank-multiple was not given, now it is 8"):
        decompose(wide, output_dir=tmp_path / "small", ratio=0.5, rank_multiple=8)
    decompose(wide, output_dir=tmp_path / "eights", ratio=0.5, rank_multiple=8)
    with pytest.raises(ArtifactError, match="rank-multiple was 8, now it is not given"):
        decompose(wide, output_dir=tmp_path / "eights", ratio=0.5)
