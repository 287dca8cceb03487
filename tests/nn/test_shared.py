"""A shared down factor multiplies once for all members, and never serves what is no longer true."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftc.nn.lowrank import LowRankLinear
from peftc.nn.shared import SharedDown, share


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """The products with the shared factor, as far as somebody still holds them."""
    counted: list[weakref.ref[Tensor]] = []
    plain = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        found = plain(self, x)
        if isinstance(self, SharedDown):
            counted.append(weakref.ref(found))
        return found

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return counted


class Group(nn.Module):
    """Three members over one input."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(LowRankLinear(8, out, 4, bias=True) for out in (6, 3, 5))
        down = share(list(self.members))
        down.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([member(x) for member in self.members], -1)

    def apart(self, x: Tensor) -> Tensor:
        """Compute the same with no shared factor in between."""
        return torch.cat([m.up(x @ m.down.weight.T) for m in self.members], -1)  # type: ignore[operator, union-attr]


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_product_is_computed_once_a_forward(mode: type, products: list[weakref.ref[Tensor]]) -> None:
    group = Group()
    with mode():
        for count in (1, 2, 3):
            x = torch.randn(2, 8)
            agree(group(x), group.apart(x))
            assert len(products) == count
            assert products[-1]() is None, "released once all have asked"


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_another_input_is_never_answered_with_the_last_one(mode: type, products: list[weakref.ref[Tensor]]) -> None:
    group = Group()
    one, two, three = group.members
    with mode():
        x, y = torch.randn(2, 8), torch.randn(2, 8)
        for member, value in ((one, x), (two, y), (three, x), (one, y), (one, y), (two, x)):
            agree(member(value), member.up(value @ member.down.weight.T))
        for _ in range(4):  # new tensors may lie where the last one lay
            agree(two(z := torch.randn(2, 8)), two.up(z @ two.down.weight.T))
            del z


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_change_in_place_of_the_input_or_the_weight_is_seen(mode: type) -> None:
    group = Group()
    one, two, three = group.members
    x = torch.randn(2, 8)
    with mode():
        one(x)
        x.mul_(2)
        agree(two(x), two.up(x @ two.down.weight.T))
        with torch.no_grad():
            two.down.weight.mul_(3)
        agree(three(x), three.up(x @ three.down.weight.T))
        one.down.weight = nn.Parameter(torch.randn(4, 8))
        agree(two(x), two.up(x @ two.down.weight.T))


def test_a_product_without_a_graph_is_not_served_where_one_is_needed() -> None:
    group = Group()
    one, two, three = group.members
    x = torch.randn(2, 8)
    with torch.no_grad():
        one(x)
    two(x).sum().backward()
    assert two.down.weight.grad is not None
    two(x).sum().backward()  # a member called alone, again: the graph of its last call is gone
    three(x).sum().backward()


def test_autocast_is_not_answered_from_outside_of_it() -> None:
    group = Group()
    one, two, _ = group.members
    x = torch.randn(2, 8)
    with torch.no_grad():
        one(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert two(x).dtype == torch.bfloat16


def test_gradients_reach_the_shared_factor_from_all_members() -> None:
    group = Group()
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(14)
    parameters = [x, *group.parameters()]
    assert len(parameters) == 1 + 1 + 2 * 3, "the shared factor is one parameter"
    got = torch.autograd.grad((group(x) @ weight).square().sum(), parameters)
    expected = torch.autograd.grad((group.apart(x) @ weight).square().sum(), parameters)
    for one, other in zip(got, expected, strict=True):
        agree(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_once_and_get_the_same_gradient(
    reentrant: bool, products: list[weakref.ref[Tensor]]
) -> None:
    group = Group()
    x = torch.randn(5, 8, requires_grad=True)
    expected = torch.autograd.grad(group.apart(x).square().sum(), [x, group.members[0].down.weight])
    y = checkpoint(lambda x: group(x * 1.0), x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert len(products) == 2, "one forward and one recomputation"
    agree(x.grad, expected[0])
    agree(group.members[0].down.weight.grad, expected[1])


def test_each_member_in_a_checkpoint_of_its_own() -> None:
    group = Group()
    x = torch.randn(5, 8)
    torch.cat([checkpoint(member, x, use_reentrant=False) for member in group.members], -1).square().sum().backward()
    (expected,) = torch.autograd.grad(group.apart(x).square().sum(), [group.members[0].down.weight])
    agree(group.members[0].down.weight.grad, expected)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_compiled_and_exported_networks_agree() -> None:
    group = Group().eval()
    x = torch.randn(2, 8)
    agree(torch.compile(group, backend="aot_eager", fullgraph=True)(x), group.apart(x))
    agree(torch.export.export(group, (x,)).module()(x), group.apart(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda group: pickle.loads(pickle.dumps(group))])
def test_copies_share_among_themselves_and_start_with_nothing(
    copied: object, products: list[weakref.ref[Tensor]]
) -> None:
    group = Group()
    x = torch.randn(2, 8)
    group.members[0](x)
    again = copied(group)  # type: ignore[operator]
    assert again.members[0].down is again.members[2].down is not group.members[0].down
    again.members[1](x)
    assert len(products) == 2
    agree(again(x), group(x))


def test_threads_are_kept_apart(products: list[weakref.ref[Tensor]]) -> None:
    group = Group()
    x = torch.randn(2, 8)
    group.members[0](x)
    thread = threading.Thread(target=group.members[1], args=(x,))
    thread.start()
    thread.join()
    assert len(products) == 2


def test_a_product_goes_with_its_input(products: list[weakref.ref[Tensor]]) -> None:
    group = Group()
    with torch.no_grad():
        x = torch.randn(2, 8)
        group.members[0](x)
        assert products[0]() is not None
        del x
        gc.collect()
        assert products[0]() is None


def test_members_of_two_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot share a down factor"):
        share([LowRankLinear(8, 4, 2, bias=False), LowRankLinear(9, 4, 2, bias=False)])
