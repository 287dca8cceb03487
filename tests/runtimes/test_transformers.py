"""import peftc.transformers: `from_pretrained` of transformers builds what peftc wrote, to the last bit."""

import copy
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peftc
from peftc.errors import SourceError, UsageError, WeightError
from peftc.models.load import load
from peftc.nn.skipped import Skipped
from peftc.steps.push import push_to_hub
from peftc.store import manifest, quantization
from tests.conftest import TEXTS, rewritten
from tests.forked import forked
from tests.formats.kinds import KINDS, factored, save, texts
from tests.hub_server import Hub
from tests.networks import BERT, CLIP, LLAMA, T5, save_transformers

pytestmark = pytest.mark.usefixtures("registered")
QUICK: dict[str, Any] = {"rounds": 5, "batch_size": 2}
FRESH = """
import json, sys
import torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file

def loaded(auto, folder):
    network, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert not wrong, wrong
    return network

def seen(network, inputs):
    with torch.inference_mode():
        value = network(**inputs)
        found = {"output": (value.logits if hasattr(value, "logits") else value[0]).contiguous()}
        if getattr(network, "can_generate", bool)():
            found["told"] = network.generate(**inputs, max_new_tokens=6, do_sample=False).contiguous()
    return found

named = [line.split("=", 1) for line in sys.argv[1:]]
for auto, place in named:
    for folder in ("small", "export"):
        try:
            getattr(transformers, auto).from_pretrained(Path(place, folder))
        except (ValueError, OSError) as error:
            assert "import peftc.transformers" in str(error), error
        else:
            raise SystemExit(f"{place}/{folder} loads without the import")
import peftc.transformers
for auto, place in named:
    place = Path(place)
    inputs = load_file(place / "inputs")
    for name in ("small", "again", "export"):
        network = loaded(auto, place / name)
        save_file(seen(network, inputs), place / f"{name}.seen")
        if name == "small":
            network.save_pretrained(place / "again")
    import peftc
    save_file(seen(peftc.load(place / "small"), inputs), place / "expected")
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Factor one network of each kind, export it, and load all in a process that begins without peftc."""
    found, lines = {}, []
    with pytest.MonkeyPatch.context() as patch:
        from peftc.formats import exported

        patch.setattr(exported, "plain", lambda *_, **__: exported.Exported("none", dict, dict))
        for kind in KINDS:
            place = found[kind] = tmp_path_factory.mktemp("kind")
            auto = factored(kind, place)
            (place / "export").mkdir()
            from peftc.formats.hf import hf

            hf(load(place / "small"), {}, place / "export")
            lines.append(f"{auto}={place}")
    done = forked(*lines, code=FRESH)
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_peftc_does_to_the_last_bit(kind: str, places: dict[str, Path]) -> None:
    """So does what it saves again, and an export; without the import both say what to import."""
    expected = load_file(places[kind] / "expected")
    for name in ("small", "again", "export"):
        found = load_file(places[kind] / f"{name}.seen")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_saves_is_locked_and_holds_each_tensor_once(kind: str, places: dict[str, Path]) -> None:
    told = {
        name: json.loads((places[kind] / name / "config.json").read_text()) for name in ("small", "again", "export")
    }
    assert told["small"][quantization.KEY] == told["again"][quantization.KEY] == told["export"][quantization.KEY]
    assert {each[quantization.LOCKED] for each in told.values()} == {quantization.BUILT}
    sizes = {
        name: sum(each.numel() for each in load_file(places[kind] / name / "model.safetensors").values())
        for name in told
    }
    assert len(set(sizes.values())) == 1, sizes


