"""Modules are replaced wherever they stand, ties survive, and a network is filled exactly or not at all."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.errors import ArtifactError, WeightError
from peftc.nn import surgery
from peftc.nn.lowrank import LowRankLinear, build
from peftc.nn.surgery import apply_edits, fill, stored_names


class Tied(nn.Module):
    """An embedding, its tied head, one block that stands twice, and a buffer that is stored and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("mask", torch.ones(2), persistent=False)


def state(**changes: Any) -> dict[str, Tensor]:
    tensors = {
        "embedding.weight": torch.arange(36.0).reshape(9, 4),
        "block.weight": torch.ones(4, 4),
        "block.bias": torch.zeros(4),
        "scale": torch.full((1,), 7.0),
    }
    tensors.update(changes)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def filled(tensors: dict[str, Tensor], network: nn.Module | None = None) -> tuple[nn.Module, dict[str, str]]:
    network = network or Tied()
    return network, fill(network, tensors, tensors.__getitem__, where="the file")


def test_every_tensor_is_stored_once() -> None:
    assert stored_names(Tied()) == {
        "embedding.weight": ["embedding.weight", "head.weight"],
        "block.weight": ["block.weight", "again.weight"],
        "block.bias": ["block.bias", "again.bias"],
        "scale": ["scale"],
    }


def test_filling_takes_the_tensors_without_a_copy_and_keeps_ties() -> None:
    tensors = state()
    network, found = filled(tensors)
    assert found == {name: name for name in tensors}
    assert network.head.weight is network.embedding.weight
    assert network.again.bias is network.block.bias
    assert network.embedding.weight.data_ptr() == tensors["embedding.weight"].data_ptr()
    assert network.scale is tensors["scale"]


def test_a_tied_tensor_may_be_stored_under_any_of_its_names() -> None:
    tensors = state()
    tensors["head.weight"] = tensors.pop("embedding.weight")
    network, found = filled(tensors)
    assert found["embedding.weight"] == "head.weight"
    assert network.embedding.weight is network.head.weight


def test_a_tie_may_be_stored_twice_if_both_are_equal() -> None:
    equal = state()["embedding.weight"].clone()
    filled(state(**{"head.weight": equal}))
    with pytest.raises(WeightError, match="`embedding.weight` and `head.weight` in `the file` differ") as refusal:
        filled(state(**{"head.weight": equal + 1}))
    assert refusal.match("tie_word_embeddings")


def test_missing_and_left_over_tensors_are_refused_by_name() -> None:
    with pytest.raises(WeightError, match="do not match the network") as refusal:
        filled(state(**{"block.bias": None, "other": torch.ones(1)}))
    assert refusal.match("1 missing: `block.bias`; 1 left over: `other`")


def test_many_names_are_cut_short() -> None:
    with pytest.raises(WeightError, match="6 left over: `x0`, `x1`, `x2`, `x3` and 2 more"):
        filled(state(**{f"x{number}": torch.ones(1) for number in range(6)}))


def test_another_shape_is_refused() -> None:
    with pytest.raises(
        WeightError, match=r"`block.weight` in `the file` has shape \[4, 5\]; the network needs \[4, 4\]"
    ):
        filled(state(**{"block.weight": torch.ones(4, 5)}))


def test_left_over_tensors_may_be_ignored_and_computed_buffers_are() -> None:
    tensors = state(mask=torch.zeros(2), old=torch.ones(1))
    network = Tied()
    fill(network, tensors, tensors.__getitem__, where="x", ignore=lambda name: name == "old")
    assert network.mask.tolist() == [1, 1]


def test_a_counter_of_batches_may_be_missing() -> None:
    network = nn.BatchNorm1d(2)
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name != "num_batches_tracked"}
    assert "num_batches_tracked" not in filled(tensors, network)[1]


@pytest.mark.parametrize("trains", [True, False])
def test_what_trained_before_trains_after(trains: bool) -> None:
    network = Tied().requires_grad_(trains)
    filled(state(), network)
    assert network.block.weight.requires_grad is trains


def test_edits_replace_a_module_wherever_it_stands() -> None:
    network = Tied()
    apply_edits(network, {"block": {"form": "linear", "rank": 2}})
    assert isinstance(network.block, LowRankLinear)
    assert network.again is network.block
    assert network.block.rank == 2
    assert network.block.up.bias.is_meta


def test_an_edit_of_a_module_inside_a_container_is_found() -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"a": nn.Conv2d(4, 4, 3)}))
    apply_edits(network, {"0.0": {"form": "linear", "rank": 1}, "1.a": {"form": "tucker2", "rank": [2, 3]}})
    assert network[0][0].rank == 1
    assert network[1]["a"].core.weight.shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"gone": {"form": "linear", "rank": 1}}, "factors `gone`, which its base network does not have"),
        ({"block": {"form": "embedding", "rank": 1}}, "factors `block` as `embedding` at rank 1"),
        ({"block": {"form": "channel", "rank": 1}}, "in its base network that is a Linear"),
        ({"embedding": {"form": "linear", "rank": 1}}, "in its base network that is a Embedding"),
        ({"block": {"form": "linear", "rank": [1, 2]}}, "factors `block` as `linear`"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(edits: Any, message: str) -> None:
    with pytest.raises(ArtifactError) as refusal:
        apply_edits(Tied(), edits)
    assert message in str(refusal.value)


def test_ties_are_made_by_name_and_refused_by_name() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    surgery.tie(network, {"1.weight": "0.weight"})
    assert network[1].weight is network[0].weight
    for tied in ({"1.weight": "2.weight"}, {"2.weight": "0.weight"}, {"0.weight": "0.gone"}):
        with pytest.raises(ArtifactError, match="which its base network lacks"):
            surgery.tie(network, tied)


def test_placing_skips_what_is_none() -> None:
    new = build(nn.Linear(4, 4, bias=False), "linear", 2)
    weight = nn.Parameter(torch.ones(2, 4))
    surgery.place(new, {"down.weight": weight, "up.bias": None})
    assert new.down.weight is weight
    assert new.up.bias is None


def test_one_dtype_is_named_and_mixed_ones_are_not() -> None:
    assert surgery.uniform_dtype(Tied()) == torch.float32
    network = Tied()
    network.block.half()
    assert surgery.uniform_dtype(network) is None
    integers = nn.Module()
    integers.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    assert surgery.uniform_dtype(integers) is None
