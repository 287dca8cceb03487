"""A network that runs from a layer in the middle on gives what a whole pass gives, or is seen not to."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc.models import inputs, layers
from peftc.models.load import load
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.models.resumed import Passes


def recorded(model: Model, folder: Path, batch: Any) -> tuple[Passes, Tensor, Any]:
    passes, run = Passes(model, layers.layers(model), folder / "passes"), partial(inputs.outputs, model, batch)
    return passes, passes.record(0, run), run


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_llama", "tiny_bert_mlm", "tiny_resnet"])
def test_from_any_layer_on_the_outputs_are_the_same(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = runnable(load(request.getfixturevalue(name)), device="cpu")
    passes, whole, run = recorded(model, tmp_path, inputs.probe(model, batch=2))
    assert len(passes.names) > 1
    for start in range(1, len(passes.names)):
        passes.check(start, 0, run, whole)
        assert passes.trusted[start]
        torch.testing.assert_close(passes.resume(start, 0, run), whole)
    assert all("forward" not in module.__dict__ for module in model.module.modules())


def test_layers_before_the_start_do_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    passes, _, run = recorded(model, tmp_path, inputs.probe(model))
    passes.trusted[1] = True
    ran: list[str] = []
    for name in passes.names:
        projection = f"{name}.self_attn.q_proj"
        model.module.get_submodule(projection).register_forward_hook(lambda *_, name=name: ran.append(name))
    passes.resume(1, 0, run)
    assert ran == list(passes.names[1:])


def test_what_changes_later_on_is_seen(tiny_llama: Path, tmp_path: Path) -> None:
    model = runnable(load(tiny_llama), device="cpu")
    passes, whole, run = recorded(model, tmp_path, inputs.probe(model))
    passes.check(1, 0, run, whole)
    down: Any = model.module.get_submodule(f"{passes.names[1]}.mlp.down_proj")
    down.weight.data = 2 * down.weight.data
    torch.testing.assert_close(passes.resume(1, 0, run), run())
    assert not torch.allclose(run(), whole)


class Bridged(nn.Module):
    """Three blocks in a row; the last step looks back to what the first gave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
        return x + first


def test_a_network_that_looks_back_runs_whole(tmp_path: Path) -> None:
    model = load(Bridged())
    run = partial(inputs.outputs, model, torch.randn(2, 8))
    passes = Passes(model, ["blocks.0", "blocks.1", "blocks.2"], tmp_path / "passes")
    whole = passes.record(0, run)
    for start in (1, 2):
        passes.check(start, 0, run, whole)
    assert passes.trusted == {1: True, 2: False}  # from the second block on, what the first gave is known
    torch.testing.assert_close(passes.resume(2, 0, run), whole)


def test_a_full_disk_costs_time_only(tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runnable(load(tiny_vit), device="cpu")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    passes, whole, run = recorded(model, tmp_path, inputs.probe(model))
    passes.check(2, 0, run, whole)
    assert not (tmp_path / "passes").exists() and not passes.trusted
    torch.testing.assert_close(passes.resume(2, 0, run), whole)


def test_a_layer_is_found_by_what_it_holds(tmp_path: Path) -> None:
    passes = Passes(load(Bridged()), ["blocks.0", "blocks.1", "blocks.10"], tmp_path)
    assert [passes.layer_of(name) for name in ("blocks.1.0", "blocks.10.0", "blocks.1", "head")] == [1, 2, 1, 0]
