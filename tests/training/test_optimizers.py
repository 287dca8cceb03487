"""Optimizers by name, the shapes of the learning rate, and a training that stops early."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.errors import PeftcError, UsageError
from peftc.options import OPTIMIZERS, SCHEDULES, Recipe
from peftc.training import loop
from peftc.training.loop import fit
from peftc.training.optimizers import TABLE, optimizer_of
from peftc.training.schedule import SHAPES, Outcome, rate

SIZE = 64
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()
SHORT = Recipe(steps=12, batch_size=16, learning_rate=1e-2)
OF_TORCH = [name for name, row in TABLE.items() if row.package == "torch"]


class Killed(RuntimeError):
    """What stops a run."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))


def loss(module: nn.Module, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(X[rows]), Y[rows])


def run(recipe: Recipe, minimised: Any = loss, **options: Any) -> tuple[Outcome, nn.Module]:
    def batch(rows: Sequence[int], *_: Any) -> Tensor:
        return torch.tensor(list(rows))

    module = network()
    return fit(module, SIZE, batch, minimised, recipe, device="cpu", **options), module


def test_what_can_be_typed_is_what_there_is() -> None:
    assert tuple(TABLE) == OPTIMIZERS
    assert tuple(SHAPES) == SCHEDULES


@pytest.mark.parametrize("name", OF_TORCH)
def test_an_optimizer_learns_and_goes_on_where_it_was_killed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    recipe = replace(SHORT, optimizer=name)
    whole, expected = run(recipe)
    assert whole.losses[-1] < whole.losses[0]
    calls = iter(range(100))

    def killed(module: nn.Module, rows: Tensor) -> Tensor:
        if next(calls) == 5:
            raise Killed
        return loss(module, rows)

    with pytest.raises(Killed):
        run(recipe, killed, folder=tmp_path)
    resumed, found = run(recipe, folder=tmp_path)
    assert resumed.resumed == 5 and resumed.losses == whole.losses
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_matrices_decay_by_every_optimizer() -> None:
    for name in OF_TORCH:
        groups = optimizer_of(
            name, network(), learning_rate=0.1, weight_decay=0.5, place=torch.device("cpu")
        ).param_groups
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0], name
        assert all(each.ndim >= 2 for each in groups[0]["params"]), name
        assert all(each.ndim < 2 for each in groups[1]["params"]), name


@pytest.mark.parametrize("name", [name for name in TABLE if name not in OF_TORCH])
def test_an_optimizer_for_gpus_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(PeftcError, match="needs a GPU"):
        run(replace(SHORT, optimizer=name))


@pytest.mark.parametrize("change", [{"optimizer": "adamv"}, {"schedule": "cosin"}])
def test_an_unknown_name_is_refused_with_the_nearest(change: dict[str, str]) -> None:
    with pytest.raises(UsageError) as found:
        replace(SHORT, **change)
    assert next(iter(change)) in str(found.value) and "did you mean" in str(found.value.hint)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_to_its_highest_and_falls_as_asked(schedule: str) -> None:
    recipe = replace(SHORT, steps=100, learning_rate=2.0, schedule=schedule)
    rates = [rate(step, 100, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == pytest.approx(2.0)
    assert all(one >= other for one, other in pairwise(rates[10:]))
    middle = {"cosine": 1.0, "linear": 1.0, "constant": 2.0, "wsd": 2.0}
    assert rates[55] == pytest.approx(middle[schedule])
    assert rates[100] == pytest.approx(2.0 if schedule == "constant" else 0.0, abs=1e-9)


def test_wsd_falls_by_a_root_over_the_last_fifth() -> None:
    recipe = replace(SHORT, warmup=0.0, learning_rate=1.0, schedule="wsd")
    assert rate(80, 100, recipe) == pytest.approx(1.0)
    assert rate(85, 100, recipe) == pytest.approx(1 - math.sqrt(0.25))


def test_a_training_that_finds_nothing_better_stops(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0, 9.0, 9.0])
    recipe = replace(SHORT, evaluations=6, early_stop=2)
    outcome, _ = run(recipe, folder=tmp_path, score=lambda: next(scores))
    assert [step for step, _ in outcome.scores] == [0, 2, 4, 6]
    assert outcome.steps == 6 and outcome.best == 2 and len(outcome.losses) == 6


def test_a_training_that_gets_better_does_not_stop() -> None:
    scores = iter([1.0, 2.0, 1.5, 3.0, 2.5, 4.0, 5.0])
    outcome, _ = run(replace(SHORT, evaluations=6, early_stop=2), score=lambda: next(scores))
    assert outcome.steps == SHORT.steps and outcome.best == SHORT.steps


@pytest.mark.parametrize("change", [{"early_stop": 5}, {"early_stop": 1, "held_out": 0.0}, {"early_stop": 0}])
def test_an_early_stop_that_cannot_come_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="early-stop"):
        replace(SHORT, **change)


def test_a_request_names_what_may_change_the_result_and_is_not_usual() -> None:
    usual = SHORT.request()
    assert not {"optimizer", "schedule", "early_stop", "compile", "gradient_checkpointing"} & usual.keys()
    assert replace(SHORT, gradient_checkpointing=True).request() == usual
    assert replace(SHORT, optimizer="sgd", compile=True).request() == usual | {"optimizer": "sgd", "compile": True}