def given(network: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        value = network(**inputs)
        return value.logits if hasattr(value, "logits") else value[0]  # type: ignore[no-any-return]


def lowrank(network: Any) -> list[str]:
    return [name for name, module in network.named_modules() if type(module).__name__.startswith("LowRank")]


# what else becomes of a model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored classifier with its tokenizer, whose q, k and v share down factors."""
    place = tmp_path_factory.mktemp("small")
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    names = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    save_transformers(place, "BertForSequenceClassification", **BERT, initializer_range=0.2, **names)
    peftc.decompose(place, ratio=0.5, joint=True, output_dir=place / "small")
    return place / "small"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored Llama of three layers, tied head and embedding among its factors."""
    place = tmp_path_factory.mktemp("llama")
    save_transformers(place, "LlamaForCausalLM", **{**LLAMA, "num_hidden_layers": 3}, initializer_range=0.2)
    peftc.decompose(place, ratio=0.7, output_dir=place / "small", include=["*proj*", "*embed*", "*lm_head*"])
    return place / "small"


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 40}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MixtralForCausalLM": ("AutoModelForCausalLM", {**LLAMA, **EXPERTS}),
    "T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", {**T5, "vocab_size": 40}),
    "CLIPModel": ("AutoModel", CLIP),
}


@pytest.mark.parametrize("name", OTHERS)
def test_experts_two_towers_and_encoders_with_decoders(name: str, tmp_path: Path) -> None:
    auto, config = OTHERS[name]
    (tmp_path / "base").mkdir()
    base, inputs = save(tmp_path / "base", name, **config), texts()
    peftc.decompose(base, ratio=0.5, output_dir=tmp_path / "small")
    network, info = getattr(transformers, auto).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert lowrank(network) and not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if name.startswith("T5"):
        inputs |= {"decoder_input_ids": inputs["input_ids"]}
    if name.startswith("CLIP"):
        inputs |= {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    network.save_pretrained(tmp_path / "again")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        one, other, saved = (each(**inputs)[0] for each in (network, peftc.load(tmp_path / "small"), again))
    assert torch.equal(one, other) and torch.equal(one, saved)


def test_layers_that_are_gone(llama: Path, tmp_path: Path) -> None:
    peftc.prune_layers(llama, drop="1", output_dir=tmp_path / "shorter", device="cpu")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shorter")
    assert len(network.model.layers) == 2 and lowrank(network)
    assert torch.equal(given(network, texts()), given(peftc.load(tmp_path / "shorter"), texts()))


def test_layers_that_hand_on_what_they_read(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = transformers.SwinConfig(
        image_size=112, embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=7, num_labels=5
    )
    torch.manual_seed(0)
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path / "base")
    peftc.prune_layers(tmp_path / "base", drop="0", output_dir=tmp_path / "shorter", device="cpu")
    peftc.decompose(tmp_path / "shorter", ratio=0.6, output_dir=tmp_path / "small")
    x = {"pixel_values": torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))}
    for name in ("shorter", "small"):
        network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert any(isinstance(module, Skipped) for module in network.modules())
        assert torch.equal(given(network, x), given(peftc.load(tmp_path / name), x))
        network.save_pretrained(tmp_path / f"{name} again")
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / f"{name} again")
        assert torch.equal(given(network, x), given(again, x))


def test_the_network_without_its_head_and_with_another(small: Path, llama: Path, tmp_path: Path) -> None:
    whole = peftc.load(small)
    body, info = transformers.AutoModel.from_pretrained(small, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(given(body, texts()), whole.bert(**texts())[0])
    other = transformers.AutoModelForTokenClassification.from_pretrained(small)
    assert torch.equal(given(other.bert, texts()), whole.bert(**texts())[0])
    body = transformers.AutoModel.from_pretrained(llama)
    assert torch.equal(given(body, texts()), peftc.load(llama).model(**texts())[0])
    peftc.decompose(small.parent, ratio=0.5, output_dir=tmp_path / "b", include=["*pooler*", "*encoder*"])
    masked = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "b")  # which has no pooler
    assert len(lowrank(masked)) == len(lowrank(peftc.load(tmp_path / "b"))) - 1


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_it_goes_where_accelerate_puts_it(place: Any, llama: Path) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(llama, device_map=place, max_memory={"cpu": "1GB"})
    assert torch.equal(given(network.to("cpu"), texts()), given(peftc.load(llama), texts()))


def test_and_parts_of_it_to_disk(llama: Path, tmp_path: Path) -> None:
    where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    network = transformers.AutoModelForCausalLM.from_pretrained(llama, device_map=where, offload_folder=tmp_path)
    assert torch.equal(given(network, texts()), given(peftc.load(llama), texts()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_has_one_dtype_and_takes_another(dtype: torch.dtype, small: Path) -> None:
    for auto in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        network = auto.from_pretrained(small, dtype=dtype)
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert network.half().dtype == torch.float16
    assert torch.equal(given(copy.deepcopy(network.float()), texts()), given(network, texts()))


def test_it_runs_in_a_pipeline(small: Path) -> None:
    told = transformers.pipeline("text-classification", model=str(small), device="cpu")(TEXTS)
    tokens = transformers.AutoTokenizer.from_pretrained(small)(TEXTS, return_tensors="pt", padding=True)
    expected = given(peftc.load(small), dict(tokens)).softmax(-1)
    assert [each["score"] for each in told] == pytest.approx(expected.amax(-1).tolist(), abs=1e-6)


def test_a_trainer_trains_the_factors(small: Path, tmp_path: Path) -> None:
    if "keep_torch_compile" not in inspect.signature(accelerate.Accelerator.unwrap_model).parameters:
        pytest.skip("this accelerate is too old for the Trainer of transformers")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(small)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    rows = [{**tokenizer(text), "labels": at % 3} for at, text in enumerate(TEXTS * 4)]
    how: dict[str, Any] = {
        "max_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), learning_rate=0.01, **how)
    trainer = transformers.Trainer(network, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    factors = {name for name in before if name.endswith(("up.weight", "down.weight"))}
    assert factors and factors <= changed
    trainer.save_model(str(tmp_path / "tuned"))
    assert quantization.LOCKED in json.loads((tmp_path / "tuned/config.json").read_text())
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(given(again, texts()), given(network.eval(), texts()))
    assert not torch.equal(given(again, texts()), given(peftc.load(small), texts()))


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")  # both are factored, and are
def test_adapters_of_peft_stand_on_its_factors(llama: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = library.LoraConfig(r=2, target_modules=r".*proj\.(up|down)", init_lora_weights=False)
    adapted = library.get_peft_model(base, config)
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert any(name.endswith(".down") for name in names) and any(name.endswith(".up") for name in names)
    adapted(**texts(), labels=texts()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if ".lora_" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = given(adapted.eval(), texts())
    assert not torch.equal(expected, given(peftc.load(llama), texts()))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(llama)
    again = library.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(given(again, texts()), expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(given(whole, texts()), expected, rtol=1e-4, atol=1e-5)


# from the hub

REMOTE = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
auto, name, place = sys.argv[1:]
auto = getattr(transformers, auto)
try:
    auto.from_pretrained(name)
except (ValueError, OSError) as error:
    assert "peftc" in str(error), error
else:
    raise SystemExit("it loads without the import")
import peftc.transformers
network = auto.from_pretrained(name)
with torch.inference_mode():
    save_file({"y": network(**load_file(f"{place}/inputs")).logits}, f"{place}/back")
network.push_to_hub("me/again")
"""


@pytest.mark.filterwarnings("ignore:Use 'content=")
def test_it_loads_from_the_hub_and_goes_back_there(hub: Hub, small: Path, tmp_path: Path) -> None:
    push_to_hub(small, "me/small")
    save_file(texts(), tmp_path / "inputs")
    line = [sys.executable, "-c", REMOTE, "AutoModelForSequenceClassification", "me/small", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True)  # what names the hub is read at the start
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "back")["y"], given(peftc.load(small), texts()))
    assert "peftc.json" not in " ".join(each for each in hub.asked if each.startswith("GET /me/small/resolve"))
    pushed = hub.repos["me/again"].commits[-1][1]
    assert json.loads(pushed["config.json"])[quantization.LOCKED] == quantization.BUILT


