"""An adapter that Hugging Face peft wrote is a MODEL like any other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.errors import PeftcError, SourceError
from peftc.models import load
from peftc.nn.adapted import adapted_modules
from peftc.store.source import Source
from tests.conftest import rewritten
from tests.networks import LLAMA, save_transformers

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 6, 7]])


def save_adapter(base: Path, folder: Path, *, classes: int | None = None, **options: Any) -> torch.Tensor:
    """Write an adapter with random factors, and return what peft computes with it."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    made: Any = AutoModel if classes is None else AutoModelForSequenceClassification
    network = made.from_pretrained(base, **({} if classes is None else {"num_labels": classes}))
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value", "dense"], task_type="SEQ_CLS" if classes else None, **options
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(network.eval(), config)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.1)
        adapted.save_pretrained(folder)
        found = adapted.eval()(IDS)
    return found.logits if classes else found.last_hidden_state


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_computes_what_it_does_in_peft(tiny_bert: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = save_adapter(tiny_bert, tmp_path / "adapter", **options)
    with torch.no_grad():
        found = peftc.load(tmp_path / "adapter")(IDS).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_an_adapter_loads_unmerged(tiny_bert: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = save_adapter(tiny_bert, tmp_path / "adapter", **options)
    base, network = peftc.load(tiny_bert), peftc.load(tmp_path / "adapter", merge=False)
    found = adapted_modules(network)
    assert found and not network.training and not any(each.training for each in network.modules())
    for name, each in found.items():
        assert torch.equal(each.base.weight, base.get_submodule(name).weight), name
    with torch.no_grad():
        torch.testing.assert_close(network(IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-4)


def test_a_head_for_other_classes_comes_along(tiny_bert: Path, tmp_path: Path) -> None:
    expected = save_adapter(tiny_bert, tmp_path / "adapter", classes=4)
    with torch.no_grad():
        found = peftc.load(tmp_path / "adapter")(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_goes_through_the_chain(tiny_bert: Path, tmp_path: Path) -> None:
    save_adapter(tiny_bert, tmp_path / "adapter")
    peftc.decompose(tmp_path / "adapter", output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    assert peftc.load(tmp_path / "small")(IDS).last_hidden_state.shape == (1, 4, 32)


def test_an_adapter_of_another_model_is_refused(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(tiny_bert, tmp_path / "adapter")
    with pytest.raises(SourceError, match="adapts `encoder.layer.0.* which the model does not have"):
        load.load(Source(str(tmp_path / "adapter"), base=str(tiny_llama)))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match="lacks `adapter_model.safetensors`"):
        peftc.load(tmp_path / "adapter")


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_delta_leaves_as_an_adapter_and_comes_back(tiny_bert: Path, tmp_path: Path, method: str) -> None:
    rows = [("the cat sat on the mat .", "pets"), ("a big red tree !", "plants")] * 8
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(f"{text},{label}" for text, label in rows))
    peftc.finetune(
        tiny_bert, output_dir=tmp_path / "delta", data=str(tmp_path / "train.csv"), method=method, steps=4, delta=True,
        held_out=0, device="cpu", learning_rate=1e-2,
    )  # fmt: skip
    report = peftc.export(tmp_path / "delta", format="peft", output_dir=tmp_path / "adapter", rounds=5)
    assert report.data["runtime"].startswith("peft ")
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "adapter").iterdir()), "as the user's mask has it"
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(network, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = peftc.load(tmp_path / "delta")(IDS).logits
        torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(peftc.load(tmp_path / "adapter")(IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_modules_that_are_learnt_whole_leave_with_the_bias_that_is_not(tiny_vit: Path, tmp_path: Path) -> None:
    """A factor too thin for an update learns its weight alone; peft takes such modules whole."""
    peftc.decompose(tiny_vit, rank=6, include=["attn.proj"], skip=["mlp", "qkv"], output_dir=tmp_path / "thin")
    few: dict[str, Any] = {"data": "sklearn:digits", "num_samples": 32, "steps": 1, "held_out": 0, "device": "cpu"}
    peftc.finetune(tmp_path / "thin", delta=True, output_dir=tmp_path / "delta", **few)
    report = peftc.export(tmp_path / "delta", format="peft", output_dir=tmp_path / "adapter", rounds=5)
    assert report.data["deviation"] < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "blocks.0.attn.proj.up" in config["modules_to_save"]


def test_what_peft_has_no_place_for_is_refused(tiny_vit: Path, tmp_path: Path) -> None:
    options = {"data": "sklearn:digits", "num_samples": 40, "steps": 1, "delta": True, "held_out": 0, "image_size": 32}
    with pytest.raises(PeftcError, match="has no updates to export"):
        peftc.export(tiny_vit, format="peft", output_dir=tmp_path / "adapter")
    peftc.finetune(tiny_vit, output_dir=tmp_path / "delta", method="snell", **options)
    with pytest.raises(PeftcError, match="peft's format has no place for"):
        peftc.export(tmp_path / "delta", format="peft", output_dir=tmp_path / "adapter")
    assert not list(tmp_path.glob("adapter*"))


def save_causal(base: Path, folder: Path, *targets: str, **options: Any) -> torch.Tensor:
    """Write an adapter of a causal language model with random factors, and return peft's logits."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(network.eval(), peft.LoraConfig(r=4, target_modules=list(targets), **options))
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if name.endswith(("lora_B.default.weight", "lora_embedding_A.default", "lora_embedding_B.default")):
                each.normal_(std=0.1)
        adapted.save_pretrained(folder)
        return adapted.eval()(IDS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets", [("lm_head",), ("embed_tokens",), ("q_proj", "embed_tokens", "lm_head")], ids="-".join
)
def test_an_adapter_of_embeddings_and_head_is_read(tmp_path: Path, targets: tuple[str, ...], tied: bool) -> None:
    (tmp_path / "base").mkdir()
    base = save_transformers(tmp_path / "base", "LlamaForCausalLM", **{**LLAMA, "tie_word_embeddings": tied})
    expected = save_causal(base, tmp_path / "adapter", *targets)
    for merge in (True, False):
        with torch.no_grad():
            found = peftc.load(tmp_path / "adapter", merge=merge)(IDS).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    peftc.decompose(tmp_path / "adapter", output_dir=tmp_path / "small", rank=2, include=["q_proj"], skip=["mlp"])
    assert peftc.load(tmp_path / "small").lm_head.weight.shape == (*expected.shape[-1:], 32), "it reloads, parted"


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    save_causal(tiny_llama, tmp_path / "adapter", "q_proj", "down_proj")
    return tmp_path / "adapter"


ENDLESS = {"(.|.)*[A-Z]": 3.0}  # a step more for every letter doubles what it takes


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses `layer_replication`"),
        ({"something_new": {"a": 1}}, "uses `something_new`, of which peftc does not know what it changes"),
        ({"r": "4"}, '`r` is `"4"`, not a whole number'),
        ({"r": 8}, "factors of rank 4 for .* its configuration says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "factors of rank 4 for .*q_proj.* its configuration says 2"),
        ({"target_modules": ["q_proj"]}, "factors for `model.layers.0.mlp.down_proj`.*leave that module alone"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "no factors for `model.layers.0.mlp.up_proj`"),
        ({"exclude_modules": ["layers.1.mlp.down_proj"]}, "factors for `model.layers.1.mlp.down_proj`"),
        ({"layers_to_transform": [0]}, "factors for `model.layers.1.mlp.down_proj`"),
        ({"modules_to_save": ["lm_head"]}, "lacks `lm_head`"),
        ({"alpha_pattern": ENDLESS}, "is no pattern for names.*not done with the name"),
        ({"alpha_pattern": {"(": 3.0}}, "is no pattern"),
        ({"task_type": "SING"}, "its task_type is SING"),
        ({"base_model_name_or_path": 3}, "is not as peft writes it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_changes_what_is_computed_is_refused_by_name(
    adapter: Path, change: dict[str, Any], match: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError) as refusal:
        peftc.load(adapter)
    assert re.search(match, str(refusal.value), re.DOTALL), str(refusal.value)


def test_patterns_and_limits_of_the_configuration_are_read_as_peft_reads_them(tiny_llama: Path, tmp_path: Path) -> None:
    options = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r".*\.(q|v)_proj": 16.0},
        "layers_to_transform": [0], "layers_pattern": "layers",
    }  # fmt: skip
    expected = save_causal(tiny_llama, tmp_path / "adapter", "q_proj", "down_proj", **options)
    with torch.no_grad():
        torch.testing.assert_close(peftc.load(tmp_path / "adapter")(IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_or_a_delta_on_itself_is_refused(adapter: Path, tiny_vit: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(adapter)}))
    with pytest.raises(SourceError, match="cannot be the model beneath another"):
        peftc.load(adapter)
    delta = tmp_path / "delta"
    peftc.finetune(tiny_vit, output_dir=delta, delta=True, data="sklearn:digits", steps=1, num_samples=20, held_out=0)
    rewritten(delta / "peftc.json", lambda value: value["delta"]["source"].update(spec=str(delta)))
    with pytest.raises(SourceError, match="cannot be the model beneath another"):
        peftc.load(delta)
