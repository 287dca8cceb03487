"""Decompose makes a folder that is smaller, reloads anywhere, is the same every time, and says what it left alone."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc.errors import ArtifactError, PlanError, SourceError, UsageError, WeightError
from peftc.measure import costs
from peftc.models import load as models
from peftc.models import write
from peftc.models.inputs import outputs, probe
from peftc.models.model import Model
from peftc.nn import lowrank
from peftc.nn.surgery import parameters
from peftc.report import Report
from peftc.steps.analyze import analyze
from peftc.steps.decompose import decompose
from peftc.store import manifest
from peftc.store.source import Source
from tests.conftest import promised
from tests.forked import forked

REPOSITORY = Path(__file__).parents[2]
HERE = "python:tests.steps.test_decompose"


class Perceptron(nn.Module):
    """Three linears; the last is the head."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(48, width)
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth - 1)))
        self.last = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x)))


class Shared(nn.Module):
    """One linear in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.b = self.a
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).relu()))


class Tied(nn.Module):
    """Two linears with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.b = nn.Linear(48, 48)
        self.b.weight = self.a.weight
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).relu()))


class RawTied(nn.Module):
    """A weight that is also a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.again = self.a.weight
        self.b = nn.Linear(48, 48)
        self.last = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x) @ self.again))


class Attention(nn.Module):
    """torch's own attention modules, which read their weights without calling the modules that hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.last = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.first(x)[:, None])
        return self.last(self.attention(x, x, x)[0])


class Convolutions(nn.Module):
    """Grouped, depthwise, dilated and circular convolutions on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=4)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.odd = nn.Conv2d(32, 64, (3, 5), padding="same", dilation=2, padding_mode="circular")
        self.strided = nn.Conv2d(64, 64, 3, stride=(1, 2), padding=(0, 1))
        self.norm = nn.BatchNorm2d(64)
        self.last = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.strided(self.odd(self.depthwise(self.grouped(self.stem(x)))))
        return self.last(self.norm(x).mean((2, 3)))


class Deep(nn.Module):
    """Three hundred linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(300)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


BERT = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LLAMA = {**BERT, "num_key_value_heads": 1, "tie_word_embeddings": True}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
VISION = {**BERT, "image_size": 32, "patch_size": 8}
CLIP_TEXT = {**BERT, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 40, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2}

NETWORKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("hf", "BertModel", {**BERT, "max_position_embeddings": 64}, {}),
    "bert-mlm-decoder": ("hf", "BertForMaskedLM", {**BERT, "max_position_embeddings": 64}, {"include": ["cls"]}),
    "llama": ("hf", "LlamaForCausalLM", LLAMA, {}),
    "llama-head": (
        "hf", "LlamaForCausalLM", LLAMA, {"include": ["lm_head"]},
    ),
    "gpt2": ("hf", "GPT2LMHeadModel", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}, {}),
    "gpt2-embedding": ("hf", "GPT2LMHeadModel", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}, {"include": ["wte"]}),
    "t5": ("hf", "T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, {}),
    "clip": ("hf", "CLIPModel", {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 32}, {}),
    "hf-vit": ("hf", "ViTForImageClassification", {**VISION, "num_labels": 10}, {}),
    "vit": ("timm", "vit_tiny_patch16_224", VIT, {}),
    "cait": ("timm", "cait_xxs24_224", VIT, {}),
    "beit": ("timm", "beit_base_patch16_224", VIT, {}),
    "swin": (
        "timm", "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}, {},
    ),
    "swin-v2": (
        "timm", "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}, {},
    ),
    "convnext": ("timm", "convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}, {}),
    "resnet-channel": ("timm", "resnet26", RESNET, {"conv_method": "channel"}),
    "resnet-spatial": (
        "timm", "resnet26", RESNET, {"conv_method": "spatial"},
    ),
    "same-padding": (
        "timm", "tf_mobilenetv3_small_minimal_100", {},
        {"conv_method": "spatial", "include": ["conv_stem"]},
    ),
    "convolutions-channel": ("python", "Convolutions", {}, {"conv_method": "channel"}),
    "convolutions-spatial": ("python", "Convolutions", {}, {"conv_method": "spatial"}),
    "attention": ("python", "Attention", {}, {}),
    "shared": ("python", "Shared", {}, {}),
    "tied": ("python", "Tied", {}, {}),
    "raw-tie": ("python", "RawTied", {}, {}),
}  # fmt: skip


def save_network(folder: Path, library: str, name: str, arguments: dict[str, Any]) -> Source:
    """Write a network with seeded weights and return it as a source."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    if library == "hf":
        import transformers

        cls = getattr(transformers, name)
        cls(cls.config_class(**arguments)).save_pretrained(folder)
        return Source(str(folder))
    if library == "python":
        torch.save({"state_dict": globals()[name](**arguments).state_dict()}, folder / "weights.pth")
        return Source(f"{HERE}:{name}", weights=folder / "weights.pth", arch_set=arguments, allow_code=True)
    import timm

    arguments = {**arguments, "num_classes": 10}
    model = timm.create_model(name, **arguments)
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "num_classes": 10, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    return Source(str(folder))


def perceptron(folder: Path, change: Callable[[dict[str, Tensor]], Any] | None = None, **arguments: Any) -> Source:
    """Write a perceptron, its tensors changed by ``change``."""
    torch.manual_seed(0)
    state = Perceptron(**arguments).state_dict()
    save_file({**state, **(change(state) if change else {})}, folder / "p.safetensors")
    return Source(f"{HERE}:Perceptron", weights=folder / "p.safetensors", arch_set=arguments, allow_code=True)


def read(folder: Path) -> Source:
    return Source(str(folder), allow_code=True)


def ranks(report: Report) -> dict[str, Any]:
    return {row["name"]: row["rank"] for row in report.data["modules"]}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Source, Path, Report]]:
    """Decompose a network of `NETWORKS` once: its source, the artifact, the report."""
    folder, known = tmp_path_factory.mktemp("networks"), {}

    def make(name: str) -> tuple[Source, Path, Report]:
        if name not in known:
            library, architecture, arguments, options = NETWORKS[name]
            source = save_network(folder / f"{name}-base", library, architecture, arguments)
            report = decompose(source, output_dir=folder / name, ratio=0.5, **options)
            known[name] = source, folder / name, report
        return known[name]

    return make


def multiplied_out(source: Source, artifact: Path) -> Model:
    """Return the dense network with every factored weight replaced by the product of its stored factors."""
    dense = models.load(source)
    factored = models.load(read(artifact))
    for name, edit in factored.manifest.modules.items():  # type: ignore[union-attr]
        old = dense.module.get_submodule(name)
        parts = {
            key: value for key, value in factored.module.get_submodule(name).state_dict().items() if "bias" not in key
        }
        weight = lowrank.dense_weight(parts, tuple(old.weight.shape), edit["form"])  # type: ignore[arg-type, union-attr]
        old.weight = nn.Parameter(weight.detach().clone())
    return dense


@pytest.mark.parametrize("name", NETWORKS)
def test_an_artifact_computes_what_its_factors_multiply_out_to(made, name: str) -> None:
    source, artifact, report = made(name)
    assert any(ranks(report).values()), "nothing was factored"
    assert not report.warnings
    expected, found = multiplied_out(source, artifact), models.load(read(artifact))
    batch = probe(expected)
    torch.testing.assert_close(outputs(found, batch), outputs(expected, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reported_sizes_are_those_of_the_reloaded_network(made, name: str) -> None:
    _, artifact, report = made(name)
    loaded, after = models.load(read(artifact)), report.data["size"]["after"]
    assert after["parameters"] == parameters(loaded.module)
    assert after["bytes"] == sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    assert after["macs"] == costs.work(loaded).macs


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_left_dense_keep_every_bit(made, name: str) -> None:
    source, artifact, _ = made(name)
    before, after = models.load(source).module.state_dict(), models.load(read(artifact)).module.state_dict()
    for key in before.keys() & after.keys():
        assert torch.equal(before[key], after[key]), key
    factored = models.load(read(artifact)).manifest.modules  # type: ignore[union-attr]
    for key in before.keys() - after.keys():
        assert key.rpartition(".")[0] in factored or name == "shared", key


RELOAD = """
import sys, torch, peftc
from peftc.models import load as models
from peftc.models.inputs import outputs
from peftc.store.source import Source
for line in sys.stdin.read().splitlines():
    batch, expected = torch.load(line + ".pt", weights_only=True)
    found = outputs(models.load(Source(line, allow_code=True)), batch)
    print(torch.equal(found, expected), line)
"""


def test_every_artifact_moved_elsewhere_reloads_in_a_fresh_process_with_the_same_outputs(made, tmp_path: Path) -> None:
    folders = []
    for name in NETWORKS:
        folder = shutil.copytree(made(name)[1], tmp_path / name)
        loaded = models.load(read(folder))
        batch = probe(loaded)
        torch.save((batch, outputs(loaded, batch).clone()), f"{folder}.pt")
        folders.append(str(folder))
    done = forked(code=RELOAD, stdin="\n".join(folders), cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith("True")] == []
    assert len(done.stdout.splitlines()) == len(NETWORKS)


def test_torchs_attention_and_grouped_convolutions_stay_dense_and_say_why(made) -> None:
    reasons = {
        row["name"]: row["reason"]
        for name in ("attention", "convolutions-channel")
        for row in made(name)[2].data["dense"]
    }
    assert "reads the weight directly" in reasons["attention.out_proj"]
    assert "reads the weight directly" in reasons["encoder.linear1"]
    assert reasons["grouped"] == reasons["depthwise"] == "depthwise or grouped convolution"
    assert (reasons["stem"], reasons["last"]) == ("stem", "output head")


def test_a_tied_pair_is_factored_once_and_stays_tied(made) -> None:
    _, artifact, report = made("llama-head")
    module = models.load(read(artifact)).module
    assert module.lm_head.up.weight is module.model.embed_tokens.up.weight  # type: ignore[union-attr]
    assert module.lm_head.down.weight is module.model.embed_tokens.down.weight  # type: ignore[union-attr]
    stored = load_file(artifact / "model.safetensors")
    assert sum("lm_head" in name or "embed_tokens" in name for name in stored) == 2
    assert any("stay tied" in note for note in report.notes)


def test_tied_embeddings_stay_dense_by_default(made) -> None:
    _, artifact, _ = made("llama")
    module = models.load(read(artifact)).module
    assert module.lm_head.weight is module.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_shared_module_is_factored_once_and_stays_one(made) -> None:
    module = models.load(read(made("shared")[1])).module
    assert module.a is module.b and isinstance(module.a, lowrank.LowRankLinear)
    tied = models.load(read(made("tied")[1])).module
    assert tied.a.up.weight is tied.b.up.weight and tied.a.up.bias is not tied.b.up.bias  # type: ignore[union-attr]


def test_a_skip_protects_a_module_from_the_one_it_is_tied_to(made, tmp_path: Path) -> None:
    source = made("llama")[0]
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5, include=["lm_head"], skip=["embed_tokens"])
    module = models.load(tmp_path / "out").module
    assert torch.equal(module.model.embed_tokens.weight, models.load(source).module.model.embed_tokens.weight)  # type: ignore[union-attr]
    assert "lm_head" not in ranks(report)


def test_transformers_itself_refuses_a_factored_folder_loudly(made) -> None:
    import transformers

    with pytest.raises(Exception, match="peftc"):
        transformers.AutoModel.from_pretrained(made("bert")[1])


# -- the same request, another request --------------------------------------------------------------------------------


def test_the_same_request_gives_the_same_bytes_in_two_folders(made, tmp_path: Path) -> None:
    for name in ("vit", "resnet-channel", "llama-head"):
        source, artifact, _ = made(name)
        decompose(source, output_dir=tmp_path / name, ratio="1/2", **NETWORKS[name][3])
        assert promised(tmp_path / name) == promised(artifact)


def test_the_same_request_in_one_folder_is_already_done(tiny_vit: Path, tmp_path: Path) -> None:
    first = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    assert any("already done" in note for note in again.notes)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert again.data == first.data and not (tmp_path / "out.partial").exists()


def test_already_done_does_not_need_the_result_file(tiny_vit: Path, tmp_path: Path) -> None:
    first = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    (tmp_path / "out" / "result.json").unlink()
    again = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5, max_params=1)
    assert not again.passed and again.gates[0].value == first.data["size"]["after"]["parameters"]


def test_another_request_is_refused_unless_it_may_overwrite(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5)
    before = promised(tmp_path / "out")
    with pytest.raises(ArtifactError, match="another request"):
        decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.6)
    assert promised(tmp_path / "out") == before
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.6, overwrite=True)
    assert promised(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_of_the_users_own_is_never_touched(tiny_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="in the way"):
            decompose(tiny_vit, output_dir=tmp_path, ratio=0.5, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_plan_of_analyze_gives_the_same_tensors_as_its_budget(made, tmp_path: Path) -> None:
    for name in ("vit", "resnet-spatial", "resnet-channel"):
        source, artifact, _ = made(name)
        options = NETWORKS[name][3]
        analyze(source, plan=tmp_path / "plan.json", ratio=0.5, **options)
        decompose(source, output_dir=tmp_path / name, plan=tmp_path / "plan.json", **options)
        one, other = load_file(artifact / "model.safetensors"), load_file(tmp_path / name / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_dry_run_plans_the_same_and_writes_nothing(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vit", "llama-head"):
        source, _, report = made(name)
        planned = decompose(source, ratio=0.5, dry_run=True, **NETWORKS[name][3])
        assert planned.artifact is None and ranks(planned) == ranks(report)
        assert decompose(source, ratio=0.5, allocation="uniform", dry_run=True, **NETWORKS[name][3]).data["modules"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.2, "image_size": 32}),  # reads conv.stride
        (
            "ViTMAEModel",  # hides patches at random
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
             "image_size": 32, "patch_size": 8},
        ),
    ],
)  # fmt: skip
def test_networks_with_habits_of_their_own_reload(tmp_path: Path, name: str, sizes: dict[str, Any]) -> None:
    import transformers

    torch.manual_seed(0)
    network = getattr(transformers, name)
    network(network.config_class(**sizes)).save_pretrained(tmp_path / "dense")
    report = decompose(tmp_path / "dense", ratio=0.5, output_dir=tmp_path / "small", device="cpu")
    assert not report.warnings
    assert manifest.read(tmp_path / "small").modules


def test_shards_hold_the_same_tensors(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "one", ratio=0.5)
    decompose(tiny_vit, output_dir=tmp_path / "many", ratio=0.5, max_shard_size="30kB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 30_000 for shard in shards)
    one, many = models.load(tmp_path / "one").module.state_dict(), models.load(tmp_path / "many").module.state_dict()
    assert all(torch.equal(one[key], many[key]) for key in one) and one.keys() == many.keys()


def test_an_artifact_can_be_decomposed_again(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "attn", ratio=0.5, skip=["mlp"])
    with pytest.raises(UsageError, match="already factored"):
        decompose(tmp_path / "attn", output_dir=tmp_path / "no", ratio=0.5, include=["blocks.0.attn.qkv.up"])
    decompose(tmp_path / "attn", output_dir=tmp_path / "both", ratio=0.5)
    both, attn = models.load(tmp_path / "both"), models.load(tmp_path / "attn")
    assert both.manifest is not None and attn.manifest is not None
    assert {name.split(".")[2] for name in both.manifest.modules} == {"attn", "mlp"}
    assert [step["request"]["skip"] for step in both.manifest.steps] == [["mlp"], []]
    assert all(both.manifest.modules[name] == edit for name, edit in attn.manifest.modules.items())
    kept = attn.module.state_dict()
    assert all(torch.equal(kept[k], t) for k, t in both.module.state_dict().items() if ".attn." in k)
    batch = probe(both)
    expected = multiplied_out(Source(str(tiny_vit)), tmp_path / "both")
    torch.testing.assert_close(outputs(both, batch), outputs(expected, batch), rtol=1e-4, atol=1e-5)


def test_one_flipped_bit_of_an_artifact_is_noticed_before_the_next_step(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=0.5, skip=["mlp"])
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"changed after it was written.*\n.*model\.safetensors"):
        decompose(tmp_path / "out", output_dir=tmp_path / "next", ratio=0.5)
    assert not list(tmp_path.glob("next*"))


# -- what the user gave stays as it was -------------------------------------------------------------------------------


def test_a_live_network_is_copied_and_keeps_its_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Perceptron().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    decompose(network, output_dir=tmp_path / "out", ratio=0.5)
    assert network.training and isinstance(network.first, nn.Linear)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert isinstance(models.load(read(tmp_path / "out")).module.first, lowrank.LowRankLinear)


def test_a_loaded_model_is_not_changed(tiny_vit: Path, tmp_path: Path) -> None:
    model = models.load(tiny_vit)
    names = list(model.module.state_dict())
    decompose(model, output_dir=tmp_path / "one", ratio=0.5)
    assert list(model.module.state_dict()) == names
    decompose(model, output_dir=tmp_path / "two", ratio=0.5)
    assert promised(tmp_path / "one") == promised(tmp_path / "two")


def test_a_live_timm_model_keeps_its_arguments_or_is_refused_at_once(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=10)
    try:
        decompose(network, output_dir=tmp_path / "out", ratio=0.5)
    except SourceError as refusal:
        assert "live" in str(refusal)
    else:
        assert models.load(tmp_path / "out").module.blocks[0].attn.qkv.up.out_features == 96  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    "network",
    [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), Perceptron(width=80)],
    ids=["container", "arguments"],
)
def test_a_live_network_that_cannot_be_built_again_is_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="live"):
        decompose(network, output_dir=tmp_path / "out", ratio=0.5)
    assert not list(tmp_path.iterdir())


# -- weights of every kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = perceptron(tmp_path, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    dense = models.load(source).module.state_dict()
    for row in report.data["modules"]:
        name = row["name"]
        product = stored[f"{name}.up.weight"].double() @ stored[f"{name}.down.weight"].double()
        weight = dense[f"{name}.weight"].double()
        assert row["error"] == pytest.approx(float((weight - product).norm() / weight.norm()), rel=1e-3)


def test_half_weights_beside_float32_norms_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {k: t.half() if t.ndim > 1 else t for k, t in Convolutions().state_dict().items()}
    save_file(state, tmp_path / "c.safetensors")
    source = Source(f"{HERE}:Convolutions", weights=tmp_path / "c.safetensors", allow_code=True)
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["norm.running_var"].dtype == torch.float32
    assert {stored[name].dtype for name in stored if name.endswith(("up.weight", "down.weight"))} == {torch.float16}
    assert not report.warnings


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["first.weight", "last.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, bad: float) -> None:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        broken = state[name].clone()
        broken.view(-1)[3] = bad
        return {name: broken}

    with pytest.raises(WeightError, match=f"NaN or infinite numbers in `{name}`"):
        decompose(perceptron(tmp_path, change), output_dir=tmp_path / "out", ratio=0.5)
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("allocation", ["global", "energy", "uniform"])
@pytest.mark.parametrize("weight", ["zero", "rank 1", "rank 3"])
def test_weights_of_low_rank_are_exact(tmp_path: Path, weight: str, allocation: str) -> None:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        rank = {"zero": 0, "rank 1": 1, "rank 3": 3}[weight]
        low = {name: t for name, t in state.items() if t.ndim == 2 and name != "last.weight"}
        return {name: torch.randn(len(t), rank) @ torch.randn(rank, t.shape[1]) for name, t in low.items()}

    source = perceptron(tmp_path, change)
    report = decompose(source, output_dir=tmp_path / "out", ratio=0.5, allocation=allocation)
    assert all(row["error"] < 1e-5 for row in report.data["modules"])
    assert all(math.isfinite(row["error"]) for row in report.data["modules"])
    batch = probe(models.load(source))
    found, dense = models.load(read(tmp_path / "out")), models.load(source)
    torch.testing.assert_close(outputs(found, batch), outputs(dense, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_the_scale_of_a_weight_changes_no_error(tmp_path: Path, scale: float) -> None:
    plain = decompose(perceptron(tmp_path), output_dir=tmp_path / "plain", rank=8)
    source = perceptron(tmp_path, lambda state: {name: tensor * scale for name, tensor in state.items()})
    scaled = decompose(source, output_dir=tmp_path / "scaled", rank=8)
    for one, other in zip(plain.data["modules"], scaled.data["modules"], strict=True):
        assert other["error"] == pytest.approx(one["error"], rel=1e-3)


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_more_budget_is_never_worse(made) -> None:
    for name in ("vit", "resnet-channel"):
        reports = [decompose(made(name)[0], ratio=ratio, dry_run=True) for ratio in ("1/5", "2/5", 0.6, 0.8, 1)]
        kept = [report.data["size"]["after"]["parameters"] for report in reports]
        assert kept == sorted(kept) and len(set(kept)) == len(kept)
        for report, ratio in zip(reports, (0.2, 0.4, 0.6, 0.8, 1), strict=True):
            assert report.data["ratio"]["eligible"] <= ratio


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("name", ["vit", "gpt2-embedding", "llama-head", "resnet-channel", "resnet-spatial"])
def test_a_target_of_macs_is_never_exceeded(made, tmp_path: Path, name: str, allocation: str) -> None:
    source, _, report = made(name)
    target = (report.data["size"]["before"]["macs"] + 2 * report.data["size"]["after"]["macs"]) // 3
    options = NETWORKS[name][3]
    report = decompose(source, output_dir=tmp_path / "out", target_macs=target, allocation=allocation, **options)
    found = costs.work(models.load(tmp_path / "out")).macs
    assert found == report.data["size"]["after"]["macs"]
    assert found <= target


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_target_of_parameters_is_reached_within_one_rank_and_never_exceeded(made, allocation: str) -> None:
    source, _, full = made("vit")
    smallest = decompose(source, rank=1, dry_run=True).data["size"]["after"]["parameters"]
    largest = full.data["size"]["before"]["parameters"]
    step = 128 if allocation == "global" else 2 * sum({"qkv": 128, "proj": 64, "fc1": 160, "fc2": 160}.values())
    for target in range(smallest + 1, largest * 2 // 3, (largest - smallest) // 5):
        after = decompose(source, target_params=target, allocation=allocation, dry_run=True).data["size"]["after"]
        assert target - step <= after["parameters"] <= target, (target, after)


def test_a_target_out_of_reach_says_what_is(tiny_vit: Path) -> None:
    for option in ("target_params", "target_macs"):
        with pytest.raises(PlanError, match="out of reach") as caught:
            decompose(tiny_vit, dry_run=True, **{option: 10})
        assert "ask for more than" in str(caught.value)


def test_an_energy_is_kept_in_each_module_by_the_smallest_rank(tmp_path: Path) -> None:
    def steep(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t @ torch.diag(0.8 ** torch.arange(t.shape[1])) for n, t in state.items() if t.ndim == 2}

    source = perceptron(tmp_path, steep)
    report = decompose(source, output_dir=tmp_path / "out", energy=0.9)
    for row in report.data["modules"]:
        values = torch.linalg.svdvals(
            models.load(source).module.state_dict()[f"{row['name']}.weight"].double()
        ).square()
        kept = values.cumsum(0) / values.sum()
        assert kept[row["rank"] - 1] >= 0.9 > (kept[row["rank"] - 2] if row["rank"] > 1 else 0)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({}, "give exactly one budget"),
        ({"ratio": 0.5, "rank": 3}, "contradict"),
        ({"ratio": 0}, "out of range"),
        ({"ratio": 1.5}, "out of range"),
        ({"ratio": -0.5}, "out of range"),
        ({"ratio": math.nan}, "out of range"),
        ({"ratio": "half"}, "out of range"),
        ({"ratio": "1/0"}, "out of range"),
        ({"rank": 0}, "out of range"),
        ({"rank": 2.5}, "out of range"),
        ({"rank": math.nan}, "out of range"),
        ({"energy": 0}, "out of range"),
        ({"energy": math.inf}, "out of range"),
        ({"target_params": -5}, "out of range"),
        ({"ratio": 0.5, "max_shard_size": "big"}, "max-shard-size"),
        ({"ratio": 0.5, "max_shard_size": 0}, "max-shard-size"),
        ({"ratio": 0.5, "allocation": "fair"}, "allocation"),
        ({"ratio": 0.5, "method": "magic"}, "--method"),
        ({"ratio": 0.5, "conv_method": "magic"}, "--conv-method"),
        ({"ratio": 0.5, "settings": {"alpha": 1}}, "alpha"),
        ({"ratio": 0.5, "device": "tpu"}, "--device"),
        ({"ratio": 0.5, "include": ["nowhere"]}, "nowhere"),
        ({"ratio": 0.5, "skip": ["nowhere"]}, "nowhere"),
        ({"ratio": 0.5, "max_drop": 0.1}, "--data"),
        ({"ratio": 0.5, "plan": "p.json"}, "--plan"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_request_is_refused_and_writes_nothing(
    tiny_vit: Path, tmp_path: Path, budget: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError) as caught:
        decompose(tiny_vit, output_dir=tmp_path / "out", **budget)
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_ratio_one_leaves_everything_dense_and_says_so(tiny_vit: Path, tmp_path: Path) -> None:
    report = decompose(tiny_vit, output_dir=tmp_path / "out", ratio=1)
    assert not any(ranks(report).values()) and any("no module was factored" in text for text in report.warnings)
    before, after = load_file(tiny_vit / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


# -- the command line -------------------------------------------------------------------------------------------------


def test_gates_leave_the_artifact_and_end_with_3(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    for number, gate in enumerate((["--max-params", "10"], ["--max-bytes", "1kB"])):
        out = tmp_path / str(number)
        result = peftc("decompose", tiny_vit, "--ratio", 0.5, "-o", out, *gate)
        assert (result.exit_code, result.stdout) == (3, f"{out}\n"), result.stderr
        assert (out / "peftc.json").is_file() and gate[0] in result.stderr
        assert peftc("decompose", tiny_vit, "--ratio", 0.5, "-o", out, gate[0], "1G").exit_code == 0


PIPED = """
import os, subprocess, sys
from peftc.cli.app import main
tool = subprocess.Popen([sys.executable, "-m", "json.tool"], stdin=subprocess.PIPE)
os.dup2(tool.stdin.fileno(), 1)
tool.stdin.close()
try:
    main()
finally:
    sys.stdout.flush()
    os.close(1)
    assert tool.wait() == 0
"""


def test_json_of_three_hundred_modules_goes_through_a_pipe(tmp_path: Path) -> None:
    words = ["decompose", f"{HERE}:Deep", "--allow-code", "--ratio", 0.5, "-o", tmp_path / "out", "--json"]
    done = forked(*words, code=PIPED, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["modules"]) == 299
    assert "Traceback" not in done.stderr


def test_verify_notices_what_was_not_written_right(tiny_vit: Path, tmp_path: Path) -> None:
    model = models.load(tiny_vit)
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=1)
    model.module.blocks[0].attn.qkv.weight = nn.Parameter(torch.zeros(96, 32))  # type: ignore[index, union-attr]
    with pytest.raises(ArtifactError, match=r"blocks\.0\.attn\.qkv\.weight"):
        write.verify(tmp_path / "out", model)


def test_gates_judge_the_quality_on_held_out_data_and_leave_the_result_in_place(
    peftc, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    data = tmp_path / "texts"
    data.mkdir()
    rows = ["the cat sat on the mat .,negative", "a small dog ran !,neutral", "the red bird sang .,positive"]
    (data / "test.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (data / "train.csv").write_text("text,label\nthe dog sat .,negative\na cat ran !,neutral\nthe bird .,positive\n")
    words = ("decompose", tiny_bert_classifier, "--ratio", "0.5", "--data", data, "--task", "text-classification")
    met = peftc(*words, "-o", tmp_path / "one", "--max-drop", "1", "--json")
    assert met.exit_code == 0, met.stderr
    assert json.loads(met.stdout)["quality"]["metrics"]["accuracy"]["value"] >= 0
    missed = peftc(*words, "-o", tmp_path / "two", "--min-quality", "1.1")
    assert missed.exit_code == 3 and "not met" in missed.stderr
    assert (tmp_path / "two" / "peftc.json").is_file()


def test_data_of_another_task_calibrate_and_a_gate_on_them_is_refused_before_anything_is_written(
    peftc, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    data = tmp_path / "other.csv"
    data.write_text("text,label\nthe cat sat .,sport\nthe dog ran .,art\n")
    words = ["decompose", tiny_bert_classifier, "--ratio", "0.5", "--data", data]
    for gate in (["--max-drop", "0.1"], ["--method", "svd"]):
        refused = peftc(*words, *gate, "-o", tmp_path / "no")
        assert refused.exit_code == 1 and "sport" in refused.stderr
        assert not (tmp_path / "no").exists()
    done = peftc(*words, "-o", tmp_path / "yes")
    assert done.exit_code == 0 and "quality was not measured" in done.stderr


def test_a_quality_gate_without_data_is_a_wrong_command_line(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    refused = peftc("decompose", tiny_vit, "--ratio", "0.5", "--max-drop", "0.1", "-o", tmp_path / "no")
    assert refused.exit_code == 2 and "--data DATA" in refused.stderr
