"""Modules that SNELL adapts: what they compute, in which precision, and what a merge makes of them."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftc.methods.adapter.snell import snell
from peftc.methods.adapter.snella import snella
from peftc.nn.adapted import Adapted
from peftc.nn.folded import folded, form_of
from peftc.nn.kernels import KERNELS
from tests.methods.adapting import adapted, merged, plain


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# modules

CONVOLUTIONS = [
    nn.Conv2d(6, 8, 3, stride=2, padding=1),
    nn.Conv2d(6, 8, (3, 2), dilation=2, padding=(2, 1), padding_mode="reflect"),
    nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", groups=2, bias=False),
    nn.Conv2d(6, 8, (3, 5), padding="same"),
    nn.Conv1d(6, 8, 3, padding=1, padding_mode="replicate"),
    nn.Conv3d(6, 8, 2, stride=(1, 2, 1)),
    nn.Conv2d(8, 8, 3, groups=8, padding=1),
]
MODULES = [nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Conv1D(8, 6), *CONVOLUTIONS]


def sample(module: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    if form_of(module) != "channel":
        return torch.randn(3, 5, 6, dtype=dtype)
    return torch.randn(3, module.in_channels, *[6, 7, 5][: module.weight.ndim - 2], dtype=dtype)


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize("way", ["autograd", "closed form", "apart"])
def test_a_folded_module_is_the_module_with_the_changed_weight(module: nn.Module, way: str) -> None:
    module = copy.deepcopy(module).double()
    x, weight = sample(module).requires_grad_(), module.weight.detach()
    one, two = (torch.randn_like(weight).requires_grad_() for _ in range(2))

    def rebuild(one: Tensor, two: Tensor) -> Tensor:
        return one * two

    def pull(gradient: Tensor, one: Tensor, two: Tensor) -> Sequence[Tensor]:
        return gradient * two, gradient * one

    inputs = [x, one, two, *([] if module.bias is None else [module.bias])]
    expected = torch.func.functional_call(module, {"weight": weight + one * two}, (x,))
    gradient = torch.randn_like(expected)
    seen = x * 1 if way == "apart" else None
    y = folded(module, x, rebuild, [one, two], pull=pull if way == "closed form" else None, seen=seen)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    of_mine, of_plain = (torch.autograd.grad(each, inputs, gradient) for each in (y, expected))
    for name, mine, plains in zip("x one two bias".split(), of_mine, of_plain, strict=False):
        torch.testing.assert_close(mine, plains, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sample_without_a_batch_and_timms_own_padding_are_convolved() -> None:
    from timm.layers import Conv2dSame

    change = torch.randn(8, 6, 3, 3)
    alone, same = nn.Conv2d(6, 8, 3), Conv2dSame(6, 8, 3, stride=2)
    for module, x in ((alone, torch.randn(6, 7, 5)), (same, torch.randn(2, 6, 7, 6))):
        expected = torch.func.functional_call(module, {"weight": module.weight + change}, (x,))
        torch.testing.assert_close(folded(module, x, torch.clone, [change]), expected, rtol=0, atol=1e-5)


def test_a_change_that_is_a_parameter_itself_is_not_written_to() -> None:
    module, change = nn.Linear(6, 8), torch.randn(8, 6, requires_grad=True)
    before = change.detach().clone()
    for rebuild in (lambda change: change, lambda change: change.view(8, 6), lambda change: change.T.T):
        folded(module, torch.randn(3, 6, requires_grad=True), rebuild, [change]).sum().backward()
    assert torch.equal(change, before)


def test_what_computes_in_its_own_way_is_left_alone() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin()

    for module in (Odd(40, 30), nn.Embedding(40, 30), nn.ConvTranspose2d(40, 30, 3), nn.LayerNorm(40)):
        assert snell(module, rank=2) is None


@pytest.mark.parametrize("method", [snell, snella])
def test_a_weight_that_is_smaller_than_its_update_trains_itself(method: Any) -> None:
    assert method(nn.Conv2d(64, 64, 3, groups=64), rank=8) == ("weight",)
    assert method(nn.Linear(16, 12), rank=8) == ("weight",)
    assert isinstance(method(nn.Conv2d(64, 64, 3), rank=8), nn.Module)
    square = nn.Linear(16, 16, bias=False)  # as many points as weights
    assert method(square, rank=8) == ("weight",) and isinstance(method(square, rank=6), nn.Module)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("module", [nn.Linear(24, 40), Conv1D(40, 24), nn.Conv2d(24, 40, 3, padding=1)], ids=str)
def test_trainables_are_those_of_lora_and_merging_changes_nothing(module: nn.Module, kernel: str) -> None:
    model = adapted(copy.deepcopy(module), kernel=kernel, sparsity=0.5, sparsify="hard")
    in_ = module.weight.numel() // 40
    learning = [each for each in model.parameters() if each.requires_grad]
    assert sum(each.numel() for each in learning) == 4 * (40 + in_) + 3 * (kernel == "mix")
    x = torch.randn(2, 24, 7, 7) if isinstance(module, nn.Conv2d) else torch.randn(2, 7, 24)
    y = model(x)
    y.square().sum().backward()
    assert all(each.grad is not None and float(each.grad.abs().max()) > 0 for each in learning), "alive from step 0"
    assert all(each.grad is None for each in model.base.parameters())
    assert float((y - module(x)).detach().abs().max()) > 1e-3
    torch.testing.assert_close(merged(model)(x), y, rtol=0, atol=1e-5)


def test_a_transposed_weight_is_changed_as_the_weight_it_transposes() -> None:
    one, other = nn.Linear(24, 40), Conv1D(40, 24)
    models = []
    for module in (one, other):
        torch.manual_seed(5)
        models.append(adapted(module, sparsify="hard", kernel="mix"))
    with torch.no_grad():
        other.weight.copy_(one.weight.T)
        other.bias.copy_(one.bias)
    x = torch.randn(5, 24)
    for model in models:
        y = model(x)
        torch.testing.assert_close(y, models[0](x))
        y.square().sum().backward()
    for mine, theirs in zip(models[0].update.parameters(), models[1].update.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_q_k_and_v_in_one_are_three_matrices_unless_asked_otherwise() -> None:
    fused = nn.Linear(64, 192)
    three = Adapted(fused, snell(fused, rank=4))  # type: ignore[arg-type]
    change = three.update.weight(torch.zeros(192, 64))
    counts = [int(piece.count_nonzero()) for piece in change.chunk(3)]
    assert all(abs(count - 409) <= 1 for count in counts), "each keeps a tenth of its own"
    for piece, part in zip(change.chunk(3), three.update.parts, strict=True):
        expected = part.form.change(part.rows, part.columns, part.threshold)
        torch.testing.assert_close(piece, expected, rtol=0, atol=0)
    assert three.update.report()["trainables"] == 4 * (192 + 3 * 64)
    x = torch.randn(5, 64)
    y = three(x)
    y.square().sum().backward()
    grads = [part.rows.grad for part in three.update.parts]
    whole = plain_gradients(three, x)
    for mine, plains in zip(grads, whole, strict=True):
        torch.testing.assert_close(mine, plains, rtol=1e-3, atol=1e-6)
    transposed = snell(Conv1D(192, 64), rank=4)
    assert len(transposed.parts) == 3  # type: ignore[union-attr,arg-type]
    assert len(snell(fused, rank=4, split=1).parts) == 1  # type: ignore[union-attr,arg-type]


def plain_gradients(model: Adapted, x: Tensor) -> list[Tensor]:
    parts = model.update.parts
    leaves = [(part.rows.detach().requires_grad_(), part.columns.detach()) for part in parts]
    pieces = [
        plain("piecewise", "code", rows, columns, part.threshold, torch.zeros(3))
        for (rows, columns), part in zip(leaves, parts, strict=True)
    ]
    y = F.linear(x, model.base.weight + torch.cat(pieces), model.base.bias)
    return list(torch.autograd.grad(y.square().sum(), [rows for rows, _ in leaves]))


def test_code_that_reads_the_weight_teaches_the_points() -> None:
    model = adapted(nn.Linear(24, 40), sparsify="hard")
    x = torch.randn(7, 24)
    model(x).square().sum().backward()
    expected = model.update.parts[0].rows.grad.clone()
    model.zero_grad()
    F.linear(x, model.weight, model.bias).square().sum().backward()
    torch.testing.assert_close(model.update.parts[0].rows.grad, expected)


# precision


def test_a_merged_bfloat16_module_agrees_and_learns_in_float32() -> None:
    model = adapted(nn.Linear(64, 48).bfloat16(), sparsify="hard", sparsity=0.5)
    x = torch.randn(9, 64).bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert model.update.parts[0].rows.grad.dtype == torch.float32
    dense = F.linear(x.float(), model.update.weight(model.base.weight), model.base.bias.float())
    torch.testing.assert_close(y.float(), dense, rtol=0, atol=0.02)
    torch.testing.assert_close(merged(model)(x), y, rtol=0, atol=0.03)
    assert model.base.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision_does_not_round_a_small_change_away(how: str) -> None:
    base = nn.Linear(4096, 8, bias=False)
    signs = torch.randn(4096).sign()
    change = 2**-11 * base.weight.detach().abs() * signs  # the sum of both is the weight again in bfloat16
    expected = change.abs().sum(1)
    assert torch.equal((base.weight.bfloat16() + change).bfloat16(), base.weight.bfloat16())
    x = signs[None]
    if how == "weights":
        base, x = base.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = folded(base, x, lambda change: change, [change])
        moved = y - base(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float()[0], expected, rtol=0.3, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_keeps_the_kernel_in_float32(kernel: str) -> None:
    model = adapted(nn.Linear(64, 48), sparsify="hard", kernel=kernel)
    x = torch.randn(9, 64)
    model(x).square().sum().backward()
    exact = model.update.parts[0].rows.grad.clone()
    change = model.update.weight(model.base.weight)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        torch.testing.assert_close(model.update.weight(model.base.weight), change, rtol=0, atol=0)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    torch.testing.assert_close(model.update.parts[0].rows.grad, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))
    before = model.update.parts[0].threshold.clone()
    with torch.autocast("cpu", torch.bfloat16):
        model.update.settle()
    assert torch.equal(model.update.parts[0].threshold, before)


def test_a_threshold_must_not_move_between_forward_and_backward() -> None:
    model = adapted(nn.Linear(64, 48))
    y = model(torch.randn(9, 64))
    model.update.settle()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
