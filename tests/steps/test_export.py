"""export: what was written runs where its users run it, computes the same, and nothing is left where it does not."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import peftc
from peftc.errors import ArtifactError, DataError, ExportError, OutputError, PeftcError, UsageError
from peftc.formats import exported, traced
from peftc.formats import onnx as onnx_format
from peftc.models import load as models
from peftc.nn.lowrank import LowRankLinear
from tests.conftest import TEXTS
from tests.forked import forked
from tests.networks import BERT, save_transformers

QUICK: dict[str, Any] = {"rounds": 5, "batch_size": 2}
ALONE = """
import sys
sys.modules["peftc"] = None
import torch, timm, transformers
from safetensors.torch import load_file, save_file
kind, folder, there, back = sys.argv[1:]
inputs = load_file(there)
with torch.inference_mode():
    if kind == "timm":
        value = timm.create_model("local-dir:" + folder, pretrained=True).eval()(inputs["x"])
    else:
        value = getattr(transformers, kind).from_pretrained(folder).eval()(**inputs).logits
save_file({"y": value.contiguous()}, back)
"""


@pytest.fixture(scope="module")
def small_bert(tiny_bert_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose q, k and v share down factors."""
    folder = tmp_path_factory.mktemp("bert") / "small"
    peftc.decompose(tiny_bert_classifier, ratio=0.5, joint=True, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    wide = {
        **BERT,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    save_transformers(folder, "LlamaForCausalLM", **wide)
    peftc.decompose(folder, ratio=0.7, output_dir=folder / "small")
    return folder / "small"


def images(number: int) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(number))


def words(number: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (number, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def alone(kind: str, folder: Path, inputs: dict[str, torch.Tensor], place: Path) -> torch.Tensor:
    """Run a folder in a process of its own in which peftc cannot be imported."""
    save_file(inputs, place / "inputs")
    forked(kind, folder, place / "inputs", place / "back", code=ALONE).check_returncode()
    return load_file(place / "back")["y"]


# plain folders


def test_a_factored_timm_model_multiplied_out_is_a_plain_folder_of_timm(small_vit: Path, tmp_path: Path) -> None:
    report = peftc.export(small_vit, format="timm", dense=True, output_dir=tmp_path / "plain", **QUICK)
    assert report.data["deviation"] < 1e-5
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert {"architecture", "num_classes", "pretrained_cfg", "model_args"} <= config.keys()
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    x = images(3)
    with torch.inference_mode():
        expected = peftc.load(small_vit)(x)
    torch.testing.assert_close(
        alone("timm", tmp_path / "plain", {"x": x}, tmp_path), expected, rtol=1e-4, atol=1e-5
    )  # fmt: skip
    again = peftc.load(tmp_path / "plain")  # and peftc takes it for what it is, a plain model
    with torch.inference_mode():
        torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)


def test_a_factored_classifier_multiplied_out_loads_from_pretrained(small_bert: Path, tmp_path: Path) -> None:
    peftc.export(small_bert, format="hf", dense=True, output_dir=tmp_path / "plain", **QUICK)
    files = left(tmp_path / "plain")
    assert "tokenizer.json" in files and "peftc.json" not in files
    assert "transformers_weights" not in json.loads((tmp_path / "plain/config.json").read_text())
    inputs = words(3, 9)
    with torch.inference_mode():
        expected = peftc.load(small_bert)(**inputs).logits
    found = alone("BertForSequenceClassification", tmp_path / "plain", inputs, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick_exports")
def test_tied_factors_become_one_tied_weight(small_llama: Path, tmp_path: Path) -> None:
    report = peftc.export(small_llama, format="hf", dense=True, output_dir=tmp_path / "plain", **QUICK)
    assert report.data["deviation"] < 1e-5
    names = load_file(tmp_path / "plain/model.safetensors")
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


@pytest.mark.usefixtures("quick_exports")
def test_products_of_half_precision_may_be_rounded(small_llama: Path, tmp_path: Path) -> None:
    peftc.load(small_llama.parent).bfloat16().save_pretrained(tmp_path / "half")
    peftc.decompose(tmp_path / "half", ratio=0.7, output_dir=tmp_path / "small")
    report = peftc.export(tmp_path / "small", format="hf", dense=True, output_dir=tmp_path / "plain", **QUICK)
    assert 1e-4 < report.data["deviation"] < report.data["tolerance"] == 5e-2
    assert {tensor.dtype for tensor in load_file(tmp_path / "plain/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.usefixtures("quick_exports")
def test_so_may_those_of_a_file_that_is_half_precision_in_part(tiny_vit: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_vit / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.half() for name, tensor in weights.items()}
    (tmp_path / "mixed").mkdir()
    save_file(mixed, tmp_path / "mixed/model.safetensors")
    (tmp_path / "mixed/config.json").write_text((tiny_vit / "config.json").read_text())
    peftc.decompose(tmp_path / "mixed", ratio=0.6, output_dir=tmp_path / "small")
    report = peftc.export(tmp_path / "small", format="timm", dense=True, output_dir=tmp_path / "plain", **QUICK)
    assert 1e-4 < report.data["deviation"] < report.data["tolerance"] == 1e-2


@pytest.mark.usefixtures("quick_exports")
def test_a_depth_pruned_model_needs_no_dense(tiny_vit: Path, tmp_path: Path) -> None:
    peftc.prune_layers(tiny_vit, drop="1", output_dir=tmp_path / "shorter", device="cpu")
    peftc.export(tmp_path / "shorter", format="timm", output_dir=tmp_path / "plain", **QUICK)
    written = load_file(tmp_path / "plain/model.safetensors")
    stored = load_file(tmp_path / "shorter/model.safetensors")
    assert written.keys() == stored.keys() and not any(name.startswith("blocks.1.") for name in written)
    assert all(torch.equal(written[name], stored[name]) for name in stored)


@pytest.mark.usefixtures("quick_exports")
def test_a_delta_is_exported_whole(tiny_vit: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = {f"x_{split}": random.normal(size=(20, 3, 32, 32)).astype(np.float32) for split in ("train", "test")}
    np.savez(tmp_path / "x.npz", **pixels, y_train=np.arange(20) % 5, y_test=np.arange(20) % 5)
    tuned = tmp_path / "tuned"
    peftc.finetune(tiny_vit, data=str(tmp_path / "x.npz"), steps=2, delta=True, output_dir=tuned, device="cpu")
    peftc.export(tuned, format="timm", output_dir=tmp_path / "plain", **QUICK)
    written = load_file(tmp_path / "plain/model.safetensors")
    before = load_file(tiny_vit / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], written.get(name, before[name]))]
    assert any("attn" in name for name in changed) and not any("lora" in name for name in written)


def test_plain_weights_lie_beside_the_forms_of_their_modules(small_llama: Path, tmp_path: Path) -> None:
    peftc.export(small_llama, format="safetensors", output_dir=tmp_path / "out", **QUICK)
    about = json.loads((tmp_path / "out/export.json").read_text())["about"]
    weights = load_file(tmp_path / "out/model.safetensors")
    name, edit = next((name, edit) for name, edit in about["modules"].items() if name.endswith("mlp.up_proj"))
    assert weights[f"{name}.down.weight"].shape == (edit["rank"], 32)
    assert weights[f"{name}.up.weight"].shape == (64, edit["rank"])
    assert about["forms"][edit["form"]].startswith("y = up (down x)")
    assert all(first in weights and alias not in weights for alias, first in about["tied"].items())


# graphs


@pytest.fixture(scope="module")
def bert_onnx(small_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx") / "bert"
    peftc.export(small_bert, format="onnx", output_dir=folder, **QUICK)
    return folder


def session(folder: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def test_onnx_runs_any_batch_and_length(bert_onnx: Path, small_bert: Path) -> None:
    opened = session(bert_onnx)
    assert [(each.name, each.shape) for each in opened.get_inputs()] == [
        (name, ["batch", "sequence"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [(each.name, each.shape[0]) for each in opened.get_outputs()] == [("logits", "batch")]
    network = peftc.load(small_bert)
    for number, length in ((1, 4), (5, 23)):
        inputs = words(number, length)
        inputs["token_type_ids"] = (inputs["input_ids"] > 12).long()
        with torch.inference_mode():
            expected = network(**inputs).logits
        (found,) = opened.run(None, {name: each.numpy() for name, each in inputs.items()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-5)


def test_shared_factors_are_multiplied_with_once_in_onnx(bert_onnx: Path, small_bert: Path) -> None:
    import onnx

    graph = onnx.load(bert_onnx / "model.onnx").graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = Counter(
        tuple(sorted(weights[name])) for node in graph.node if node.op_type in ("MatMul", "Gemm")
        for name in node.input[:2] if len(weights.get(name, ())) == 2
    )  # fmt: skip
    edits = json.loads((small_bert / "peftc.json").read_text())["modules"]
    assert any("shares" in edit for edit in edits.values())
    network = peftc.load(small_bert)
    expected: Counter[tuple[int, ...]] = Counter()
    for module in network.modules():
        if isinstance(module, LowRankLinear):
            expected[tuple(sorted(module.up.weight.shape))] += 1
    downs = {id(m.down): m.down for m in network.modules() if isinstance(m, LowRankLinear)}
    expected.update(tuple(sorted(down.weight.shape)) for down in downs.values())
    factored = {f"{name}.{part}" for name in edits for part in ("up", "down")}
    expected.update(
        tuple(sorted(module.weight.shape)) for name, module in network.named_modules()
        if type(module) is torch.nn.Linear and name not in factored
    )  # fmt: skip
    assert found == expected


def test_onnx_says_nothing_of_the_machine_it_was_made_on(bert_onnx: Path) -> None:
    content = (bert_onnx / "model.onnx").read_bytes()
    for secret in (b"stack_trace", b".py", str(Path.home()).encode() + b"/", b"site-packages"):
        assert secret not in content, secret
    import onnx

    assert not onnx.load(bert_onnx / "model.onnx").graph.value_info


def test_weights_above_the_limit_lie_beside_the_graph(
    small_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_format, "LARGEST", 1000)
    report = peftc.export(small_vit, format="onnx", output_dir=tmp_path / "out", **QUICK)
    assert {"model.onnx", "model.onnx.data"} <= report.data["files"].keys()
    assert report.data["files"]["model.onnx.data"]["bytes"] > 10_000
    x = images(5)
    with torch.inference_mode():
        expected = peftc.load(small_vit)(x)
    (found,) = session(tmp_path / "out").run(None, {"pixel_values": x.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-5)


def test_half_precision_is_nearly_the_same_in_half_the_bytes(small_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    report = peftc.export(
        small_llama, format="onnx", settings={"dtype": "fp16"}, output_dir=tmp_path / "half", **QUICK
    )  # fmt: skip
    assert 1e-5 < report.data["deviation"] < report.data["tolerance"] == 2e-2
    import onnx

    model = onnx.load(tmp_path / "half/model.onnx")
    large = [each for each in model.graph.initializer if np.prod(each.dims) > 256]
    assert large and {each.data_type for each in large} == {onnx.TensorProto.FLOAT16}
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_eight_bits_are_gated_by_their_quality(small_bert: Path, tmp_path: Path, peftc: Any) -> None:
    pytest.importorskip("onnxruntime")
    labels = ["negative", "neutral", "positive"]
    data = tmp_path / "texts.csv"
    data.write_text("text,label\n" + "".join(f'"{text}",{labels[at % 3]}\n' for at, text in enumerate(TEXTS * 4)))
    words = (
        "export",
        small_bert,
        "--format",
        "onnx",
        "--set",
        "quantize=int8",
        "--data",
        data,
        "--rounds",
        5,
        "--json",
    )
    done = peftc(*words, "-o", tmp_path / "int8", "--max-drop", 1, "--min-quality", 1.1)
    assert done.exit_code == 3, done.stderr
    found = json.loads(done.stdout)
    assert found["tolerance"] is None and 0 < found["deviation"] < 0.5
    assert {gate["option"]: gate["passed"] for gate in found["gates"]} == {"--max-drop": True, "--min-quality": False}
    assert "products with weights compute in 8 bits" in " ".join(found["notes"])
    assert found["quality"]["batch_size"] == 1 and ", one at a time; " in done.stderr
    (warning,) = found["warnings"]
    assert warning.endswith("depends on what else is in the batch"), "and does not ask for a gate that is there"
    again = peftc(*words, "-o", tmp_path / "int8", "--max-drop", 1)
    assert again.exit_code == 0 and "already done" in again.stderr


def test_a_program_of_torch_runs_without_peftc(small_bert: Path, tmp_path: Path) -> None:
    report = peftc.export(small_bert, format="torch-export", output_dir=tmp_path / "out", **QUICK)
    assert report.data["deviation"] < 1e-6
    code = (
        "import sys; sys.modules['peftc'] = sys.modules['transformers'] = None; import torch\n"
        "program = torch.export.load(sys.argv[1])\n"
        "linear = torch.ops.aten.linear.default\n"
        "print(sum(node.target is linear for node in program.graph.nodes))\n"
        "print(program.module()(*(torch.ones(3, 7, dtype=torch.long),) * 3).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out/model.pt2")], check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    number, outputs = done.stdout.splitlines()[-2:]
    network = peftc.load(small_bert)
    products = {id(module) for module in network.modules() if isinstance(module, torch.nn.Linear)}
    assert int(number) == len(products)  # a shared factor is one module, and one product
    ones = torch.ones(3, 7, dtype=torch.long)
    with torch.inference_mode():
        expected = network(input_ids=ones, attention_mask=ones, token_type_ids=ones).logits
    torch.testing.assert_close(torch.tensor(json.loads(outputs)), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_of_a_resnet_survive_as_two(tiny_resnet: Path, tmp_path: Path) -> None:
    peftc.decompose(tiny_resnet, ratio=0.6, conv_method="spatial", output_dir=tmp_path / "small")
    report = peftc.export(tmp_path / "small", format="torch-export", output_dir=tmp_path / "out", **QUICK)
    factored = json.loads((tmp_path / "small/peftc.json").read_text())["modules"]
    assert report.data["factors"] == 2 * len(factored) > 0
    assert report.data["products"] > report.data["factors"]


# real inputs


def test_samples_of_the_user_are_compared_as_well(small_vit: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((5, 3, 32, 32), np.float32), y=np.arange(5))
    alike = peftc.export(
        small_vit, format="safetensors", data=str(tmp_path / "x.npz"), output_dir=tmp_path / "out", **QUICK
    )  # fmt: skip
    assert alike.data["samples"] == 5 + 4
    assert alike.data["random_inputs"] == 4 and "(5 samples and 4 random inputs)" in alike.summary["checked"]
    assert not any("random inputs" in note for note in alike.notes)


def test_labelled_samples_tell_the_quality_without_a_gate(vit: Path, images: str, tmp_path: Path, peftc: Any) -> None:
    words = ("export", vit, "--format", "safetensors", "--data", images, "--num-samples", 40, "--rounds", 5)
    done = peftc(*words, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["quality"]
    assert found["metric"] == "top1" and found["data"]["samples"] == 40 and found["batch_size"] == 16
    assert found["against"]["name"] == vit.name and found["against"]["difference"]["top1"]["value"] == 0
    assert "on 40 samples of split test" in done.stderr
    assert "the same model in PyTorch: " in done.stderr


def test_classes_of_others_leave_the_quality_out_and_a_note_says_so(tiny_vit: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for at in range(24):
        folder = tmp_path / "photos" / f"kind {at % 12}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{at}.png")
    data = str(tmp_path / "photos")
    report = peftc.export(tiny_vit, format="safetensors", data=data, output_dir=tmp_path / "out", **QUICK)
    assert "quality" not in report.data
    assert any(note.startswith("quality was not measured: ") for note in report.notes)


def test_a_network_that_gives_one_output_for_all_is_said_to_prove_little(tiny_vit: Path, tmp_path: Path) -> None:
    network = peftc.load(tiny_vit)
    torch.nn.init.zeros_(network.head.weight)
    report = peftc.export(network, format="safetensors", output_dir=tmp_path / "out", **QUICK)
    assert "gives one output whatever the input" in " ".join(report.warnings)


# refusals


def refused(model: Any, tmp_path: Path, **options: Any) -> PeftcError:
    """Return the refusal of an export that leaves nothing behind."""
    (tmp_path / "place").mkdir(exist_ok=True)
    with pytest.raises(PeftcError) as caught:
        peftc.export(model, output_dir=tmp_path / "place/out", **{**QUICK, **options})
    assert left(tmp_path / "place") == []
    return caught.value


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({}, UsageError, "`--format` is one of `hf`, `hf-code`, `timm`, `safetensors`, `onnx`, `torch-export`"),
        ({"format": "onx"}, UsageError, "did you mean `--format onnx`"),
        ({"format": "onnx", "settings": {"optset": 20}}, UsageError, "`onnx` has no setting `optset`"),
        ({"format": "onnx", "settings": {"opset": 3}}, UsageError, "it is 18 to 23"),
        ({"format": "onnx", "settings": {"dtype": "fp8"}}, UsageError, "`fp8`"),
        ({"format": "onnx", "settings": {"dtype": "fp16", "quantize": "int8"}}, UsageError, "both given"),
        ({"format": "gguf"}, UsageError, "`peftc export MODEL --format hf --dense -o dense`, and give it the folder"),
        ({"format": "torchao"}, UsageError, "quantises a network in memory"),
        ({"format": "hf", "dense": True}, ExportError, "use `--format timm`"),
        ({"format": "timm", "rounds": 4}, UsageError, "too few"),
        ({"format": "safetensors", "max_drop": 0.1}, DataError, "`--data DATA`"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_is_refused(options: dict[str, Any], kind: type, text: str, small_vit: Path, tmp_path: Path) -> None:
    error = refused(small_vit, tmp_path, **options)
    assert isinstance(error, kind) and text in str(error)


def test_two_networks_are_no_one_graph(tiny_clip: Path, tmp_path: Path) -> None:
    assert "`--format hf`" in str(refused(tiny_clip, tmp_path, format="torch-export"))


class Choosy(torch.nn.Module):
    """What it computes depends on what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


def test_what_no_graph_can_hold_is_refused_with_the_cause(tmp_path: Path) -> None:
    error = refused(Choosy(), tmp_path, format="torch-export")
    assert "cannot be written as a graph" in str(error) and error.why


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    small_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = refused(small_vit, tmp_path, format="onnx")
    assert "`onnxruntime`" in str(error) and "pip install 'peftc[onnx]'" in str(error)


def test_an_export_that_computes_something_else_is_exit_1_and_leaves_nothing(
    small_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Any
) -> None:
    pytest.importorskip("onnxruntime")
    right = traced.attention
    monkeypatch.setattr(traced, "attention", lambda *args, **named: 1.5 * right(*args, **named))
    done = peftc("export", small_vit, "--format", "onnx", "-o", tmp_path / "deep/out", "--rounds", 5)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "computes something else" in done.stderr and "ONNX Runtime" in done.stderr
    assert left(tmp_path) == []


@pytest.mark.usefixtures("quick_exports")
def test_a_plain_folder_that_its_library_does_not_load_is_refused(
    small_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftc.formats import timm as timm_format

    pieces = timm_format.pieces_of
    monkeypatch.setattr(
        timm_format, "pieces_of", lambda model: {n: p for n, p in pieces(model).items() if n != "head.bias"}
    )  # fmt: skip
    error = refused(small_vit, tmp_path, format="timm", dense=True)
    assert "timm does not load what was written" in str(error) and "head.bias" in str(error)


def test_factors_that_became_one_product_are_refused(
    small_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traced, "products", lambda program: [])
    error = refused(small_vit, tmp_path, format="torch-export")
    assert "12 of 12 factors" in str(error) and "gone from the graph" in str(error)


def test_a_folder_of_somebody_else_is_left_alone(small_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is in the way"):
        peftc.export(small_vit, format="safetensors", output_dir=tmp_path / "out", overwrite=True, **QUICK)
    assert left(tmp_path / "out") == ["mine.txt"] and left(tmp_path) == ["out"]


def test_the_same_request_is_done_and_another_needs_overwrite(small_vit: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": tmp_path / "out", **QUICK}
    first = peftc.export(small_vit, format="safetensors", **options)
    again = peftc.export(small_vit, format="safetensors", max_bytes=10, **options)
    assert any(note.startswith("already done") for note in again.notes)
    assert again.data["deviation"] == first.data["deviation"] and not again.passed
    with pytest.raises(ArtifactError, match=r"export of another request[^$]*dense was off, now it is on"):
        peftc.export(small_vit, format="safetensors", dense=True, **options)
    peftc.export(small_vit, format="safetensors", dense=True, overwrite=True, **options)
    assert "blocks.0.mlp.fc1.weight" in load_file(tmp_path / "out/model.safetensors")
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="not as it was exported"):
        peftc.export(small_vit, format="safetensors", dense=True, **options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(small_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="may not be written"):
        peftc.export(small_vit, format="safetensors", output_dir=tmp_path / "closed/out", **QUICK)


def test_a_file_system_that_takes_no_folders_is_refused(small_vit: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc")
    with pytest.raises(OutputError, match="cannot be made"):
        peftc.export(small_vit, format="safetensors", output_dir="/proc/nothing/out", **QUICK)


def test_a_file_in_the_path_is_refused(small_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file, not a folder"):
        peftc.export(small_vit, format="safetensors", output_dir=tmp_path / "file/out", **QUICK)
    assert left(tmp_path) == ["file"]


# parts


def test_attention_written_out_is_that_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 5, 5, generator=draw) > 0.3
    mask[..., 0] = True
    reference = torch.nn.functional.scaled_dot_product_attention
    for named in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float()}, {"scale": 0.5}, {}):
        torch.testing.assert_close(
            traced.attention(q, k, v, enable_gqa=True, **named), reference(q, k, v, enable_gqa=True, **named)
        )  # fmt: skip


def test_a_graph_without_a_mask_for_any_token_holds_numbers() -> None:
    x = torch.randn(1, 1, 3, 4)
    assert traced.attention(x, x, x, attn_mask=torch.zeros(1, 1, 3, 3, dtype=torch.bool)).isfinite().all()


def test_the_output_that_matters_has_its_name(tiny_bert: Path, tiny_vit: Path) -> None:
    bert, vit = models.load(tiny_bert), models.load(tiny_vit)
    assert exported.computed(bert, words(2, 5))[1] == "last_hidden_state"
    assert exported.computed(vit, {"pixel_values": images(1)})[1] == "logits"
