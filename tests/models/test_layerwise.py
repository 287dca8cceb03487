"""Layers that run otherwise for a while: the same gradients to the bit, and nothing of it is left afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.errors import PeftcError, UsageError
from peftc.models import inputs, layers
from peftc.models.layerwise import layerwise
from peftc.models.load import load
from peftc.models.model import Model
from peftc.models.place import runnable

NETWORKS = ["tiny_vit", "tiny_resnet", "tiny_bert", "tiny_llama"]


def step(model: Model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return gradients and buffers after a forward and a backward pass."""
    model.module.zero_grad()
    torch.manual_seed(0)
    inputs.forward(model, inputs.probe(model, batch=2)).float().square().mean().backward()
    gradients = {name: each.grad.clone() for name, each in model.module.named_parameters() if each.grad is not None}
    return gradients, {name: each.clone() for name, each in model.module.named_buffers()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_computing_layers_again_gives_the_same_gradients_and_statistics(
    network: str, training: bool, request: Any
) -> None:
    found = []
    for recomputed in (False, True):
        model = runnable(load(request.getfixturevalue(network)))
        model.module.requires_grad_(True)
        with layerwise(model, recomputed=recomputed):
            model.module.train(training)
            found.append(step(model))
    assert equal(found[0][0], found[1][0])
    assert equal(found[0][1], found[1][1])


def test_layers_do_run_a_second_time(tiny_vit: Path) -> None:
    model = runnable(load(tiny_vit))
    model.module.requires_grad_(True)
    first = model.module.get_submodule(layers.layers(model)[0])
    inside = next(each for each in first.modules() if isinstance(each, nn.Linear))
    runs: list[int] = []
    with layerwise(model, recomputed=True):
        inside.register_forward_hook(lambda *_: runs.append(1))
        step(model)
    assert len(runs) == 2
    step(model)
    assert len(runs) == 3
    assert all("forward" not in vars(each) for each in model.module.modules())


def test_a_network_without_layers_is_refused() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(UsageError, match="gradient-checkpointing"), layerwise(load(module), recomputed=True):
        pass


def test_the_cache_of_a_language_model_is_back_afterwards(tiny_llama: Path) -> None:
    model = runnable(load(tiny_llama))
    before = model.module.config.use_cache
    with layerwise(model, recomputed=True):
        assert model.module.config.use_cache is False
    assert model.module.config.use_cache is before


@pytest.mark.filterwarnings("default")  # the compiler looks at what torch warns of
@pytest.mark.parametrize("network", ["tiny_vit", "tiny_llama"])
def test_compiled_layers_give_what_layers_give(network: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda run, **how: real(run, backend="aot_eager", **how)
    )  # no compiler of C++ is asked
    model = runnable(load(request.getfixturevalue(network)))
    model.module.requires_grad_(True)
    expected, _ = step(model)
    with layerwise(model, compiled=True, recomputed=network == "tiny_llama"):
        found, _ = step(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compiled_is_said(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda run, **how: real(run, backend=broken, **how))
    model = runnable(load(tiny_vit))
    with pytest.raises(PeftcError, match="cannot be compiled here") as found, layerwise(model, compiled=True):
        inputs.outputs(model, inputs.probe(model))
    assert "--compile" in str(found.value.hint)
