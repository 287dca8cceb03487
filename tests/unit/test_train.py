"""The loop learns, repeats itself exactly, and leaves the caller's world as it was."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from peftc.errors import PeftcError
from peftc.train import fit, rate


def data() -> TensorDataset:
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > x[:, 1]).long())


def network(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))


def cross_entropy(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def test_training_lowers_the_loss_and_ends_in_eval_mode() -> None:
    module = network()
    losses = fit(module, data(), cross_entropy, epochs=10, batch_size=16, learning_rate=2e-2, device="cpu")
    assert len(losses) == 10 * 6
    assert losses[-1] < 0.5 * losses[0]
    assert not module.training


def test_the_same_seed_gives_the_same_bytes() -> None:
    runs = []
    for seed in (1, 1, 2):
        module = network()
        losses = fit(module, data(), cross_entropy, steps=8, batch_size=16, device="cpu", seed=seed)
        runs.append((losses, {name: tensor.clone() for name, tensor in module.state_dict().items()}))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_steps_may_cross_epochs_and_need_not_fill_them() -> None:
    for steps in (0, 3, 7):
        assert len(fit(network(), data(), cross_entropy, steps=steps, batch_size=32, device="cpu")) == steps


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    module = network()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(module, data(), cross_entropy, steps=2, device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parameters_do_not_move() -> None:
    module = network()
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    fit(module, data(), cross_entropy, steps=4, device="cpu")
    assert torch.equal(module[0].weight, before)


def test_only_matrices_decay() -> None:
    module = network(dropout=0.0)
    norm, matrix = module[1].weight.clone(), module[0].weight.clone()

    def flat(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return 0 * model(batch[0]).sum()

    fit(module, data(), flat, steps=4, weight_decay=0.5, learning_rate=1e-2, device="cpu")
    assert torch.equal(module[1].weight, norm)
    assert module[0].weight.norm() < matrix.norm()


def test_the_rate_rises_in_a_line_and_falls_to_zero_in_half_a_cosine() -> None:
    rates = [rate(step, 100, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step() -> None:
    def explode(module: nn.Module, batch: list[Tensor]) -> Tensor:
        return module(batch[0]).sum() * float("inf")

    with pytest.raises(PeftcError, match="at step 1"):
        fit(network(), data(), explode, steps=3, device="cpu")


@pytest.mark.parametrize("length", [{}, {"steps": 1, "epochs": 1}])
def test_steps_or_epochs_but_not_both(length: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        fit(network(), data(), cross_entropy, device="cpu", **length)
