"""A training that a signal ends: at the end of its step, with a checkpoint from which it goes on to the same bytes."""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.options import Recipe
from peftc.training.interruption import interruption
from peftc.training.loop import fit
from peftc.training.schedule import Outcome

SIZE = 64
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()
RECIPE = Recipe(steps=8, batch_size=16, learning_rate=1e-2, evaluations=4)
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def plain(module: nn.Module, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(X[rows]), Y[rows])


def run(folder: Path, loss: Any = plain, score: Any = None) -> tuple[Outcome, nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    folder.mkdir(exist_ok=True)

    def batch(rows: Sequence[int], *_: Any) -> Tensor:
        return torch.tensor(list(rows))

    def usual() -> float:
        return -float(plain(module, torch.arange(20)).detach())

    return fit(module, SIZE, batch, loss, RECIPE, device="cpu", folder=folder, score=score or usual), module


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_step_is_finished_and_kept_before_the_training_ends(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    whole, expected = run(tmp_path / "whole")
    calls = iter(range(100))

    def signalled(module: nn.Module, rows: Tensor) -> Tensor:
        if next(calls) == 4:
            os.kill(os.getpid(), number)
        return plain(module, rows)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ended", signalled)
    assert signal.getsignal(number) is before
    resumed, found = run(tmp_path / "ended")
    assert resumed.resumed == 5  # the fifth step, which was being made, counts
    assert resumed.losses == whole.losses and resumed.scores == whole.scores
    assert same(found, expected)
    assert (tmp_path / "ended" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_held_out_samples_are_left_at_once_and_the_steps_before_kept(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    scores = iter(range(100))

    def signalled() -> float:
        if next(scores) == 2:  # after four steps
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was to end this")
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ended", score=signalled)
    state = torch.load(tmp_path / "ended" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and [step for step, _ in state["outcome"]["scores"]] == [0, 2]
    assert state["outcome"]["losses"] == whole.losses[:4]


def test_a_second_signal_ends_it_in_the_middle_of_a_step(tmp_path: Path) -> None:
    reached: list[int] = []

    def signalled(module: nn.Module, rows: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(2)
        return plain(module, rows)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ended", signalled)
    assert reached == [1]
    assert not (tmp_path / "ended" / "checkpoint.pt").exists()


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    seen: list[Any] = []

    def watch() -> None:
        with interruption(lambda: None):
            seen.extend(signal.getsignal(each) for each in SIGNALS)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == before


def test_an_error_of_another_kind_saves_nothing(tmp_path: Path) -> None:
    def broken(module: nn.Module, rows: Tensor) -> Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run(tmp_path / "ended", broken)
    assert not (tmp_path / "ended" / "checkpoint.pt").exists()
