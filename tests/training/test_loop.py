"""The loop learns, repeats itself exactly, goes on where it was killed, and leaves the caller's world as it was."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.errors import PeftcError, UsageError
from peftc.options import Recipe
from peftc.training import journal, loop
from peftc.training.loop import fit
from peftc.training.schedule import Outcome, mixed, rate

SIZE = 96
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()
SHORT = Recipe(steps=8, batch_size=16, learning_rate=2e-2, dropout=True)

Given = tuple[Tensor, Tensor]


def batch(rows: Sequence[int], _: object = None) -> Given:
    return X[list(rows)], Y[list(rows)]


def network(dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))


def cross_entropy(module: nn.Module, given: Given) -> Tensor:
    return nn.functional.cross_entropy(module(given[0]), given[1])


def run(module: nn.Module, recipe: Recipe = SHORT, loss: Any = cross_entropy, **options: Any) -> Outcome:
    return fit(module, SIZE, batch, loss, recipe, device="cpu", **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss_and_ends_in_eval_mode() -> None:
    module = network()
    outcome = run(module, replace(SHORT, steps=None, epochs=10))
    assert len(outcome.losses) == outcome.steps == 10 * 6
    assert outcome.losses[-1] < 0.5 * outcome.losses[0]
    assert not module.training


def test_the_same_seed_gives_the_same_bytes() -> None:
    runs = []
    for seed in (1, 1, 2):
        module = network()
        runs.append((run(module, replace(SHORT, seed=seed)).losses, weights(module)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert same(runs[0][1], runs[1][1])


def test_an_epoch_reads_every_sample_once_and_in_an_order_of_its_own() -> None:
    seen: list[int] = []

    def watched(rows: Sequence[int], _: object) -> Given:
        seen.extend(rows)
        return batch(rows)

    fit(network(), SIZE, watched, cross_entropy, replace(SHORT, steps=12), device="cpu")
    assert sorted(seen[:SIZE]) == sorted(seen[SIZE:]) == list(range(SIZE))
    assert seen[:SIZE] != seen[SIZE:]


def test_steps_may_cross_epochs_and_a_step_may_be_longer_than_one() -> None:
    seen: list[int] = []

    def watched(rows: Sequence[int], _: object) -> Given:
        seen.extend(rows)
        return batch(rows)

    fit(network(), SIZE, watched, cross_entropy, replace(SHORT, steps=3, batch_size=128), device="cpu")
    assert [seen[: 4 * SIZE].count(row) for row in range(SIZE)] == [4] * SIZE


def test_parts_of_a_step_add_up_to_the_step() -> None:
    whole, parts = network(dropout=0.0), network(dropout=0.0)
    one, other = run(whole), run(parts, replace(SHORT, accumulate=4))
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    module = network()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(module)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parameters_do_not_move() -> None:
    module = network()
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    run(module)
    assert torch.equal(module[0].weight, before)


def test_only_matrices_decay() -> None:
    module = network(dropout=0.0)
    norm, matrix = module[1].weight.clone(), module[0].weight.clone()

    def flat(module: nn.Module, given: Given) -> Tensor:
        return 0 * module(given[0]).sum()

    run(module, replace(SHORT, weight_decay=0.5), flat)
    assert torch.equal(module[1].weight, norm)
    assert module[0].weight.norm() < matrix.norm()


def test_gradients_are_clipped() -> None:
    def steep(module: nn.Module, given: Given) -> Tensor:
        return 1e4 * cross_entropy(module, given)

    norms: list[float] = []

    def watched(module: nn.Module, given: Given) -> Tensor:
        norms.append(sum(float(p.grad.norm()) ** 2 for p in module.parameters() if p.grad is not None) ** 0.5)
        return steep(module, given)

    calm, wild = network(dropout=0.0), network(dropout=0.0)
    run(calm, replace(SHORT, steps=1, clip=1.0, weight_decay=0), steep)
    run(wild, replace(SHORT, steps=1, clip=0.0, weight_decay=0), watched)
    assert norms == [0.0]  # gradients were cleared before
    # AdamW's first step does not depend on the scale of the gradient, but for its epsilon
    torch.testing.assert_close(calm[0].weight, wild[0].weight, rtol=1e-2, atol=1e-4)


def test_the_average_of_the_weights_is_the_result_and_lags_behind() -> None:
    plain, averaged, start = network(0.0), network(0.0), network(0.0)
    run(plain)
    run(averaged, replace(SHORT, ema=0.5))
    gaps = [float((m[0].weight - start[0].weight).detach().norm()) for m in (plain, averaged)]
    assert 0 < gaps[1] < gaps[0]
    alike = network(0.0)
    run(alike, replace(SHORT, ema=0.0))
    assert same(weights(alike), weights(plain))


def test_without_dropout_a_network_trains_as_it_runs_and_batch_norms_go_on_counting() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    modes: list[tuple[bool, bool]] = []

    def watched(module: Any, given: Given) -> Tensor:
        modes.append((module[1].training, module[2].training))
        return cross_entropy(module, given)

    run(module, replace(SHORT, dropout=False), watched)
    assert set(modes) == {(True, False)}
    assert int(module[1].num_batches_tracked) == 8


def test_the_best_weights_seen_are_kept_and_of_equals_the_latest() -> None:
    module, seen = network(), []
    scores = iter([0.1, 0.9, 0.9, 0.3, 0.2])

    def score() -> float:
        seen.append(weights(module))
        assert not module.training
        return next(scores)

    outcome = run(module, replace(SHORT, evaluations=4), score=score)
    assert outcome.scores == [(0, 0.1), (2, 0.9), (4, 0.9), (6, 0.3), (8, 0.2)]
    assert outcome.best == 4
    assert same(weights(module), seen[2]) and not same(seen[1], seen[2])


def test_looking_at_held_out_samples_changes_nothing_of_the_training() -> None:
    def score() -> float:
        return float(torch.rand(1))

    one, other = run(network()), run(network(), score=score)
    assert one.losses == other.losses


class Killed(Exception):
    pass


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: Any, ema: float | None) -> None:
    recipe = replace(SHORT, ema=ema, evaluations=4)
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)  # a checkpoint after every step

    def attempt(folder: Path, loss: Any) -> tuple[Outcome, dict[str, Tensor]]:
        module = network()

        def score() -> float:
            return -float(cross_entropy(module, batch(range(20))).detach())

        return run(module, recipe, loss, folder=folder, score=score), weights(module)

    def killed_at(step: int) -> Callable[..., Tensor]:
        calls = iter(range(100))

        def loss(module: nn.Module, given: Given) -> Tensor:
            if next(calls) == step:
                raise Killed
            return cross_entropy(module, given)

        return loss

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = attempt(tmp_path / "whole", cross_entropy)
    with pytest.raises(Killed):
        attempt(tmp_path / "killed", killed_at(5))
    resumed = attempt(tmp_path / "killed", cross_entropy)
    assert resumed[0].resumed == 5 and whole[0].resumed == 0
    assert resumed[0].losses == whole[0].losses and resumed[0].scores == whole[0].scores
    assert same(resumed[1], whole[1])
    logs = [(tmp_path / name / journal.LOG).read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_minutes_become_steps_once_and_nothing_is_learnt_while_they_are_timed(tmp_path: Path) -> None:
    module, start = network(), network()
    seen: list[bool] = []

    def watched(module: nn.Module, given: Given) -> Tensor:
        if len(seen) <= loop.TIMED_STEPS:
            seen.append(same(weights(module), weights(start)))
        return cross_entropy(module, given)

    outcome = run(module, replace(SHORT, steps=None, minutes=0.001), watched, folder=tmp_path)
    assert seen == [True] * (loop.TIMED_STEPS + 1)
    assert outcome.steps == len(outcome.losses) == json.loads((tmp_path / "steps.json").read_text()) >= 1


def test_terms_are_added_up_and_told_apart(tmp_path: Path) -> None:
    def loss(module: nn.Module, given: Given) -> dict[str, Tensor]:
        return {"task": cross_entropy(module, given), "small": module[0].weight.square().mean()}  # type: ignore[index, union-attr]

    outcome = run(network(), loss=loss, folder=tmp_path)
    line = json.loads((tmp_path / journal.LOG).read_text().splitlines()[0])
    assert line["task"] + line["small"] == pytest.approx(line["loss"])
    assert outcome.start == {"task": line["task"], "small": line["small"]}


def test_the_rate_rises_in_a_line_and_falls_to_zero_in_half_a_cosine() -> None:
    rates = [rate(step, 100, Recipe(steps=100, learning_rate=1.0)) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_seeds_of_steps_and_epochs_differ() -> None:
    assert len({mixed(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(4)}) == 400


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_samples(tmp_path: Path) -> None:
    def explode(module: nn.Module, given: Given) -> Tensor:
        return module(given[0]).sum() * float("inf")

    with pytest.raises(PeftcError, match=r"became (nan|-?inf) at step 1") as refusal:
        run(network(), loss=explode, folder=tmp_path)
    assert "the samples of that step are" in str(refusal.value)
    assert "--learning-rate" in str(refusal.value)


def test_too_little_memory_is_refused_with_what_would_fit() -> None:
    def large(module: nn.Module, given: Given) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with pytest.raises(PeftcError, match="out of memory at step 1") as refusal:
        run(network(), loss=large)
    assert "16 samples at once" in str(refusal.value) and "`--accumulate 2`" in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": None}, "say how long to train"),
        ({"epochs": 1.0}, "say how long to train"),
        ({"steps": 0}, "`--steps` is 0"),
        ({"learning_rate": -1.0}, "`--learning-rate` is -1.0"),
        ({"warmup": 1.0}, "`--warmup` is 1.0"),
        ({"ema": 1.0}, "`--ema` is 1.0"),
        ({"batch_size": 6, "accumulate": 4}, "cannot be cut into 4 equal parts"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(SHORT, **change)
