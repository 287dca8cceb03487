"""SNELL and SNELLA: each check of section A.4.1 of the papers notes, and what a merge and a resumed training need."""

import copy
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftc.errors import UsageError
from peftc.methods.adapter.lora import lora
from peftc.methods.adapter.snell import after_step, snell
from peftc.methods.adapter.snella import snella
from peftc.nn import kernels
from peftc.nn.adapted import Adapted, adapted_modules, take_in
from peftc.nn.folded import folded, form_of, rebuilt
from peftc.nn.kernels import KERNELS, SPARSIFY, Kernel, threshold_of
from peftc.plans import budgets

KINDS = [(kernel, form) for kernel in KERNELS for form in SPARSIFY]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def points(out: int, in_: int, half: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    mix = torch.tensor([0.7, 0.3, 0.2], dtype=dtype)
    return torch.randn(2, out, half, dtype=dtype), torch.randn(2, in_, half, dtype=dtype), mix


def for_kernel(kernel: str, mix: Tensor) -> list[Tensor]:
    return [mix] if kernel == "mix" else []


def adapted(module: nn.Module, **settings: Any) -> Adapted:
    update = snell(module, **{"rank": 4, **settings})
    assert update is not None
    return Adapted(module, update)


def merged(model: Adapted) -> Any:
    network = nn.Sequential(model)
    take_in(network)
    return network[0]


def plain(kernel: str, sparsify: str, rows: Tensor, columns: Tensor, threshold: Tensor, mix: Tensor) -> Tensor:
    """Compute the change in the way of the formulas, for autograd to go through."""
    if kernel == "linear":
        values = sum(b @ a.T for b, a in zip(rows, columns, strict=True))
    else:
        distances = [(b[:, None] - a[None]).square().sum(-1).sqrt() for b, a in zip(rows, columns, strict=True)]
        values = 0.1 * (distances[0] - distances[1])
        if kernel == "mix":
            values = values + mix[0] * torch.softmax(values / mix[1], 0) + mix[2]
    size = values.abs().detach()
    stays = size > threshold
    if sparsify == "paper":  # the threshold is a number to the gradient
        return torch.where(stays, values * (values.abs() - threshold.clamp(min=0)), 0)
    factor = {"none": torch.ones_like(size), "hard": stays.to(size.dtype), "code": size * stays}[sparsify]
    return values * factor


# the formulas


def by_hand(kernel: str, rows: Tensor, columns: Tensor, mix: Tensor) -> list[list[float]]:
    (_, out, half), in_ = rows.shape, columns.shape[1]
    found = [[0.0] * in_ for _ in range(out)]
    for i in range(out):
        for j in range(in_):
            for p, sign in ((0, 0.1), (1, -0.1)):
                b, a = rows[p, i].tolist(), columns[p, j].tolist()
                if kernel == "linear":
                    found[i][j] += sum(b[q] * a[q] for q in range(half))
                else:
                    found[i][j] += sign * math.sqrt(sum((b[q] - a[q]) ** 2 for q in range(half)))
    if kernel == "mix":
        alpha, gamma, beta = mix.tolist()
        for j in range(in_):
            grown = [math.exp(found[i][j] / gamma) for i in range(out)]
            for i in range(out):
                found[i][j] += alpha * grown[i] / sum(grown) + beta
    return found


@pytest.mark.parametrize("block", [1, 30, 1 << 18])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_are_those_of_nested_loops(kernel: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.BLOCKS, "cpu", block)
    rows, columns, mix = points(7, 5, 3)
    values = Kernel(kernel, "none").values(rows, columns, *for_kernel(kernel, mix))
    torch.testing.assert_close(
        values, torch.tensor(by_hand(kernel, rows, columns, mix), dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("sparsify", SPARSIFY)
def test_each_form_zeroes_and_scales_as_it_says(sparsify: str) -> None:
    rows, columns, _ = points(6, 5, 2)
    values = Kernel("piecewise", "none").values(rows, columns)
    threshold = threshold_of(values.clone(), 18)
    last, first = values.abs().flatten().sort().values[17:19].tolist()
    assert last <= float(threshold) < first
    expected = [
        {"none": v, "hard": v, "code": v * abs(v), "paper": v * (abs(v) - float(threshold))}[sparsify]
        if sparsify == "none" or abs(v) > float(threshold) else 0.0
        for v in values.flatten().tolist()
    ]  # fmt: skip
    change = Kernel("piecewise", sparsify).change(rows, columns, threshold)
    torch.testing.assert_close(change.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("zeroed, block", [(30, 1), (30, 24), (30, 1 << 18), (0, 24)])
@pytest.mark.parametrize("kernel, sparsify", KINDS)
def test_the_closed_form_of_the_gradient_is_autograds(
    kernel: str, sparsify: str, zeroed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels.BLOCKS, "cpu", block)
    rows, columns, mix = (each.requires_grad_() for each in points(9, 6, 3))
    form, extra = Kernel(kernel, sparsify), for_kernel(kernel, mix)
    threshold = threshold_of(form.values(*(each.detach() for each in (rows, columns, *extra))), zeroed)
    gradient = torch.randn(9, 6, dtype=torch.float64)
    inputs = [rows, columns, *extra]
    dense = plain(kernel, sparsify, rows, columns, threshold, mix)
    expected = torch.autograd.grad(dense, inputs, gradient)
    change = form.change(*(each.detach() for each in (rows, columns, threshold, *extra)))
    torch.testing.assert_close(change, dense, rtol=0, atol=1e-12)
    found = form.pull(gradient, *(each.detach() for each in (rows, columns, threshold, *extra)))
    assert found[2] is None
    for mine, autograds in zip([*found[:2], *found[3:]], expected, strict=True):
        assert float(autograds.abs().max()) > 1e-3
        torch.testing.assert_close(mine, autograds, rtol=0, atol=1e-10)


def test_equal_points_have_a_gradient_of_0_and_not_nan() -> None:
    rows, columns, _ = points(4, 3, 2)
    columns[0] = rows[0, 1]
    found = Kernel("piecewise", "none").pull(torch.ones(4, 3).double(), rows, columns, torch.tensor(-1.0))
    assert all(bool(each.isfinite().all()) for each in found if each is not None)


def test_half_precision_points_are_computed_in_float32() -> None:
    module = nn.Linear(96, 64)
    exact = adapted(module).update
    rough = copy.deepcopy(exact).bfloat16()
    kept = copy.deepcopy(rough).float()
    torch.testing.assert_close(
        rough.parts[0].form.values(rough.parts[0].rows, rough.parts[0].columns),
        kept.parts[0].form.values(kept.parts[0].rows, kept.parts[0].columns), rtol=0, atol=0,
    )  # fmt: skip


# what the kernel is for


def test_the_change_has_more_rank_than_its_points_and_a_product_has_not() -> None:
    rows, columns, _ = points(256, 256, 4, torch.float32)
    product, distances = (Kernel(kernel, "none").values(rows, columns) for kernel in ("linear", "piecewise"))
    assert torch.linalg.matrix_rank(product, rtol=1e-4) == 8
    assert torch.linalg.matrix_rank(distances, rtol=1e-4) >= 100


@pytest.mark.parametrize("kernel, beats", [("linear", False), ("piecewise", True), ("mix", True)])
def test_a_kernel_fits_what_no_matrix_of_its_rank_can(kernel: str, beats: bool) -> None:
    target = torch.randn(64, 64)
    optimum = float(torch.linalg.svdvals(target)[8:].square().sum()) / 64**2
    form = Kernel(kernel, "none")
    rows, columns = (nn.Parameter(torch.randn(2, 64, 4)) for _ in range(2))
    mix = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
    learning = [rows, columns, *for_kernel(kernel, mix)]
    steps = 400
    optimizer = torch.optim.Adam(learning, lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        values = rebuilt(form.change, [rows, columns, torch.tensor(-1.0), *learning[2:]], pull=form.pull)
        loss = F.mse_loss(values, target)
        loss.backward()
        optimizer.step()
        schedule.step()
    print(kernel, float(loss.detach()), optimum)
    assert (float(loss.detach()) < 0.97 * optimum) == beats


# sparsity


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.9, 0.995])
@pytest.mark.parametrize("sparsify", SPARSIFY[1:])
def test_a_matrix_keeps_exactly_what_was_asked(sparsity: float, sparsify: str) -> None:
    report = adapted(nn.Linear(200, 150), sparsity=sparsity, sparsify=sparsify).update.report()
    assert report["asked"] == report["entries"] - math.ceil(sparsity * report["entries"] - 1e-6)
    assert report["asked"] - 1 <= report["changed"] <= report["asked"]


def test_the_competition_is_of_a_matrix_not_of_its_rows() -> None:
    change = adapted(nn.Linear(200, 150)).update.weight(torch.zeros(150, 200))
    assert len({int(row.count_nonzero()) for row in change}) > 5


def test_without_sparsity_the_change_is_the_kernel_itself() -> None:
    update = adapted(nn.Linear(40, 30), sparsity=0.0).update
    part = update.parts[0]
    expected = Kernel("piecewise", "none").values(part.rows, part.columns)
    torch.testing.assert_close(update.weight(torch.zeros(30, 40)), expected, rtol=0, atol=0)
    assert update.report()["changed"] == update.report()["asked"] == 1200


def test_a_zeroed_entry_can_return() -> None:
    update = adapted(nn.Linear(40, 30), sparsity=0.5).update
    before = update.weight(torch.zeros(30, 40)) != 0
    with torch.no_grad():
        for each in update.parameters():
            each += 0.3 * each.std() * torch.randn_like(each)
    after_step({"": update}, 1, 10, 5)
    after = update.weight(torch.zeros(30, 40)) != 0
    assert int((~before & after).sum()) > 30
    assert abs(int(after.sum()) - 600) <= 1


@pytest.mark.parametrize("zeroed", [0, 1, 7, 11, 12])
def test_a_threshold_parts_as_many_magnitudes_as_asked(zeroed: int) -> None:
    values = torch.randn(3, 4)
    assert int((values.abs() <= threshold_of(values.clone(), zeroed)).sum()) == zeroed


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_a_threshold_of_many_magnitudes_is_exact(share: float) -> None:
    values = torch.randn(300, 700, dtype=torch.float64)
    zeroed = int(share * values.numel())
    assert int((values.abs() <= threshold_of(values.clone(), zeroed)).sum()) == zeroed


def test_equal_magnitudes_fall_together_and_zeros_can_learn() -> None:
    values = torch.tensor([1.0, -2.0, 2.0, 2.0, 3.0])
    assert (values.abs() <= threshold_of(values.clone(), 2)).tolist() == [True, True, True, True, False]
    near = torch.tensor([1.0, 2.0, 2.0000002384185791, 3.0])  # neighbours in float32
    assert int((near <= threshold_of(near.clone(), 2)).sum()) == 2
    assert float(threshold_of(torch.zeros(5), 3)) < 0


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


# memory


def stack(make: Callable[[nn.Module], nn.Module | None]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [Adapted(each, make(each)) for each in (nn.Linear(96, 288), nn.Linear(288, 96))]  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that forward keeps for backward and that are not the network's own."""
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x).sum().backward()
    return sum(kept.values())


def test_the_dense_change_is_not_kept_for_the_backward_pass() -> None:
    x = torch.randn(4, 10, 96, requires_grad=True)
    dense = 6 * 96 * 288 * 4
    inputs = 4 * sum(x.numel() // 96 * width for width in (96, 288) * 3)
    ways: dict[str, Any] = {
        "plain": lambda each: snell(each, rank=8, sparsity=0.0),
        "snell": lambda each: snell(each, rank=8, split=1),
        "mix": lambda each: snella(each, rank=8, split=1),
        "split": lambda each: snell(each, rank=8),
    }
    found = {name: saved_bytes(stack(make), x) for name, make in ways.items()}
    assert set(found.values()) == {inputs}, found
    assert found["mix"] < 1.1 * saved_bytes(stack(lambda each: lora(each, rank=8)), x)
    assert inputs < dense / 2, "else the figures could hide it"


def test_no_dense_change_lives_between_forward_and_backward() -> None:
    model = stack(lambda each: snella(each, rank=8, split=1))
    before = dense_tensors()
    y = model(torch.randn(4, 10, 96, requires_grad=True))
    assert dense_tensors() == before == 6
    y.sum().backward()
    assert dense_tensors() == 6


def dense_tensors() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    return len({each.data_ptr() for each in tensors if each.numel() == 96 * 288})


def test_the_optimizer_keeps_two_numbers_for_each_that_learns() -> None:
    model = stack(lambda each: snella(each, rank=8))
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning)
    model(torch.randn(4, 96)).sum().backward()
    optimizer.step()
    state = [each for held in optimizer.state.values() for name, each in held.items() if name != "step"]
    expected = 8 * (6 * 8 * (96 + 288) + 3 * 8 * 2 * 96 + 3 * (3 * 3 + 3))
    assert sum(each.numel() * each.element_size() for each in state) == expected


# what happens after a step


def trained(model: nn.Module, steps: int, begin: int = 0, until: int | None = None, per_epoch: float = 4.0) -> None:
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.01)  # of no state
    updates = {name: each.update for name, each in adapted_modules(model).items()}
    for step in range(begin, steps if until is None else until):
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
        (model(x) - x).square().mean().backward()
        nn.utils.clip_grad_value_(learning, 0.1)
        optimizer.step()
        after_step(updates, step + 1, steps, per_epoch)
        optimizer.zero_grad()


def parts_of(model: nn.Module) -> list[Any]:
    return [part for each in adapted_modules(model).values() for part in each.update.parts]


def kept_of(model: nn.Module) -> list[int]:
    return [int(part.kept) for part in parts_of(model)]


def realised(model: nn.Module) -> list[int]:
    return [int(part.form.change(*part.tensors()).count_nonzero()) for part in parts_of(model)]


@pytest.mark.parametrize("sparsify", SPARSIFY[1:])
def test_layers_compete_and_their_sum_is_exact(sparsify: str) -> None:
    model = stack(lambda each: snella(each, rank=8, sparsity=0.9, sparsify=sparsify))
    total = 6 * 96 * 288
    trained(model, 12)
    kept = kept_of(model)
    assert sum(kept) == sum(size - math.ceil(0.9 * size) for size in sizes_of(model))
    assert len(set(kept)) > 6, "budgets moved"
    assert all(abs(a - b) <= 1 for a, b in zip(kept, realised(model), strict=True))
    floor = [int(0.1 * sum(kept) * size / total) for size in sizes_of(model)]
    assert all(a >= b for a, b in zip(kept, floor, strict=True))


def sizes_of(model: nn.Module) -> list[int]:
    return [part.entries for part in parts_of(model)]


def test_uniform_leaves_every_layer_the_same_share() -> None:
    model = stack(lambda each: snella(each, rank=8, sparsity=0.9, allocate="uniform"))
    assert not [name for name in model.state_dict() if "_mean_" in name], "no scores are kept"
    trained(model, 12)
    shares = [kept / size for kept, size in zip(kept_of(model), sizes_of(model), strict=True)]
    assert max(shares) - min(shares) < 1e-3
    assert sum(kept_of(model)) == sum(size - math.ceil(0.9 * size) for size in sizes_of(model))


def test_the_budget_falls_by_epochs_along_the_cubic() -> None:
    model = stack(lambda each: snella(each, rank=8, sparsity=0.8, start=0.2, refresh_every=4))
    totals = [sum(kept_of(model))]
    first, last = (sum(size - math.ceil(each * size - 1e-6) for size in sizes_of(model)) for each in (0.2, 0.8))
    for step in range(13):
        trained(model, 13, step, step + 1)
        totals.append(sum(kept_of(model)))
    expected = {at: last + round((first - last) * (1 - at / 13) ** 3) for at in (0, 4, 8, 12)} | {13: last}
    assert totals == [expected[max(each for each in expected if each <= at)] for at in range(14)]


def test_scores_are_sensitivity_times_uncertainty() -> None:
    layer = adapted(nn.Linear(24, 40))
    update = snella(nn.Linear(24, 40), rank=2, sparsity=0.5)
    assert update is not None
    layer = Adapted(nn.Linear(24, 40), update)
    part: Any = update.parts[0]
    mean = spread = torch.zeros_like(part.rows)
    for step in range(3):
        layer(torch.randn(5, 24)).square().sum().backward()
        with torch.no_grad():
            part.rows -= 0.1 * part.rows.grad
        found = (part.rows * part.rows.grad).abs().detach()
        mean = 0.85 * mean + 0.15 * found
        spread = 0.85 * spread + 0.15 * (found - mean).abs()
        after_step({"": update}, step + 1, 100, 50)
        layer.zero_grad()
    torch.testing.assert_close(part._mean_rows, mean)
    torch.testing.assert_close(part._spread_rows, spread)


def test_gradients_that_are_no_numbers_leave_the_scores_finite() -> None:
    model = stack(lambda each: snella(each, rank=8, sparsity=0.9))
    for part in parts_of(model):
        part.rows.grad = torch.full_like(part.rows, torch.nan)
        part.columns.grad = torch.full_like(part.columns, torch.inf)
    after_step({name: each.update for name, each in adapted_modules(model).items()}, 10, 10, 5)
    assert sum(kept_of(model)) == sum(size - math.ceil(0.9 * size) for size in sizes_of(model))
    assert max(kept_of(model)) < 1.2 * 2 * 2765, "without a score, size decides"
    scores = [each for name, each in model.state_dict().items() if "_mean_" in name or "_spread_" in name]
    assert len(scores) == 48
    assert all(bool(each.isfinite().all()) for each in scores), "or they would stay so for good"


def test_thresholds_follow_every_few_steps_and_at_the_end() -> None:
    model = stack(lambda each: snell(each, rank=8, threshold_every=3))
    seen = []
    for step in range(5):
        trained(model, 5, step, step + 1)
        seen.append(float(model[0].update.parts[0].threshold))
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]


@pytest.mark.parametrize("method", [snell, snella])
def test_a_training_goes_on_from_its_state(method: Any) -> None:
    whole = stack(lambda each: method(each, rank=8, sparsity=0.9))
    halves = copy.deepcopy(whole)
    trained(whole, 10)
    trained(halves, 10, 0, 5)
    torch.manual_seed(7)
    resumed = stack(lambda each: method(each, rank=8, sparsity=0.9))
    resumed.load_state_dict(halves.state_dict())
    trained(resumed, 10, 5, 10)
    for name, each in whole.state_dict().items():
        assert torch.equal(each, resumed.state_dict()[name]), name


@pytest.mark.parametrize("method", [snell, snella])
def test_a_reloaded_update_has_the_same_mask_bit_for_bit(method: Any) -> None:
    model = stack(lambda each: method(each, rank=8, sparsity=0.9))
    trained(model, 6)
    stored = {name: each.clone() for name, each in model.state_dict().items() if "._" not in name}
    torch.manual_seed(3)
    fresh = stack(lambda each: method(each, rank=8, sparsity=0.9))
    missing = fresh.load_state_dict(stored, strict=False).missing_keys
    assert all("._" in name for name in missing)
    for one, two in zip(adapted_modules(model).values(), adapted_modules(fresh).values(), strict=True):
        two.update.settle()  # as the same entries stay, it changes nothing
        assert one.update.report() == two.update.report()
        assert torch.equal(merged(one).weight, merged(two).weight)


def test_an_update_is_built_without_memory_and_filled_later() -> None:
    model = adapted(nn.Linear(40, 30))
    with torch.device("meta"):
        empty = adapted(nn.Linear(40, 30)).update
    empty.load_state_dict(model.update.state_dict(), assign=True)
    weight = model.base.weight
    assert torch.equal(empty.weight(weight), model.update.weight(weight))


def test_settled_thresholds_suit_the_points_that_took_the_place_of_others() -> None:
    update = adapted(nn.Linear(60, 40), sparsity=0.5).update
    with torch.no_grad():
        for each in update.parameters():
            each *= 3
    assert update.report()["changed"] > 1500
    update.settle()
    assert abs(update.report()["changed"] - 1200) <= 1


# settings


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_identity_start_is_exact_and_learns(sparsity: float, kernel: str) -> None:
    model = adapted(nn.Linear(40, 30), identity=True, sparsify="hard", sparsity=sparsity, kernel=kernel)
    x = torch.randn(5, 40)
    assert torch.equal(model.update.weight(model.base.weight), model.base.weight)
    model.update.settle()
    optimizer = torch.optim.SGD(model.update.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model.update.settle()
    assert model.update.report()["changed"] > 0


def test_dropout_of_the_change_acts_in_training_only() -> None:
    model = adapted(nn.Linear(40, 30), dropout=0.5, sparsify="hard", sparsity=0.0)
    with torch.no_grad():
        model.update.parts[0].rows *= 10
    x = torch.randn(5, 40)
    dense = F.linear(x, model.weight, model.bias)
    torch.testing.assert_close(model.eval()(x), dense, rtol=0, atol=1e-5)
    loud = model.train()(x)
    assert float((loud - dense).detach().abs().max()) > 1e-2
    loud.sum().backward()
    assert float(model.update.parts[0].rows.grad.abs().max()) > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 7}, "`rank` is 7.*\n.*even"),
        ({"rank": 0}, "`rank` is 0"),
        ({"sparsity": 1.0}, "`sparsity` is 1.0"),
        ({"sparsity": float("nan")}, "`sparsity` is nan"),
        ({"sparsify": "codes"}, "unknown value `codes`.*\n.*`hard`, `code`, `paper`"),
        ({"kernel": "rbf"}, "unknown value `rbf`"),
        ({"identity": True}, "`identity` and `sparsify=code` exclude each other"),
        ({"dropout": -0.1}, "`dropout` is -0.1"),
        ({"threshold_every": 0}, "`threshold_every` is 0"),
        ({"split": 0}, "`split` is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        snell(nn.Linear(40, 30), **settings)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"start": 1.5}, "`start` is 1.5"),
        ({"allocate": "global"}, "unknown value `global`"),
        ({"min_keep": 2.0}, "`min_keep` is 2.0"),
        ({"refresh_every": -1}, "`refresh_every` is -1"),
    ],
)
def test_settings_of_the_competition_are_refused_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        snella(nn.Linear(40, 30), **settings)


