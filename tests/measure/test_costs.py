"""Counting is exact, measuring leaves no trace, and no speed-up is claimed that the noise could have made."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from peftc.measure import costs
from peftc.models.inputs import outputs, probe
from peftc.models.load import load
from peftc.nn import lowrank, surgery
from peftc.nn.surgery import parameters, tensor_bytes

CPU = torch.device("cpu")
DEIT = "deit_base_patch16_224"


class Tied(nn.Module):
    """An embedding whose table is also the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


class Attention(nn.Module):
    """One of torch's own transformer layers, which run fused where no one looks."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(x).expand(1, 10, -1))


class Twice(nn.Module):
    """One convolution called twice, then a depthwise one, and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.depthwise = nn.Conv2d(3, 3, 3, stride=2, padding=1, groups=3)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.depthwise(self.conv(self.conv(x)))


def factored(network: nn.Module, ratio: float) -> nn.Module:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            out, in_ = module.weight.shape
            surgery.replace(network, module, lowrank.build(module, "linear", int(ratio * out * in_ / (out + in_))))
    return network


def test_tied_weights_are_counted_once() -> None:
    module = Tied()
    assert parameters(module) == 30 * 8
    assert tensor_bytes(module) == 4 * (30 * 8 + 4)


def test_deit_base_has_the_published_multiply_adds() -> None:
    model = load(timm.create_model(DEIT).to("meta"))
    counted = costs.work(model)
    assert round(counted.macs / 1e9, 2) == 17.56
    assert counted.by_module["blocks.0.attn.qkv"] == 197 * 768 * 2304
    assert counted.by_module["blocks.0.mlp"] == 2 * 197 * 768 * 3072


def test_deit_base_at_half_the_weights_has_the_multiply_adds_of_pela() -> None:
    model = load(factored(timm.create_model(DEIT).to("meta"), 0.5))
    assert round(costs.work(model).macs / 1e9, 2) == 9.19


def test_real_tensors_and_meta_tensors_cost_the_same(tiny_vit: object) -> None:
    real, meta = load(tiny_vit), load(tiny_vit, weights=False)
    assert costs.work(real) == costs.work(meta)


def test_attention_is_counted_where_torch_would_fuse_it_away() -> None:
    width, hidden, tokens = 16, 32, 10
    model = load(Attention(width, hidden))
    products = tokens * (4 * width * width + 2 * width * hidden) + width * width
    scores = 2 * tokens * tokens * width
    assert costs.work(model).macs == products + scores
    assert torch.backends.mha.get_fastpath_enabled()


def test_look_ups_cost_nothing_but_are_positions() -> None:
    model = load(Tied())
    counted = costs.work(model, torch.zeros(1, 7, dtype=torch.long))
    assert counted.macs == 7 * 8 * 30
    assert counted.positions == {"table": 7, "head": 7}


def test_positions_add_up_over_calls_and_name_what_is_never_called() -> None:
    model = load(Twice())
    counted = costs.work(model, torch.zeros(1, 3, 8, 8))
    assert counted.positions == {"conv": 2 * 64, "depthwise": 16, "unused": 0}
    assert counted.macs == 2 * 64 * 81 + 16 * 27
    for name in ("conv", "depthwise"):
        weight = model.module.get_submodule(name).weight
        assert counted.by_module[name] == counted.positions[name] * weight.numel()


def test_counting_leaves_no_hook_behind() -> None:
    model = load(Twice())
    costs.work(model, torch.zeros(1, 3, 8, 8))
    assert not any(module._forward_hooks for module in model.module.modules())


def test_counting_leaves_no_hook_behind_where_the_forward_fails() -> None:
    model = load(Twice())
    with pytest.raises(RuntimeError):
        costs.work(model, torch.zeros(1, 5, 8, 8))
    assert not any(module._forward_hooks for module in model.module.modules())


def test_a_grouped_query_model_is_counted(tiny_llama: object) -> None:
    model = load(tiny_llama)
    counted = costs.work(model, probe(model, max_length=8))
    linears = sum(macs for name, macs in counted.by_module.items() if name.endswith(("_proj", "lm_head")))
    attention = 2 * 2 * 8 * 8 * 32  # layers, scores and values, tokens x tokens, width
    assert linears + attention <= counted.macs <= 1.01 * (linears + attention)


