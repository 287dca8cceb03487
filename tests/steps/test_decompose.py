"""An artifact of decompose computes what its factors multiply out to, reloads anywhere, and says what it left alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftc.errors import ArtifactError, UsageError
from peftc.measure import costs
from peftc.models import load as models
from peftc.models import write
from peftc.models.inputs import outputs, probe
from peftc.models.model import Model
from peftc.nn import lowrank
from peftc.nn.surgery import parameters
from peftc.steps.decompose import decompose
from peftc.store import manifest
from peftc.store.source import Source
from tests.forked import forked
from tests.networks import NETWORKS, ranks, read

REPOSITORY = Path(__file__).parents[2]


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


def test_verify_notices_what_was_not_written_right(tiny_vit: Path, tmp_path: Path) -> None:
    model = models.load(tiny_vit)
    decompose(tiny_vit, output_dir=tmp_path / "out", ratio=1)
    model.module.blocks[0].attn.qkv.weight = nn.Parameter(torch.zeros(96, 32))  # type: ignore[index, union-attr]
    with pytest.raises(ArtifactError, match=r"blocks\.0\.attn\.qkv\.weight"):
        write.verify(tmp_path / "out", model)
