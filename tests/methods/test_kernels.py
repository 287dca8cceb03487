"""The kernels of SNELL and SNELLA: their formulas, their rank and their sparsity, section A.4.1 of the papers notes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.methods.adapter.snell import after_step
from peftc.nn import kernels
from peftc.nn.folded import rebuilt
from peftc.nn.kernels import KERNELS, SPARSIFY, Kernel, threshold_of
from tests.methods.adapting import adapted, plain

KINDS = [(kernel, form) for kernel in KERNELS for form in SPARSIFY]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def points(out: int, in_: int, half: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    mix = torch.tensor([0.7, 0.3, 0.2], dtype=dtype)
    return torch.randn(2, out, half, dtype=dtype), torch.randn(2, in_, half, dtype=dtype), mix


def for_kernel(kernel: str, mix: Tensor) -> list[Tensor]:
    return [mix] if kernel == "mix" else []


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