WARM = 3  # calls, of equal length, until two in a row bring no new best time


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A made-up clock, in seconds."""
    seconds = [0.0]
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return seconds


def steady(label: str, log: list[str], now: list[float], seconds: float) -> Callable[[], None]:
    def call() -> None:
        log.append(label)
        now[0] += seconds

    return call


def test_every_candidate_follows_every_other_one_equally_often(now: list[float]) -> None:
    log: list[str] = []  # of long calls: one per round, no primer
    times = costs.latency({label: steady(label, log, now, 0.25) for label in "abc"}, rounds=12, device=CPU)
    del log[: 3 * WARM]
    assert {label: len(times[label]) for label in "abc"} == dict.fromkeys("abc", 12)
    rounds = [log[start : start + 3] for start in range(0, len(log), 3)]
    follows = Counter(pair for order in rounds for pair in pairwise(order))
    assert len(set(follows.values())) == 1 and len(follows) == 6


def test_short_calls_are_repeated_to_a_block(now: list[float]) -> None:
    log: list[str] = []
    costs.latency({"a": steady("a", log, now, 1 / 512)}, rounds=1, device=CPU)
    assert len(log) == WARM + 1 + 6  # an untimed call, then 6 x 2 ms


def test_median_and_p90_are_over_rounds() -> None:
    times = [float(second) for second in range(1, 12)]
    assert costs.quantile(times, 0.5) == 6 and costs.quantile(times, 0.9) == 10


def clock_of(now: list[float], seconds: Callable[[int], float]) -> Callable[[int], costs.Call]:
    """Make a batch of n take ``seconds(n)`` of a made-up clock."""

    def forward(batch: int) -> costs.Call:
        def call() -> None:
            now[0] += seconds(batch)

        return call

    return forward


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda batch: 0.01 * batch, 1),  # nothing gained by a second sample
        (lambda batch: 0.01 * max(batch, 8), 8),  # free up to 8
        (lambda batch: 0.001, 256),  # free for ever: the cap
        (lambda batch: 0.7 * batch**0.5, 4),  # 1.4 s at 4: twice that would last too long
    ],
)
def test_the_batch_doubles_while_it_pays(now: list[float], seconds: Callable[[int], float], expected: int) -> None:
    assert costs.saturating_batch(clock_of(now, seconds), CPU) == expected


def test_the_batch_stops_where_memory_ends(now: list[float]) -> None:
    forward = clock_of(now, lambda batch: 0.001)

    def limited(batch: int) -> costs.Call:
        if batch > 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(batch)

    assert costs.saturating_batch(limited, CPU) == 16


def test_another_failure_is_not_taken_for_the_end_of_memory() -> None:
    def broken(batch: int) -> costs.Call:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        costs.saturating_batch(broken, CPU)


def series(order: random.Random, rounds: int, noise: float, seconds: float = 0.02) -> list[float]:
    return [seconds * (1 + abs(order.gauss(0, noise))) for _ in range(rounds)]


@pytest.mark.parametrize("factor", [1.43, 0.83])
def test_a_real_change_on_a_quiet_machine_is_claimed(factor: float) -> None:
    order = random.Random(0)
    baseline, control, candidate = (series(order, 30, 0.01, second) for second in (0.02, 0.02, 0.02 / factor))
    change = costs.speedup(baseline, control, candidate)
    assert change.verdict == {1.43: "1.43x faster", 0.83: "1.20x slower"}[factor]
    assert change.low <= change.value <= change.high
    assert change.counted == change.value


def test_a_change_inside_the_noise_is_none() -> None:
    order = random.Random(0)
    baseline, control, candidate = (series(order, 30, 0.5, second) for second in (0.02, 0.02, 0.0195))
    change = costs.speedup(baseline, control, candidate)
    assert change.verdict == "no measurable change" and change.counted == 1


def test_the_same_module_is_seldom_called_faster_or_slower() -> None:
    order = random.Random(0)
    verdicts = Counter(
        costs.speedup(*(series(order, 10, 0.1) for _ in range(3))).verdict == "no measurable change" for _ in range(100)
    )
    assert verdicts[True] >= 95


def test_a_change_under_one_percent_is_never_claimed() -> None:
    baseline = [0.02] * 30
    assert costs.speedup(baseline, baseline, [0.0199] * 30).verdict == "no measurable change"


def test_a_control_that_is_off_widens_the_band_by_its_offset() -> None:
    baseline = [0.02] * 30
    low, high = costs.noise_band(baseline, [0.02 / 1.1] * 30)
    assert high == pytest.approx(1.21) and low == pytest.approx(1 / 1.21)
    assert costs.speedup(baseline, [0.02 / 1.1] * 30, [0.02 / 1.15] * 30).verdict == "no measurable change"


def test_drift_that_all_share_is_no_change() -> None:
    order = random.Random(0)
    drift = [1 + 0.1 * index for index in range(30)]
    baseline, control, candidate = (
        [slow * second for slow, second in zip(drift, series(order, 30, 0.01, seconds), strict=True)]
        for seconds in (0.02, 0.02, 0.01)
    )
    assert costs.speedup(baseline, control, candidate).verdict.startswith("2.0")


def test_working_memory_grows_with_what_a_call_holds() -> None:
    def hold(megabytes: int) -> costs.Call:
        return lambda: torch.ones(megabytes, 250_000).sum()

    small, large = (costs.working_memory(hold(megabytes), CPU) for megabytes in (20, 80))
    if small is None or large is None:
        pytest.skip("this system does not tell peak memory")
    assert 18e6 < small < 40e6 and 78e6 < large < 100e6


@pytest.mark.gpu
def test_cuda_reports_its_own_peak() -> None:
    device = torch.device("cuda")
    working = costs.working_memory(lambda: torch.ones(80, 250_000, device=device), device)
    assert working is not None and 80e6 <= working < 90e6


def test_outputs_are_what_they_were_after_measuring(tiny_vit: object) -> None:
    model = load(tiny_vit)
    sample = probe(model)
    before = outputs(model, sample)
    costs.work(model, sample)
    assert torch.equal(before, outputs(model, sample))
