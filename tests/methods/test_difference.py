"""The difference of two checkpoints as an update: exact where it is of low rank, the nearest where it is not."""

import pytest
import torch

from peftc.methods.difference import low_rank_difference


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_a_difference_of_low_rank_is_found_again() -> None:
    change = torch.randn(40, 3) @ torch.randn(3, 60)
    up, down, energy = low_rank_difference(change, 3)
    assert up.shape == (40, 3) and down.shape == (3, 60) and energy == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (16, 8, 3, 3), (12, 1, 7, 7), (6, 4, 3, 3, 3), (8, 4, 5)])
def test_no_update_of_that_rank_is_nearer_and_the_energy_is_what_it_keeps(shape: tuple[int, ...]) -> None:
    change = 1e-3 * torch.randn(shape)
    matrix = change.flatten(1).double()
    values = torch.linalg.svdvals(matrix)
    energies = []
    for rank in (1, 4):
        up, down, energy = low_rank_difference(change, rank)
        lost = (matrix - up.double() @ down.double()).square().sum()
        assert float(lost) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)
        assert energy == pytest.approx(1 - float(lost / matrix.square().sum()), abs=1e-5)
        energies.append(energy)
    assert energies[0] < energies[1]


def test_no_change_is_an_update_of_zeros_and_a_rank_beyond_the_matrix_is_that_of_the_matrix() -> None:
    up, down, energy = low_rank_difference(torch.zeros(5, 7), 2)
    assert energy == 1 and up.shape == (5, 2) and not (up @ down).any()
    up, down, energy = low_rank_difference(torch.randn(5, 7), 100)
    assert up.shape == (5, 5) and energy == pytest.approx(1)


def test_half_precision_is_computed_in_full() -> None:
    change = torch.randn(20, 30).bfloat16()
    up, _, _ = low_rank_difference(change, 4)
    assert up.dtype == torch.float32
