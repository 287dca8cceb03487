"""A LoRA, rsLoRA or DoRA made here computes and learns the same in Hugging Face peft, and the reverse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc.errors import OutputError, SourceError
from peftc.methods.registry import find
from peftc.models.interchange import Adapter, from_peft, to_peft, why_not
from peftc.nn.adapted import Adapted, adapted_modules
from peftc.nn.forms import form_of

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ("words", "body.conv", "body.point", "body.hidden", "old")
METHODS = ("lora", "rslora", "dora")


class Network(nn.Module):
    """One module of each form, and a head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.words = nn.Embedding(40, 16, padding_idx=0)
        self.body = nn.ModuleDict(
            {
                "conv": nn.Conv2d(4, 12, (3, 2), stride=(2, 1), padding=1),
                "point": nn.Conv2d(12, 16, 1, bias=False),
                "hidden": nn.Linear(16, 20),
            }
        )
        self.old = Conv1D(16, 20)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        seen = self.body["point"](self.body["conv"](image).relu()).mean((2, 3))
        hidden = self.body["hidden"](self.words(ids).mean(1) + seen)
        return self.head(self.old(hidden.tanh()))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 40, (3, 5), generator=generator), torch.randn(3, 4, 7, 6, generator=generator)


def settings(method: str, name: str) -> Adapter:
    rank, alpha = (3, 12.0) if name == "body.hidden" else (2, 5.5 if method == "lora" else 6.0)
    return Adapter(method, rank, alpha)


def adapted(method: str) -> tuple[nn.Module, dict[str, Adapter]]:
    network, adapters = Network().requires_grad_(False), {}
    for name in TARGETS:
        module = network.get_submodule(name)
        asked = settings(method, name)
        update = find("adapter", method, "--method")(module, rank=asked.rank, alpha=asked.alpha)
        for parameter in update.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        owner, _, last = name.rpartition(".")
        network.get_submodule(owner)._modules[last] = Adapted(module, update)
        window = tuple(getattr(module, "kernel_size", ()))
        adapters[name] = Adapter(method, asked.rank, asked.alpha, 0.0, str(form_of(module)), window)
    network.head.requires_grad_(True).weight.data.mul_(1.5)
    return network, adapters


def learned(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_made_here_computes_and_learns_the_same_in_peft(method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    ours, adapters = adapted(method)
    config, tensors = to_peft(adapters, learned(ours))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(Network(), tmp_path, is_trainable=True)
    one, other = ours(*batch()), theirs(*batch())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one, Network()(*batch()), atol=1e-2)
    for y in (one, other):
        y.square().sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    _, expected = to_peft(adapters, gradients)
    found = {
        name.replace(".modules_to_save.default", "").replace(".default", "").replace("vector.weight", "vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert found[name].abs().sum() > 0
        torch.testing.assert_close(found[name].flatten(), gradient.flatten(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_made_computes_the_same_here(method: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    patterns: dict[str, Any] = {"rank_pattern": {"hidden": 3}, "alpha_pattern": {r"body\.hidden": 12}}
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["words", "conv", "point", "hidden", "old"], modules_to_save=["head"],
        use_dora=method == "dora", use_rslora=method == "rslora", **patterns,
    )  # fmt: skip
    theirs = get_peft_model(Network(), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    adapters, tensors = from_peft(written, load_file(tmp_path / "adapter_model.safetensors"))
    assert {name: (each.method, each.rank, each.alpha) for name, each in adapters.items()} == {
        name: (method, 3, 12.0) if "hidden" in name else (method, 2, 6.0) for name in TARGETS
    }
    ours = Network()
    for name, each in adapters.items():
        module = ours.get_submodule(name)
        owner, _, last = name.rpartition(".")
        update = find("adapter", method, "--method")(module, rank=each.rank, alpha=each.alpha)
        ours.get_submodule(owner)._modules[last] = Adapted(module, update)
    assert set(adapted_modules(ours)) == set(TARGETS)
    unexpected = ours.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unexpected and sum(".update." in name for name in tensors) == len(
        [name for name in ours.state_dict() if ".update." in name]
    )
    torch.testing.assert_close(ours(*batch()), theirs(*batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_there_and_back_is_the_same(method: str) -> None:
    network, adapters = adapted(method)
    config, tensors = to_peft(adapters, learned(network), "org/model")
    assert config["base_model_name_or_path"] == "org/model" and json.loads(json.dumps(config)) == config
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    again, back = from_peft(config, tensors)
    assert {name: (each.rank, each.alpha, each.window) for name, each in again.items()} == {
        name: (each.rank, each.alpha, each.window) for name, each in adapters.items()
    }
    assert set(back) == set(learned(network))
    assert all(torch.equal(back[name], tensor) for name, tensor in learned(network).items())


def test_what_peft_would_compute_otherwise_is_said() -> None:
    from peftc.nn.lowrank import LowRankLinear

    reasons = {
        "reads all groups": nn.Conv2d(4, 4, 3, groups=2),
        "no dilation": nn.Conv2d(4, 4, 3, dilation=2),
        "pads with zeros": nn.Conv2d(4, 4, 3, padding_mode="reflect"),
        "no factored module": LowRankLinear(4, 4, 2, bias=True),
    }
    for reason, module in reasons.items():
        assert reason in str(why_not(module))
    assert [why_not(module) for module in (nn.Conv2d(4, 4, 3), nn.Linear(2, 2), nn.Embedding(2, 2))] == [None] * 3


def test_what_the_format_has_no_place_for_is_refused() -> None:
    network, adapters = adapted("lora")
    tensors = learned(network)
    with pytest.raises(OutputError, match="no place for adapters of `snella`"):
        to_peft({"old": Adapter("snella", 2, 1.0)}, {})
    with pytest.raises(OutputError, match="`dora`, `lora`"):
        to_peft({**adapters, "old": Adapter("dora", 2, 1.0)}, tensors)
    with pytest.raises(OutputError, match="`cls_token`"):
        to_peft(adapters, {**tensors, "cls_token": torch.zeros(1)})
    with pytest.raises(OutputError, match=r"`old.update.core`"):
        to_peft(adapters, {**tensors, "old.update.core": torch.zeros(1)})
    with pytest.raises(OutputError, match="no such layout"):
        to_peft({"conv": Adapter("lora", 1, 1.0, 0.0, "channel", (3, 3))}, {"conv.update.down": torch.zeros(3, 12)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "pissa, changed the base"),
        ({"use_dora": True, "use_rslora": True}, "DoRA scaled as rsLoRA"),
        ({"use_dora": True}, "lacks `body.conv.magnitude`|lacks `words.magnitude`"),
        ({"lora_bias": True}, "`lora_bias`"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(change: dict[str, Any], match: str) -> None:
    network, adapters = adapted("lora")
    config, tensors = to_peft(adapters, learned(network))
    with pytest.raises(SourceError, match=match):
        from_peft({**config, **change}, tensors)


def test_a_tensor_that_is_foreign_or_missing_is_named() -> None:
    network, adapters = adapted("lora")
    config, tensors = to_peft(adapters, learned(network))
    foreign = {**copy.copy(tensors), "base_model.model.old.lora_E": torch.zeros(1)}
    with pytest.raises(SourceError, match=r"`base_model.model.old.lora_E`"):
        from_peft(config, foreign)
    with pytest.raises(SourceError, match=r"lacks `old.up`"):
        from_peft(config, {name: t for name, t in tensors.items() if name != "base_model.model.old.lora_B.weight"})
    with pytest.raises(SourceError, match="lacks all factors"):
        from_peft(config, {})