# budgets


def test_the_cubic_is_exact_at_its_ends_and_falls() -> None:
    totals = [budgets.total(step, 100, 9_900, 1_000) for step in range(101)]
    assert totals[0] == 9_900
    assert totals[100] == 1_000
    assert all(a >= b for a, b in itertools.pairwise(totals))
    assert totals[50] == 1_000 + round(8_900 / 8)


def test_entries_are_shared_out_each_epoch_or_more_often_in_a_short_training() -> None:
    assert [step for step in range(1, 101) if budgets.refreshed(step, 2000, 50, 0)] == [50, 100]
    assert [step for step in range(1, 41) if budgets.refreshed(step, 40, 40, 0)] == list(range(2, 41, 2))
    assert [step for step in range(1, 11) if budgets.refreshed(step, 10, 40, 3)] == [3, 6, 9, 10]


SIZES = {"a": 100, "b": 1000, "c": 400}
ODD: list[dict[str, float]] = [
    {"a": 1.0, "b": 2.0, "c": 3.0},
    {"a": 0.0, "b": 0.0, "c": 0.0},
    {"a": math.nan, "b": math.inf, "c": 1e-300},
    {"a": math.inf, "b": math.inf, "c": math.inf},
    {"a": 1e308, "b": 1e308, "c": 1e308},
    {"a": 5e-324, "b": -1.0, "c": 0.0},
]


