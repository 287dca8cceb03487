"""Several processes learn what one does, and go on where they were stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.test_memory import launch
from tests.forked import forked

# A small training: a normalisation of each batch, a module that no loss reaches, and a stop before some step.
FITS = """
import json, os, sys
import torch
from torch import nn
from peftc import processes
from peftc.options import Recipe
from peftc.training import loop

folder, kind, stop, parts = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.makedirs(folder, exist_ok=True)
loop.SAVE_EVERY = 0.0
X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()
torch.manual_seed(0 if kind != "apart" else processes.rank())
network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if kind == "norm" else nn.ReLU(), nn.Linear(16, 2))
network.register_module("spare", nn.Linear(4, 4) if kind == "spare" else None)
network.forward = lambda x: network[2](network[1](network[0](x)))
made = []

def batch(rows):
    made.append(rows)
    return X[list(rows)], Y[list(rows)]

def stopped(step, steps):
    if step == stop:
        processes.wait()
        os._exit(0)

loss = lambda module, given: nn.functional.cross_entropy(module(given[0]), given[1])
recipe = Recipe(steps=8, batch_size=16, learning_rate=2e-2, accumulate=parts)
outcome = loop.fit(network, 96, batch, loss, recipe, device="cpu", folder=__import__("pathlib").Path(folder),
                   after_step=stopped)
state = {name: each.tolist() for name, each in network.state_dict().items()}
print(json.dumps([outcome.losses, state, outcome.resumed]))
processes.leave()
"""


def fitted(folder: Path, kind: str, stop: int = 0, parts: int = 1, *, several: bool = True) -> list[Any]:
    """Return losses, weights and the step of the resume, of each process."""
    words = (folder, kind, stop, parts)
    ended = launch(*words, code=FITS) if several else [(0, (one := forked(*words, code=FITS)).stdout, one.stderr)]
    assert all(code == 0 for code, _, _ in ended), ended
    return [json.loads(out) if out.strip() else None for _, out, _ in ended]


@pytest.mark.parametrize(("kind", "parts"), [("plain", 2), ("spare", 1), ("apart", 1)])
def test_two_processes_take_the_steps_of_one(kind: str, parts: int, tmp_path: Path) -> None:
    """Whatever parts a step has, whether or not all of the network is used, and from the first one's weights."""
    (one,) = fitted(tmp_path / "one", kind, several=False)
    first, second = fitted(tmp_path / "two", kind, parts=parts)
    assert first == second
    assert first[0] == pytest.approx(one[0], rel=1e-5)
    for name, values in one[1].items():
        torch.testing.assert_close(torch.tensor(first[1][name]), torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_running_statistics_are_of_the_first_process_so_that_a_resume_goes_on_as_before(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", "norm")
    assert fitted(tmp_path / "killed", "norm", stop=4) == [None, None]
    again = fitted(tmp_path / "killed", "norm")
    assert [each[2] for each in again] == [3, 3]  # the checkpoint is of the step before
    assert [each[0] for each in again] == [each[0] for each in whole]
    assert again[0][1] == whole[0][1]
