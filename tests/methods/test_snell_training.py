"""SNELL and SNELLA in training: memory, competition for entries, resuming, and settings."""

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.calibration.memory import saved
from peftc.errors import UsageError
from peftc.methods.adapter.lora import lora
from peftc.methods.adapter.snell import after_step, snell
from peftc.methods.adapter.snella import snella
from peftc.nn.adapted import Adapted, adapted_modules
from peftc.nn.kernels import KERNELS, SPARSIFY
from tests.methods.adapting import adapted, merged


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# memory


def stack(make: Callable[[nn.Module], nn.Module | None]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [Adapted(each, make(each)) for each in (nn.Linear(96, 288), nn.Linear(288, 96))]  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that forward keeps for backward and that are not the network's own."""
    with saved(model) as kept:
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
    scores = update.state_dict()
    torch.testing.assert_close(scores["parts.0._mean_rows"], mean)
    torch.testing.assert_close(scores["parts.0._spread_rows"], spread)


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