def test_a_push_that_would_come_before_the_lock_is_refused(small: Path, tmp_path: Path) -> None:
    network = transformers.AutoModel.from_pretrained(small)
    with pytest.raises(UsageError, match="not locked yet"):
        network.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


# what peftc makes of such folders, and of others


def test_a_config_tells_peftc_no_more_than_it_did(small: Path, tmp_path: Path) -> None:
    """An artifact that says nothing to transformers, as earlier ones, is the same model and gives the same next id."""
    shutil.copytree(small, tmp_path / "earlier")
    path = tmp_path / "earlier/config.json"
    config = json.loads(path.read_text())
    del config[quantization.KEY]
    config[quantization.LOCKED] = "load it with peftc.load"
    path.write_text(json.dumps(config))
    entry = {"bytes": path.stat().st_size, "sha256": manifest.file_digest(path)}
    rewritten(tmp_path / "earlier/peftc.json", lambda value: value["files"].update({"config.json": entry}))
    one, other = load(small), load(tmp_path / "earlier")
    assert one.config == other.config and quantization.KEY not in one.config
    assert not hasattr(one.module.config, quantization.KEY) and not hasattr(one.module.config, quantization.LOCKED)
    assert torch.equal(given(one.module, texts()), given(other.module, texts()))


def test_a_folder_without_a_manifest_is_left_to_transformers(small: Path, tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(small).save_pretrained(tmp_path / "saved")
    with pytest.raises(SourceError, match="no `peftc.json`: transformers loads it after `import peftc.transformers`"):
        peftc.load(tmp_path / "saved")


def test_updates_that_stay_are_for_peftc_alone(small: Path, tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(
        f'"{text}",{["negative", "neutral", "positive"][at]}\n' for at, text in enumerate(TEXTS)
    )
    (tmp_path / "texts.csv").write_text(rows)
    how: dict[str, Any] = {"data": str(tmp_path / "texts.csv"), "steps": 1, "held_out": 0, "device": "cpu"}
    peftc.finetune(small, method="lora", delta=True, output_dir=tmp_path / "delta", **how)
    with pytest.raises((ValueError, OSError), match=r"load it with peftc\.load"):
        transformers.AutoModel.from_pretrained(tmp_path / "delta")


def changed(folder: Path, place: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of a folder whose config.json says something else of factors."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    change(config[quantization.KEY])
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda told: told.update(later=1), "`later`, which this peftc does not know"),
        (lambda told: told.update(modules=[]), "not as peftc writes it"),
        (lambda told: [each.update(rank=0) for each in told["modules"].values()], "has the rank 0"),
        (
            lambda told: [each.update(shares="no") for each in told["modules"].values()],
            "shares the down factor of `no`",
        ),
        (lambda told: told.update(skipped={"bert.encoder.layer.0": [10**9]}), "does not say what it gave"),
        (lambda told: told["modules"].update({"bert.no": {"form": "linear", "rank": 2}}), "`bert.no`, which"),
        (lambda told: next(iter(told["modules"].values())).update(form="nothing"), "as `nothing` at rank"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(change: Any, says: str, small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path / "changed", change)
    with pytest.raises(peftc.PeftcError, match=says):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_another_rank_than_the_files_hold_is_refused(small: Path, tmp_path: Path) -> None:
    folder = changed(
        small, tmp_path / "changed", lambda told: [each.update(rank=3) for each in told["modules"].values()]
    )
    with pytest.raises((RuntimeError, WeightError)):  # of transformers; ours where that does not look
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("part", ["output.dense.up.weight", "query.down.weight"])
def test_factors_that_the_files_lack_are_not_drawn_at_random(part: str, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "lacks")
    tensors = load_file(small / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(part))
    save_file(
        {name: each for name, each in tensors.items() if name != lost},
        tmp_path / "lacks/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(WeightError, match=lost):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "lacks")


def test_an_export_keeps_its_factors(small: Path, tmp_path: Path) -> None:
    report = peftc.export(small, format="hf", output_dir=tmp_path / "out", **QUICK)
    assert report.data["runtime"].endswith("after `import peftc.transformers`")
    assert report.data["factors"] == len(
        [n for n in load_file(small / "model.safetensors") if n.endswith(("up.weight", "down.weight"))]
    )
    assert report.data["deviation"] < 1e-6
    assert not (tmp_path / "out/peftc.json").exists()
