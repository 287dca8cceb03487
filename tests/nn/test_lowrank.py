"""At full rank a low-rank module computes what the dense one did, whatever its stride, padding, form or company."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.methods.decompose.svd import svd
from peftc.nn import lowrank, surgery
from peftc.nn.lowrank import FORMS, build, dense_weight, matrix
from peftc.plans.allocate import entries, max_rank

CONV_FORMS = ["channel", "spatial", "tucker2"]
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without bias": {"bias": False},
    "padded": {"padding": 1},
    "padded unevenly": {"padding": (2, 1), "kernel_size": (5, 3)},
    "strided": {"stride": 2, "padding": 1},
    "strided unevenly": {"stride": (1, 3), "padding": (0, 2)},
    "dilated": {"dilation": (2, 1), "padding": (2, 1)},
    "not square": {"kernel_size": (1, 5), "padding": (0, 2)},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (4, 2), "dilation": (1, 2)},
    "valid": {"padding": "valid", "stride": 2},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "kernel_size": (3, 5)},
    "replicated, same": {"padding": "same", "padding_mode": "replicate"},
    "one by one": {"kernel_size": 1, "stride": 2},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tucker2(weight: Tensor, ranks: tuple[int, int]) -> dict[str, Tensor]:
    """Return the parts that earlier versions wrote, of random bases of both channel modes; exact at full ranks."""
    left, right = (torch.linalg.qr(torch.randn(weight.shape[at], weight.shape[at]))[0][:, : ranks[at]] for at in (0, 1))
    core = torch.einsum("oihw,oa,ib->abhw", weight, left, right).contiguous()
    return {"up.weight": left[:, :, None, None], "core.weight": core, "down.weight": right.T[:, :, None, None]}


def factored(module: nn.Module, form: str, rank: Any = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the low-rank module that stands in for ``module``, filled, at full rank unless said."""
    weight = module.weight.detach()  # type: ignore[union-attr, operator]
    if form == "tucker2":
        rank = rank or tuple(weight.shape[:2])
        named = tucker2(weight, rank)
    else:
        rank = rank or max_rank(tuple(weight.shape), form)
        factors = svd(matrix(weight, form).contiguous()).truncate(rank).factors
        named = lowrank.tensors(factors, tuple(weight.shape), form)
    new = build(module, form, rank)
    surgery.place(new, {name: nn.Parameter(tensor) for name, tensor in named.items()})
    surgery.place(new, {"up.bias": getattr(module, "bias", None)})
    return new, named


