"""Every method of finetuning keeps the contract of an update, on every kind of module; FLoRA what its formula says."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftc.errors import UsageError
from peftc.methods.adapter.flora import flora
from peftc.methods.adapter.lora import lora
from peftc.methods.adapter.sara import after_step
from peftc.methods.adapter.sara import penalty as sara_penalty
from peftc.methods.registry import METHODS, find, with_settings
from peftc.nn import forms, merging
from peftc.nn.adapted import Adapted, take_in
from peftc.nn.lowrank import LowRankLinear

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "rslora": {"rank": 2},
    "dora": {"rank": 2},
    "flora": {"rank": 3, "rank_spatial": 2},
    "adapter": {"rank": 4},
    "sara": {"share": 0.2},
}
OURS = sorted(set(METHODS["adapter"]) - {"snell", "snella"})  # those two start near the base, not at it
UPDATES = sorted(SETTINGS)
WEIGHT_UPDATES = sorted(set(UPDATES) - {"adapter"})


def image(channels: int = 6) -> Tensor:
    return torch.randn(2, channels, 9, 8)


def tokens(width: int) -> Tensor:
    return torch.randn(2, 5, width)


def conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(20, 24)


def same() -> nn.Module:
    from timm.layers import Conv2dSame

    return Conv2dSame(6, 10, 3, stride=2)


def conv2d(**settings: Any) -> nn.Module:
    return nn.Conv2d(6, 10, **{"kernel_size": 3, "padding": 1, **settings})


KINDS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(24, 20), lambda: tokens(24)),
    "linear without bias": (lambda: nn.Linear(20, 24, bias=False), lambda: tokens(20)),
    "transposed": (conv1d_of_transformers, lambda: tokens(24)),
    "embedding": (lambda: nn.Embedding(30, 12, padding_idx=1), lambda: torch.randint(2, 30, (3, 7))),
    "factored": (lambda: LowRankLinear(24, 20, 6, bias=True), lambda: tokens(24)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=2), lambda: torch.randn(2, 6, 11)),
    "conv2d": (conv2d, image),
    "conv2d 1 x 1": (lambda: nn.Conv2d(12, 10, 1, stride=2, bias=False), lambda: image(12)),
    "conv2d strided": (lambda: conv2d(stride=(1, 2), padding=(0, 2)), image),
    "conv2d dilated": (lambda: conv2d(dilation=(2, 1)), image),
    "conv2d rectangular": (lambda: conv2d(kernel_size=(5, 2), padding=(2, 0)), image),
    "conv2d reflected": (lambda: conv2d(padding_mode="reflect"), image),
    "conv2d circular": (lambda: conv2d(padding_mode="circular", padding=(1, 2)), image),
    "conv2d replicated, same": (lambda: conv2d(padding_mode="replicate", padding="same"), image),
    "conv2d of timm": (same, image),
    "conv2d of two groups": (lambda: conv2d(groups=2), image),
    "depthwise 7 x 7": (lambda: nn.Conv2d(12, 12, 7, padding=3, groups=12), lambda: image(12)),
    "depthwise, reflected": (
        lambda: nn.Conv2d(12, 24, 5, padding=2, groups=12, padding_mode="reflect"),
        lambda: image(12),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5, 4, 3)),
}
LEFT_ALONE = {
    "adapter": {name for name in KINDS if name not in ("linear", "transposed", "factored")},
    "sara": {"embedding", "factored"},
}


EVERY = [(name, kind) for name in UPDATES for kind in KINDS if kind not in LEFT_ALONE.get(name, ())]
OF_WEIGHTS = [(name, kind) for name, kind in EVERY if name in WEIGHT_UPDATES]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(kind: str) -> tuple[nn.Module, Tensor]:
    module, x = (make() for make in KINDS[kind])
    return module, x


def update_of(name: str, module: nn.Module, **settings: Any) -> Any:
    method = find("adapter", name, "--method")
    return method(module, **with_settings(method, name, {**SETTINGS.get(name, {}), **settings}))


def trained(update: nn.Module) -> nn.Module:
    """Return an update whose every parameter has moved."""
    for parameter in update.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return update


def adapted(name: str, kind: str) -> tuple[Adapted, Tensor]:
    module, x = made(kind)
    update = update_of(name, module)
    assert isinstance(update, nn.Module), f"{name} gives {update} for {kind}"
    return Adapted(module, update), x


def merged(module: Adapted) -> nn.Module:
    """Return a copy of the base that took the update in."""
    network = nn.ModuleList([copy.deepcopy(module)])
    assert take_in(network).keys() == {"0"}
    return network[0]


@pytest.mark.parametrize("name", OURS)
def test_settings_have_defaults_and_each_kind_gets_an_update_names_or_nothing(name: str) -> None:
    settings = list(inspect.signature(find("adapter", name, "--method")).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in settings)
    for kind in KINDS:
        module, _ = made(kind)
        update = update_of(name, module)
        if isinstance(update, tuple):
            assert set(update) <= set(dict(module.named_parameters()))
        assert (update is None) == (kind in LEFT_ALONE.get(name, ()) or nothing(name, module)), kind


def nothing(name: str, module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return name in ("head", "convpass") or (name == "bitfit" and "bias" not in own) or (name == "full" and not own)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_it_starts_exactly_at_the_base_and_moves_from_there(name: str, kind: str) -> None:
    module, x = adapted(name, kind)
    assert torch.equal(module(x), module.base(x))
    module(x).square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in module.update.parameters())  # type: ignore[union-attr]
    trained(module.update)
    assert not torch.allclose(module(x), module.base(x), atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_gradients_reach_the_update_alone(name: str, kind: str) -> None:
    module, x = adapted(name, kind)
    trained(module.update)
    module(x).square().sum().backward()
    assert not any(parameter.grad is not None for parameter in module.base.parameters())
    for key, parameter in module.update.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("name", "kind"), OF_WEIGHTS)
def test_it_computes_with_the_weight_that_merge_writes_and_its_gradients_are_those_of_it(name: str, kind: str) -> None:
    module, x = adapted(name, kind)
    trained(module.update)
    x = x.requires_grad_() if x.is_floating_point() else x
    learned = [*module.update.parameters(), *([x] if x.requires_grad else [])]
    direction = torch.randn_like(module(x))
    found = torch.autograd.grad((module(x) * direction).sum(), learned)
    if kind == "factored":
        y = nn.functional.linear(x, module.weight, module.base.bias)
    else:
        y = functional_call(module.base, {"weight": module.update.weight(module.base.weight)}, (x,))  # type: ignore[operator]
    torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad((y * direction).sum(), learned), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), [pair for pair in OF_WEIGHTS if pair[1] != "factored"])
def test_merged_is_unmerged_and_the_base_is_untouched_until_then(name: str, kind: str, dtype: torch.dtype) -> None:
    module, x = adapted(name, kind)
    module.base.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    before = module.base.weight.clone()  # type: ignore[operator]
    trained(module.update)
    y = module(x).detach()
    module.eval()
    assert y.dtype == dtype and torch.equal(module.base.weight, before)  # type: ignore[arg-type]
    whole = merged(module)
    assert torch.equal(module.base.weight, before) and not torch.equal(whole.weight, before)  # type: ignore[arg-type]
    limit = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(whole(x), y, rtol=limit, atol=limit * float(y.abs().max().clamp_min(1)))
    assert whole.weight.dtype == dtype  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_under_autocast_it_gives_what_the_base_gives_in_that_dtype(name: str, kind: str) -> None:
    module, x = adapted(name, kind)
    trained(module.update)
    full = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dtype = module(x), module.base(x).dtype
        y.float().square().sum().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), full, rtol=0.03, atol=0.03 * float(full.detach().abs().max()))
    for parameter in module.update.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_on_a_gpu_it_computes_and_learns_what_it_does_here(name: str, kind: str, dtype: torch.dtype) -> None:
    module, x = adapted(name, kind)
    trained(module.update)
    direction = torch.randn_like(module(x))
    limit = 1e-3 if dtype == torch.float32 else 0.05
    there, x_there = copy.deepcopy(module).cuda(), x.cuda()
    there.base.to(dtype)
    y = there(x_there.to(dtype) if x.is_floating_point() else x_there)
    assert y.dtype == dtype
    for each, result, way in ((module, module(x), direction), (there, y.float(), direction.cuda())):
        torch.testing.assert_close(result.cpu(), module(x), rtol=limit, atol=limit * float(direction.abs().max()))
        (result * way).sum().backward()
        assert all(parameter.grad is not None for parameter in each.update.parameters())
    for one, other in zip(module.update.parameters(), there.update.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert float((one.grad - other.grad.cpu()).norm() / one.grad.norm()) < limit


def test_a_bottleneck_cannot_be_merged_and_sits_where_it_is_asked_to() -> None:
    linear, x = nn.Linear(24, 20), tokens(24)
    after, parallel = (trained(update_of("adapter", linear, place=place)) for place in ("after", "parallel"))
    assert not Adapted(linear, after).mergeable
    given = linear(x)
    torch.testing.assert_close(after(linear, x), given + after.up(nn.functional.gelu(after.down(given))))
    torch.testing.assert_close(parallel(linear, x), given + parallel.up(nn.functional.gelu(parallel.down(x))))
    assert update_of("adapter", nn.Linear(20, 60)) is None  # one that expands


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_its_state_makes_it_again(name: str, kind: str) -> None:
    module, x = adapted(name, kind)
    trained(module.update)
    again = Adapted(module.base, update_of(name, module.base))
    again.update.load_state_dict(module.update.state_dict())
    assert torch.equal(again(x), module(x))
    assert all(tensor.is_contiguous() for tensor in module.update.state_dict().values())


@pytest.mark.parametrize("name", ["lora", "dora", "flora"])
def test_the_row_of_padding_stays_as_it_was(name: str) -> None:
    table = nn.Embedding(30, 12, padding_idx=1)
    table.weight.data[1] = 0.5
    module = Adapted(table, update_of(name, table))
    optimizer = torch.optim.SGD(module.update.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.tensor([[1, 2, 3], [3, 1, 1]])).square().sum().backward()
        optimizer.step()
    y = module(torch.tensor([1, 2])).detach()
    if name != "dora":  # whose magnitudes are of columns, and all rows share those
        assert torch.equal(y[0], table.weight[1])
    assert not torch.allclose(y[1], table.weight[2], atol=1e-3)
    assert torch.equal(module.update.factors()[0][1], torch.zeros_like(module.update.factors()[0][1]))  # type: ignore[operator]


def parameters(update: nn.Module) -> int:
    return sum(parameter.numel() for parameter in update.parameters())


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("lora", "linear", 2 * (24 + 20)),
        ("lora", "embedding", 2 * (30 + 12)),
        ("lora", "factored", 2 * (24 + 20)),
        ("lora", "conv2d rectangular", 2 * (6 * 5 * 2 + 10)),  # r (in kh kw + out)
        ("lora", "conv2d of two groups", 2 * (3 * 9 + 10)),
        ("lora", "depthwise 7 x 7", 2 * (49 + 12)),
        ("dora", "linear", 2 * (24 + 20) + 20),
        ("dora", "embedding", 2 * (30 + 12) + 12),
        ("flora", "linear", 9 + 3 * (24 + 20)),  # r^2 + r (in + out)
        ("flora", "conv2d rectangular", 3 * 3 * 2 * 2 + 10 * 3 + 6 * 3 + 5 * 2 + 2 * 2),
        ("flora", "conv2d of two groups", 3 * 3 * 2 * 2 + 10 * 3 + 3 * 3 + 3 * 2 + 3 * 2),
        ("flora", "depthwise 7 x 7", 3 * 1 * 2 * 2 + 12 * 3 + 1 * 1 + 7 * 2 + 7 * 2),  # the input rank is cut to 1
        ("flora", "conv3d", 3 * 3 * 8 + 6 * 3 + 4 * 3 + 3 * 2 * 3),
        ("adapter", "linear", 4 * (20 + 20) + 4 + 20),
        ("sara", "linear", round(0.2 * 24 * 20)),
    ],
)
def test_the_number_of_parameters_is_the_formula(name: str, kind: str, expected: int) -> None:
    module, _ = adapted(name, kind)
    assert parameters(module.update) == expected
    optimizer = torch.optim.AdamW(module.update.parameters())
    trained(module.update)
    module(made(kind)[1]).sum().backward()
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(each.nbytes for each in moments) == 8 * expected


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "flora"])
def test_an_update_as_large_as_the_weight_gives_way_to_the_weight(name: str) -> None:
    assert update_of(name, nn.Linear(20, 24), rank=12) == ("weight",)
    assert update_of(name, LowRankLinear(24, 20, 6, bias=True), rank=6) == ("down.weight", "up.weight")
    assert isinstance(update_of(name, nn.Linear(20, 24), rank=8), nn.Module)
    # 49 x 12 weights: the layout of loralib would have 16 times as many
    depthwise = nn.Conv2d(12, 12, 7, groups=12)
    expanding = {"rank": 40, **({"rank_spatial": 7} if name == "flora" else {})}
    assert update_of(name, depthwise, **expanding) == ("weight",)
    assert lora(depthwise, rank=16, layout="loralib") == ("weight",)
    assert update_of("sara", nn.Linear(20, 24), share=1.0) == ("weight",)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_layout_of_loralib_is_a_product_read_as_a_weight(groups: int) -> None:
    conv, x = nn.Conv2d(16, 24, 3, padding=1, groups=groups, padding_mode="reflect"), image(16)
    update = lora(conv, rank=1, alpha=3, layout="loralib")
    assert isinstance(update, nn.Module) and parameters(update) == 9 * (16 + 24 // groups)
    module = Adapted(conv, update)
    assert torch.equal(module(x), conv(x))
    trained(update)
    found = update.weight(conv.weight) - conv.weight  # type: ignore[operator]
    torch.testing.assert_close(found, 3 * (update.up @ update.down).view(conv.weight.shape))  # type: ignore[operator]
    torch.testing.assert_close(merged(module)(x), module(x), rtol=1e-5, atol=1e-5)
    assert lora(nn.Conv1d(8, 8, 3), layout="loralib") is None


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d of two groups"])
@pytest.mark.parametrize("name", ["lora", "dora", "flora"])
def test_dropout_is_of_the_input_of_the_change_and_of_training(name: str, kind: str) -> None:
    module, x = made(kind)
    update = trained(update_of(name, module, dropout=0.5))
    one = Adapted(module, update)
    assert not torch.equal(one(x), one(x))
    one.eval()
    expected = merged(one)(x)
    torch.testing.assert_close(one(x), expected, rtol=1e-5, atol=1e-5)
    one.train()
    with torch.no_grad():
        mean = torch.stack([one(x) for _ in range(600)]).mean(0)
    assert (mean - expected).norm() < 0.3 * (expected - module(x)).norm()  # over the masks, what it gives without


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    for name, divisor in (("lora", 16), ("rslora", 4)):
        update = trained(update_of(name, nn.Linear(200, 200), rank=16, alpha=8))
        torch.testing.assert_close(update.factors()[0], 8 / divisor * update.up)


def test_sara_trains_the_smallest_weights() -> None:
    linear = nn.Linear(64, 48)
    update = update_of("sara", linear, share=0.1)
    magnitudes = linear.weight.detach().abs().flatten()
    chosen = torch.zeros(48 * 64, dtype=torch.bool)
    chosen[update.places.long()] = True
    assert update.places.dtype == torch.int32 and magnitudes[chosen].max() <= magnitudes[~chosen].min()
    assert torch.equal(update.places, update.places.sort().values)
    trained(update)
    changed = update.weight(linear.weight) != linear.weight
    assert torch.equal(changed.flatten(), chosen)
    by_threshold = update_of("sara", linear, share=0.0, threshold=float(magnitudes.median()))
    assert len(by_threshold.places) == int((magnitudes < magnitudes.median()).sum())
    assert update_of("sara", linear, share=0.0, threshold=1e-12) is None


def test_sara_stops_halfway_what_has_outgrown_the_threshold() -> None:
    linear = nn.Linear(64, 48)
    module = Adapted(linear, update_of("sara", linear, share=0.2))
    update: Any = module.update
    before = linear.weight.detach().flatten()[update.places.long()].clone()
    optimizer = torch.optim.AdamW(module.update.parameters(), lr=1e-2)
    x, at_half = tokens(64), torch.empty(0)
    for step in range(1, 9):
        module(x).square().mean().backward()
        optimizer.step()
        after_step({"": update}, step, 8, 4.0)
        optimizer.zero_grad()
        at_half = update.values.detach().clone() if step == 4 else at_half
    grown = (before + at_half).abs() > before.abs().max()
    assert 0 < int(grown.sum()) < len(grown), "else this tests nothing"
    assert torch.equal(update.values[grown], at_half[grown])
    assert (update.values[~grown] != at_half[~grown]).all()
    module(x).square().mean().backward()
    assert not update.values.grad[grown].any() and update.values.grad[~grown].all()
    free = update_of("sara", linear, share=0.2, reselect=False)
    trained(free)
    after_step({"": free}, 4, 8, 4.0)
    assert free.learns.all()


def test_sara_penalizes_the_nuclear_norm_of_the_weights_that_learn() -> None:
    network = nn.ModuleDict({"wide": nn.Linear(80, 72), "narrow": nn.Linear(80, 64), "conv": nn.Conv2d(80, 72, 1)})
    for name, module in list(network.items()):
        network[name] = Adapted(module, update_of("sara", module, share=0.3, penalty=0.25))
    wide: Any = network["wide"]
    trained(wide.update)
    found = sara_penalty(dict(network.items()))  # type: ignore[arg-type]
    assert found is not None
    found.backward()
    masked = torch.zeros(72 * 80)
    places = wide.update.places.long()
    masked[places] = wide.update.weight(wide.base.weight).detach().flatten()[places]
    left, values, right = torch.linalg.svd(masked.reshape(72, 80), full_matrices=False)
    torch.testing.assert_close(found.detach(), 0.25 * values.sum())
    torch.testing.assert_close(wide.update.values.grad, 0.25 * (left @ right).flatten()[places], atol=1e-4, rtol=1e-3)
    assert all(network[name].update.values.grad is None for name in ("narrow", "conv"))
    none = {"": Adapted(nn.Linear(80, 72), update_of("sara", nn.Linear(80, 72), penalty=0.0))}
    assert sara_penalty(none) is None


@pytest.mark.parametrize("kind", ["linear", "conv2d", "depthwise 7 x 7"])
@pytest.mark.parametrize("name", ["lora", "flora", "sara"])
def test_between_forward_and_backward_no_dense_matrix_is_kept_but_the_base(name: str, kind: str) -> None:
    module, x = adapted(name, kind)
    weight = module.base.weight
    kept: list[Tensor] = []
    x = x[:1, :3] if kind == "linear" else x[:1, :, :2, :2]  # small, so that no activation has as many entries
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        module(x.clone().requires_grad_())
    own = {weight.data_ptr(), *(parameter.data_ptr() for parameter in module.update.parameters())}  # type: ignore[operator]
    assert [tensor.shape for tensor in kept if tensor.data_ptr() not in own and tensor.numel() >= weight.numel()] == []  # type: ignore[operator]


def test_bitfit_names_the_biases_of_norms_too_and_full_what_a_module_has_itself() -> None:
    assert update_of("bitfit", nn.LayerNorm(4)) == ("bias",)
    assert update_of("bitfit", nn.MultiheadAttention(4, 2)) == ("in_proj_bias",)
    assert update_of("full", nn.LayerNorm(4)) == ("weight", "bias")
    assert update_of("full", nn.Sequential(nn.Linear(2, 2))) is None


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("lora", {"rank": 0}, "rank 0"),
        ("flora", {"rank_spatial": 0}, "rank 0"),
        ("flora", {"init": "floral"}, r"one of `flora`, `normal002`, `kaiming_uniform`, `orthonormal`"),
        ("lora", {"layout": "tucker"}, "`peft`, `loralib`"),
        ("adapter", {"place": "before"}, "`after`, `parallel`"),
        ("sara", {"share": 1.5}, "share 1.5"),
        ("sara", {"threshold": 0.0}, "threshold 0"),
        ("sara", {"penalty": -1.0}, "penalty` is -1"),
        ("sara", {"penalty": math.nan}, "penalty` of `sara` is `nan`"),
        ("lora", {"alpha": math.inf}, "alpha` of `lora` is `inf`"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(name: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        update_of(name, nn.Linear(4, 4), **settings)


def test_a_module_that_does_something_else_with_its_weight_is_left_alone() -> None:
    from timm.layers import StdConv2d

    odd = [
        StdConv2d(4, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)),
        nn.Embedding(40, 40, max_norm=1.0),
        nn.LayerNorm(40),
        nn.ConvTranspose2d(16, 16, 3),
    ]
    for name in ("lora", "dora", "flora", "sara", "adapter"):
        assert [update_of(name, module) for module in odd] == [None] * len(odd)


# FLoRA: the invariants of the notes, section B.4.1. Identity (1), shapes (3), counts (5), merging (7), the untouched
# base (8), the dense weight (10) and optimizer state (12) are checked with every method above;
# the head (11) is the step's


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d", "depthwise 7 x 7", "conv3d"])
def test_at_the_first_step_only_the_core_of_flora_learns(kind: str) -> None:
    module, x = adapted("flora", kind)
    module(x).square().sum().backward()
    core, modes = module.update.core, module.update.modes
    assert core.abs().max() == 0 and core.grad.abs().sum() > 0  # type: ignore[operator, union-attr]
    assert all(mode.abs().max() > 0 and mode.grad.abs().max() == 0 for mode in modes)  # type: ignore[union-attr]


@pytest.mark.parametrize("init", ["flora", "normal002", "kaiming_uniform", "orthonormal"])
def test_every_axis_of_the_change_has_the_rank_it_was_given(init: str) -> None:
    conv = nn.Conv2d(9, 14, (5, 3)).double()
    update = flora(conv, rank=4, rank_in=2, rank_spatial=3, init=init)
    assert isinstance(update, nn.Module)
    update.double().core.data.normal_()  # type: ignore[union-attr, operator]
    change = update.change(conv.weight, *update.parameters())  # type: ignore[operator]
    assert change.shape == conv.weight.shape
    ranks = [int(torch.linalg.matrix_rank(change.movedim(axis, 0).flatten(1), rtol=1e-9)) for axis in range(4)]
    assert ranks == [4, 2, 3, 3]
    if init == "orthonormal":
        assert all(torch.allclose(mode.T @ mode, torch.eye(mode.shape[1]).double(), atol=1e-5) for mode in update.modes)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("init", "deviations"),
    [("flora", (0.25, 0.25)), ("normal002", (0.02, 0.02)), ("kaiming_uniform", (24**-0.5, 1200**-0.5))],
)
def test_the_factors_of_flora_start_as_large_as_the_authors_do(init: str, deviations: tuple[float, float]) -> None:
    update = flora(nn.Linear(400, 600), rank=8, init=init)  # a uniform on (-b, b) deviates by b / sqrt(3)
    assert isinstance(update, nn.Module)
    for mode, deviation in zip(update.modes, deviations, strict=True):  # type: ignore[arg-type]
        assert float(mode.detach().std()) == pytest.approx(deviation, rel=0.06)


def test_the_tucker_product_is_the_loop_the_einsum_and_three_convolutions_in_a_row() -> None:
    conv = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), bias=False).double()
    update = flora(conv, rank=3, rank_in=2, rank_spatial=2, scale=1.5)
    assert isinstance(update, nn.Module)
    trained(update.double())
    core, (out, in_, height, width) = update.core, update.modes  # type: ignore[misc]
    change = update.change(conv.weight, *update.parameters())  # type: ignore[operator]
    torch.testing.assert_close(
        change, 1.5 * torch.einsum("abcd,oa,ib,xc,yd->oixy", core, out, in_, height, width), rtol=0, atol=1e-10
    )
    at = (4, 1, 2, 0)
    looped = sum(
        core[a, b, c, d] * out[at[0], a] * in_[at[1], b] * height[at[2], c] * width[at[3], d]  # type: ignore[index]
        for a in range(3)
        for b in range(2)
        for c in range(2)
        for d in range(2)
    )
    torch.testing.assert_close(change[at], 1.5 * looped, rtol=0, atol=1e-10)
    x = torch.randn(2, 3, 9, 8).double()
    inner = nn.functional.conv2d(x, in_.T[:, :, None, None])
    window = torch.einsum("abcd,xc,yd->abxy", core, height, width)
    inner = nn.functional.conv2d(inner, window, stride=2, padding=(1, 0), dilation=(1, 2))
    expected = conv(x) + 1.5 * nn.functional.conv2d(inner, out[:, :, None, None])
    torch.testing.assert_close(Adapted(conv, update)(x), expected, rtol=0, atol=1e-10)
    update.modes[0], update.modes[1] = in_, out  # type: ignore[index, operator]
    with pytest.raises(RuntimeError):
        Adapted(conv, update)(x)


def test_flora_on_a_linear_layer_has_no_higher_rank_than_lora() -> None:
    linear = nn.Linear(60, 50).double()
    for method in (flora, lora):
        update = method(linear, rank=5)
        assert isinstance(update, nn.Module)
        trained(update.double())
        up, down = update.factors()  # type: ignore[operator]
        change = up.double() @ down.double()
        torch.testing.assert_close(change, (update.weight(linear.weight) - linear.weight).double(), rtol=0, atol=1e-4)  # type: ignore[operator]
        assert int(torch.linalg.matrix_rank(change, rtol=1e-6)) == 5


def test_flora_trains_a_depthwise_convolution_with_a_tenth_of_the_layout_of_loralib() -> None:
    conv = nn.Conv2d(512, 512, 7, groups=512)
    update = flora(conv)
    assert isinstance(update, nn.Module)
    assert 10 * parameters(update) < 16 * 49 * (512 + 1) and parameters(update) < conv.weight.numel()
    assert parameters(update) == math.prod((16, 1, 2, 2)) + 512 * 16 + 1 + 7 * 2 + 7 * 2


# the factors of a factored module


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "flora"])
def test_a_factored_module_takes_its_update_in_exactly_at_a_higher_rank_and_nearly_at_its_own(name: str) -> None:
    module, x = adapted(name, "factored")
    trained(module.update)
    assert isinstance(module.base, LowRankLinear) and merging.why_not(module.base, module.update) is None
    before = copy.deepcopy(module.base.state_dict())
    whole, error = merging.merged_factors(module.base, module.update)
    assert error == 0 and whole.rank > 6
    torch.testing.assert_close(whole(x), module(x), rtol=1e-5, atol=1e-5)
    kept, error = merging.merged_factors(module.base, module.update, 6)
    assert kept.rank == 6 and kept.training == module.base.training
    dense = module.weight.detach().double()
    values = torch.linalg.svdvals(dense)
    expected = float((values[6:].square().sum() / values.square().sum()).sqrt())
    assert error == pytest.approx(expected, rel=1e-4)
    assert float((kept.weight - dense).norm() / dense.norm()) == pytest.approx(expected, rel=1e-3)
    assert all(torch.equal(module.base.state_dict()[key], tensor) for key, tensor in before.items())


def test_what_cannot_be_taken_into_factors_says_why() -> None:
    from peftc.nn.shared import SharedDown

    base = LowRankLinear(24, 20, 6, bias=False)
    update = update_of("lora", base)
    assert "not those of a linear" in str(merging.why_not(nn.Linear(2, 2), update))
    assert "no factors" in str(merging.why_not(base, update_of("adapter", base)))
    base.down = SharedDown(24, 6, 2)
    assert "share" in str(merging.why_not(base, update))


def test_every_form_is_found() -> None:
    found = {kind: forms.form_of(made(kind)[0]) for kind in KINDS}
    assert {kind for kind, form in found.items() if form == "channel"} == {
        k for k in KINDS if "conv" in k or "7" in k or "depth" in k
    }
    assert all(found[form] == form for form in ("linear", "transposed", "embedding", "factored"))
