"""Which modules may be factored, and why the others stay dense."""

import pytest
import torch
from torch import nn

from peftc.errors import UsageError
from peftc.models.families import matches
from peftc.models.load import load
from peftc.models.model import Model
from peftc.models.targets import every_weight, find_targets
from peftc.nn import forms
from peftc.store.source import Source


def wrapped(module: nn.Module) -> Model:
    return Model(module.eval(), Source("here"), "python", {}, {"library": "python", "architecture": "x:y"}, "here")


def split(module: nn.Module, **options: object) -> tuple[set[str], dict[str, str]]:
    found, reasons = find_targets(wrapped(module), conv_method="channel", **options)  # type: ignore[arg-type]
    return set(found), reasons


class Net(nn.Module):
    """One child of each kind that has an answer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.conv = nn.Conv2d(16, 16, 3)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2)
        self.signal = nn.Conv1d(16, 16, 3)
        self.volume = nn.Conv3d(16, 16, 3)
        self.words = nn.Embedding(50, 16)
        self.renormed = nn.Embedding(50, 16, max_norm=1.0)
        self.attention = nn.MultiheadAttention(16, 2)
        self.normal = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.narrow = nn.Linear(16, 9)
        self.body = nn.ModuleDict({"fc": nn.Linear(16, 16), "head": nn.Linear(16, 16), "multihead": nn.Linear(16, 16)})
        self.last = nn.Linear(16, 16)


def test_each_kind_has_its_answer() -> None:
    found, reasons = split(Net())
    assert found == {"conv", "body.fc", "body.multihead"}
    expected = {
        "stem": "stem", "grouped": "grouped", "signal": "Conv1d", "volume": "Conv3d", "words": "embedding",
        "renormed": "max_norm", "attention.out_proj": "MultiheadAttention", "normal": "parametrization",
        "narrow": "fewer than 10", "body.head": "output head", "last": "output head",
    }  # fmt: skip
    for name, words in expected.items():
        assert words in reasons[name], name
    assert reasons.keys() == expected.keys()


def test_include_adds_and_skip_beats_it() -> None:
    found, reasons = split(Net(), include=["stem", "words", "last", "narrow"], skip=["last", "body"])
    assert found == {"conv", "stem", "words", "narrow"}
    assert reasons["last"] == reasons["body.fc"] == "skipped as asked"


@pytest.mark.parametrize("name", ["grouped", "signal", "renormed", "attention.out_proj", "normal"])
def test_what_cannot_be_factored_cannot_be_included(name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot factor `{name}`"):
        split(Net(), include=[name])


@pytest.mark.parametrize("options", [{"include": ["fc1"]}, {"skip": ["fc1"]}, {"skip": ["od"]}])
def test_a_pattern_that_matches_nothing_is_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError, match="matches no module"):
        split(Net(), **options)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("blocks.0.attn.qkv", "qkv", True),
        ("blocks.0.attn.qkv", "attn.qkv", True),
        ("blocks.0.attn.qkv", "blocks.0", True),
        ("blocks.10.attn.qkv", "blocks.1", False),
        ("blocks.0.attn.qkv", "*.qkv", True),
        ("blocks.0.attn.qkv", "blocks.*.attn", True),
        ("blocks.0.attn.qkv", "attn", True),
        ("blocks.0.attn.qkv", "att", False),
        ("multihead_attn.fc", "head", False),
        ("blocks.0.attn.qkv", "*", True),
        ("blocks.0.attn.qkv", "", False),
    ],
)
def test_patterns_match_whole_parts(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_a_subclass_that_uses_its_weight_differently_stays_dense() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    found, reasons = split(nn.Sequential(nn.Linear(16, 16), Scaled(16, 16), nn.Linear(16, 16)))
    assert found == {"0"} and "Scaled" in reasons["1"]


class Written(nn.Linear):
    """As Falcon's: a product of its own, which is that of `Linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Rounded(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


class Noisy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-10, 10))


class Beside(Written):
    """What it computes is its product, as long as what is beside it is 0."""

    def __init__(self, reads: int, gives: int) -> None:
        super().__init__(reads, gives)
        self.more = nn.Parameter(torch.zeros(gives))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_that_does_what_linear_does_is_eligible(bias: bool, device: str) -> None:
    written = Written(16, 12, bias=bias, device=device)
    before = dict(vars(written))
    assert forms.acts_as_linear(written) and forms.form_of(written) == "linear"
    assert vars(written) == before
    found, _ = split(nn.Sequential(nn.Linear(16, 16), Written(16, 16, bias=bias), nn.Linear(16, 16)))
    assert found == {"0", "1"}


@pytest.mark.parametrize("kind", [Rounded, Noisy, Clipped, Beside])
def test_a_subclass_that_does_more_than_linear_does_stays_dense(kind: type[nn.Linear]) -> None:
    found, reasons = split(nn.Sequential(nn.Linear(16, 16), kind(16, 16), nn.Linear(16, 16)))
    assert found == {"0"} and kind.__name__ in reasons["1"]


def test_quantized_and_lazy_weights_stay_dense() -> None:
    quantized = nn.Linear(16, 16)
    quantized.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    found, reasons = split(nn.Sequential(nn.Linear(16, 16), quantized, nn.LazyLinear(16), nn.Linear(16, 16)))
    assert found == {"0"} and "int8" in reasons["1"] and reasons["2"]


def test_shared_and_tied_weights_are_one_target() -> None:
    shared = nn.Linear(16, 16)
    tied = nn.Linear(16, 16)
    tied.weight = shared.weight
    network = nn.Sequential(shared, shared, tied, nn.Linear(16, 16))
    found, reasons = find_targets(wrapped(network), conv_method="channel")
    assert list(found) == ["0"] and found["0"].aliases == ("2",)
    assert set(reasons) == {"3"}
    assert list(every_weight(wrapped(network))) == ["0", "3"]


def test_a_skipped_or_impossible_alias_keeps_the_pair_dense() -> None:
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    b.weight = a.weight
    found, reasons = split(nn.Sequential(a, b, nn.Linear(16, 16), nn.Linear(16, 16)), skip=["1"])
    assert found == {"2"} and "0" in reasons
    e = nn.Embedding(16, 16, max_norm=1.0)
    e.weight = a.weight
    found, _ = split(nn.Sequential(a, e, nn.Linear(16, 16), nn.Linear(16, 16)))
    assert found == {"2"}


def test_a_weight_that_is_also_a_parameter_of_its_own_stays_dense() -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    network.register_parameter("again", network[0].weight)  # type: ignore[arg-type]
    found, reasons = split(network)
    assert found == {"1"} and "again" in reasons["0"]


def test_the_heads_of_both_libraries_stay_dense(tiny_vit, tiny_bert, tiny_llama, tiny_resnet) -> None:
    expected = {
        tiny_vit: {"patch_embed.proj", "head"},
        tiny_resnet: {"conv1", "fc"},
        tiny_bert: {"pooler.dense"},
        tiny_llama: {"lm_head", "model.embed_tokens"},
    }
    for folder, dense in expected.items():
        _, reasons = find_targets(load(folder, weights=False), conv_method="channel")
        assert {name for name, why in reasons.items() if why != "embedding"} | (dense & reasons.keys()) == dense