def agree(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("form", CONV_FORMS)
@pytest.mark.parametrize("arguments", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_factored_convolution_computes_the_same(form: str, arguments: dict[str, Any]) -> None:
    conv = nn.Conv2d(6, 8, **{"kernel_size": 3, **arguments})
    x = torch.randn(2, 6, 11, 12)
    agree(factored(conv, form)[0](x), conv(x))


@pytest.mark.parametrize("form", CONV_FORMS)
@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": (3, 2), "dilation": (1, 2)}, {"bias": False}])
@pytest.mark.parametrize("size", [(11, 12), (7, 7)])
def test_timms_own_padding_rule_is_kept(form: str, arguments: dict[str, Any], size: tuple[int, int]) -> None:
    from timm.layers import Conv2dSame

    conv = Conv2dSame(6, 8, (3, 5), **arguments)
    x = torch.randn(2, 6, *size)
    agree(factored(conv, form)[0](x), conv(x))


def test_a_subclass_with_its_own_constructor_is_rebuilt_as_a_plain_convolution() -> None:
    class Padded(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(6, 8, 3, padding=1)

    conv, x = Padded(), torch.randn(1, 6, 5, 5)
    agree(factored(conv, "channel")[0](x), conv(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 9), (9, 1)])
def test_a_factored_linear_computes_the_same(bias: bool, shape: tuple[int, int]) -> None:
    linear = nn.Linear(*shape, bias=bias)
    new, _ = factored(linear, "linear")
    x = torch.randn(2, 3, shape[0])
    agree(new(x), linear(x))
    agree(new.weight, linear.weight)
    assert (new.bias is None) == (not bias)


def test_the_original_bias_goes_to_the_last_module_unchanged() -> None:
    linear = nn.Linear(20, 30)
    new, _ = factored(linear, "linear", 5)
    assert new.up.bias is linear.bias
    assert new.down.bias is None


def test_transformers_transposed_linear_computes_the_same() -> None:
    from transformers.pytorch_utils import Conv1D

    dense = Conv1D(30, 20)
    nn.init.normal_(dense.bias)
    new, _ = factored(dense, "transposed")
    x = torch.randn(2, 3, 20)
    agree(new(x), dense(x))


@pytest.mark.parametrize("padding", [None, 3])
def test_a_factored_embedding_looks_up_the_same(padding: int | None) -> None:
    embedding = nn.Embedding(50, 16, padding_idx=padding)
    new, _ = factored(embedding, "embedding")
    ids = torch.arange(50).reshape(5, 10)
    agree(new(ids), embedding(ids))
    agree(new.weight, embedding.weight)
    if padding is not None:
        assert new.padding_idx == padding
        assert not new(torch.tensor([padding])).any(), "the padding row stays exactly zero"


def test_the_padding_row_of_a_factored_embedding_does_not_train() -> None:
    new, _ = factored(nn.Embedding(50, 16, padding_idx=3), "embedding", 4)
    new(torch.tensor([3, 5])).sum().backward()
    assert not new.up.weight.grad[3].any()
    assert new.up.weight.grad[5].any()


def test_a_tied_head_shares_both_factors_and_computes_the_same() -> None:
    embedding, head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    head.weight = embedding.weight
    looked_up, named = factored(embedding, "embedding")
    out = build(head, "linear", 16)
    surgery.place(out, dict(looked_up.named_parameters()))
    assert out.up.weight is looked_up.up.weight
    assert out.down.weight is looked_up.down.weight
    x = torch.randn(3, 16)
    agree(out(x), head(x))
    assert sum(tensor.numel() for tensor in named.values()) == 16 * (50 + 16)


@pytest.mark.parametrize("form", FORMS)
def test_built_modules_have_exactly_the_tensors_of_the_factors_on_meta(form: str) -> None:
    from transformers.pytorch_utils import Conv1D

    dense: dict[str, nn.Module] = {
        "linear": nn.Linear(20, 30), "transposed": Conv1D(30, 20), "embedding": nn.Embedding(30, 20),
    }  # fmt: skip
    module = dense.get(form) or nn.Conv2d(12, 16, (3, 5))
    rank: Any = (4, 3) if form == "tucker2" else 4
    empty = build(module, form, rank)
    assert all(parameter.is_meta for parameter in empty.parameters())
    _, named = factored(module, form, rank)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters() if "bias" not in name}
    assert shapes == {name: tensor.shape for name, tensor in named.items()}
    if form != "tucker2":
        assert sum(tensor.numel() for tensor in named.values()) == entries(tuple(module.weight.shape), form, rank)


@pytest.mark.parametrize("form", FORMS)
def test_the_factors_multiply_back_to_the_weight(form: str) -> None:
    weight = torch.randn(8, 6, 3, 5) if form in CONV_FORMS else torch.randn(8, 6)
    shape = tuple(weight.shape)
    if form == "tucker2":
        named = tucker2(weight, (8, 6))
    else:
        factors = svd(matrix(weight, form).contiguous()).truncate(max_rank(shape, form)).factors
        named = lowrank.tensors(factors, shape, form)
        assert all(tensor.is_contiguous() for tensor in named.values())
    agree(dense_weight(named, shape, form), weight)


@pytest.mark.parametrize("form", CONV_FORMS)
def test_a_factored_convolution_tells_what_the_one_in_its_place_was(form: str) -> None:
    conv = nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2))
    new = factored(conv, form)[0]
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(new, name) == getattr(conv, name)
    agree(new.weight, conv.weight)
    assert torch.equal(new.bias, conv.bias)


def test_training_mode_is_inherited() -> None:
    assert not build(nn.Linear(4, 4).eval(), "linear", 1).training
    assert build(nn.Linear(4, 4).train(), "linear", 1).training