@pytest.mark.parametrize("scores", ODD, ids=str)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("budget", [0, 1, 2, 7, 333, 1499, 1500])
def test_shares_sum_to_the_budget_within_floors_and_sizes(scores: dict[str, float], floor: float, budget: int) -> None:
    kept = budgets.shares(scores, SIZES, budget, floor)
    assert sum(kept.values()) == budget
    assert all(int(floor * budget * size / 1500) <= kept[name] <= size for name, size in SIZES.items())


def test_shares_follow_scores_and_a_full_layer_passes_on_the_rest() -> None:
    assert budgets.shares({"a": 1, "b": 2, "c": 3}, SIZES, 60) == {"a": 10, "b": 20, "c": 30}
    assert budgets.shares({"a": 1e9, "b": 1, "c": 3}, SIZES, 500) == {"a": 100, "b": 100, "c": 300}
    assert budgets.shares({"a": 0, "b": 0, "c": 0}, SIZES, 150) == {"a": 10, "b": 100, "c": 40}
    assert budgets.shares({"a": 0, "b": 0, "c": 1}, SIZES, 150) == {"a": 0, "b": 0, "c": 150}
    assert budgets.shares({"a": 0, "b": 0, "c": 1}, SIZES, 150, 0.1) == {"a": 1, "b": 10, "c": 139}
    assert budgets.shares({"a": 9, "b": 1, "c": 1}, SIZES, 150, 1.0) == {"a": 10, "b": 100, "c": 40}
