"""prune-layers: the shorter network is the whole one truncated by hand, plain, and chosen as the papers say."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import peftc
from peftc.errors import ClassesError, DataError, PeftcError, PlanError, UsageError, WeightError
from peftc.methods.importance.silhouette import silhouette
from peftc.models import layers, load, shorten
from peftc.options import Reading
from peftc.pruning import scores
from peftc.store import manifest
from peftc.training import imitation, samples
from tests.conftest import TEXTS, save_images
from tests.networks import BERT, GPT2, INPUT, LLAMA, Perceptron, save_timm, save_transformers

CPU: dict[str, Any] = {"device": "cpu"}
QUICK: dict[str, Any] = {"score": "silhouette", "alpha": 0.3, **CPU}


def text_of(path: Path) -> Path:
    path.write_text("\n".join(["text", *(f'"{text}"' for text in TEXTS * 4)]))
    return path


# check 10: the shorter network


def by_hand(network: nn.Module, stack: str, kept: list[int]) -> nn.Module:
    """Cut a network's list of layers."""
    path, _, leaf = stack.rpartition(".")
    container = network.get_submodule(stack)
    left = [container[at] for at in kept]  # type: ignore[index]
    cut = nn.Sequential(*left) if isinstance(container, nn.Sequential) else nn.ModuleList(left)
    setattr(network.get_submodule(path), leaf, cut)
    for at, layer in enumerate(left):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = at
    return network


def test_a_vit_without_its_last_layers_is_the_whole_one_truncated_by_hand(vit: Path, tmp_path: Path) -> None:
    report = peftc.prune_layers(vit, drop="2,3", output_dir=tmp_path / "out", **CPU)
    made, whole = peftc.load(tmp_path / "out"), peftc.load(vit)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = whole.pos_drop(
            torch.cat([whole.cls_token.expand(2, -1, -1), whole.patch_embed(x)], 1) + whole.pos_embed
        )
        expected = whole.head(whole.norm(whole.blocks[1](whole.blocks[0](tokens)))[:, 0])
        assert torch.equal(made(x), expected)
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(x), expected)
    assert not [name for name, _ in made.named_parameters() if name.startswith(("blocks.2", "blocks.3"))]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "out", vit)]
    assert sizes[0] < 0.6 * sizes[1]
    assert report.data["size"]["after"]["parameters"] == sum(p.numel() for p in made.parameters())
    assert report.data["size"]["after"]["bytes"] == sizes[0]
    assert manifest.read(tmp_path / "out").kept_layers == ["blocks.0", "blocks.1"]


def test_layers_from_the_middle_go_too_and_the_others_move_up(vit: Path, tmp_path: Path) -> None:
    peftc.prune_layers(vit, drop=[0, 2], output_dir=tmp_path / "out", **CPU)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(peftc.load(tmp_path / "out")(x), by_hand(peftc.load(vit), "blocks", [1, 3])(x))


@pytest.mark.parametrize(
    ("name", "config", "stack"),
    [
        ("BertForSequenceClassification", {**BERT, "num_hidden_layers": 4}, "bert.encoder.layer"),
        ("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 4}, "model.layers"),
        ("GPT2LMHeadModel", {**GPT2, "n_layer": 4}, "transformer.h"),
        (
            "Qwen2ForCausalLM",
            {**LLAMA, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
            "model.layers",
        ),
    ],
)  # fmt: skip
def test_plain_transformers_load_and_compute_the_shorter_model(
    tmp_path: Path, name: str, config: dict[str, Any], stack: str
) -> None:
    (tmp_path / "base").mkdir()
    save_transformers(tmp_path / "base", name, **config)
    peftc.prune_layers(tmp_path / "base", drop="1,2", output_dir=tmp_path / "out", **CPU)
    cls = getattr(transformers, name)
    made, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    whole = by_hand(cls.from_pretrained(tmp_path / "base"), stack, [0, 3])
    ids = torch.randint(5, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    kinds = getattr(made.config, "layer_types", None)
    if kinds is not None and name == "Qwen2ForCausalLM":
        assert kinds == ["full_attention", "sliding_attention"]  # those of layers 0 and 3
    cached = {} if "Bert" in name else {"use_cache": False}
    with torch.no_grad():
        if name != "Qwen2ForCausalLM":  # cut by hand its config would still name the masks of four layers
            assert torch.equal(made.eval()(ids, **cached).logits, whole.eval()(ids, **cached).logits)
        if name.endswith("CausalLM") or "LMHead" in name:
            texts = [made.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
            assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("architecture", "arguments", "drop", "left"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "img_size": 56, "depths": (2, 2, 4, 2)}, "6,7,8,9", 6),
        ("convnext_atto", {"dims": (8, 16, 24, 32)}, "3,5,11", 9),
        ("resnet18", {"channels": [8, 16, 24, 32]}, "3,7", 6),
        ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 24, "num_heads": 2, "depth": 4}, "1,3", 2),
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 4}, "0,3", 2),
    ],
)
def test_other_networks_of_timm(
    tmp_path: Path, architecture: str, arguments: dict[str, Any], drop: str, left: int
) -> None:
    (tmp_path / "base").mkdir()
    side = arguments.get("img_size", 32)
    save_timm(
        tmp_path / "base", architecture, {**arguments, "num_classes": 5}, {**INPUT, "input_size": [3, side, side]}
    )
    peftc.prune_layers(tmp_path / "base", drop=drop, output_dir=tmp_path / "out", **CPU)
    assert len(manifest.read(tmp_path / "out").kept_layers) == left
    whole = load.load(tmp_path / "base")
    names = layers.layers(whole)
    gone = [names[int(at)] for at in drop.split(",")]
    x = torch.randn(1, 3, side, side)
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad(), layers.bypassed(whole.module, gone):
        torch.testing.assert_close(plain(x), whole.module(x), rtol=1e-5, atol=1e-7)  # where weights lie may round


def test_factored_modules_and_ties_move_with_their_layers(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_transformers(tmp_path / "base", "LlamaForCausalLM", **{**LLAMA, "num_hidden_layers": 3})
    peftc.decompose(tmp_path / "base", ratio=0.5, joint=True, output_dir=tmp_path / "small", **CPU)
    peftc.prune_layers(tmp_path / "small", drop="1", output_dir=tmp_path / "out", **CPU)
    small, out = manifest.read(tmp_path / "small"), manifest.read(tmp_path / "out")
    assert small.modules and {name for name in out.modules if ".layers.2." in name} == set()
    for name, entry in out.modules.items():
        was = name.replace(".layers.1.", ".layers.2.")
        leader = entry.get("shares", "").replace(".layers.1.", ".layers.2.")
        assert {**entry, **({"shares": leader} if leader else {})} == small.modules[was]
    assert out.tied == {alias: first for alias, first in small.tied.items() if ".layers.2." not in alias}
    ids = torch.randint(5, 30, (1, 9))
    whole = load.load(tmp_path / "small")
    with torch.no_grad(), layers.bypassed(whole.module, ["model.layers.1"]):
        assert torch.equal(peftc.load(tmp_path / "out")(ids).logits, whole.module(ids).logits)


def test_pruning_twice_remembers_the_first_names_and_distill_pairs_them(vit: Path, images: str, tmp_path: Path) -> None:
    peftc.prune_layers(vit, drop="1", output_dir=tmp_path / "three", **CPU)
    peftc.prune_layers(tmp_path / "three", drop="1", output_dir=tmp_path / "two", **CPU)
    assert manifest.read(tmp_path / "two").kept_layers == ["blocks.0", "blocks.3"]
    student, middle, base = (load.load(each) for each in (tmp_path / "two", tmp_path / "three", vit))
    assert imitation.pair(student, base) == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.3")]
    assert imitation.pair(student, middle) == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.2")]
    assert imitation.in_teacher(student, base, "blocks.1.attn.qkv") == "blocks.3.attn.qkv"
    report = peftc.distill(
        tmp_path / "two",
        data=images,
        loss="features=1",
        steps=3,
        held_out=0,
        output_dir=tmp_path / "healed",
        **CPU,
    )
    assert report.data["terms"]["features"] > 0
    assert manifest.read(tmp_path / "healed").kept_layers == ["blocks.0", "blocks.3"]


# check 9: the features


def seen(model: Path, images: str, batch_size: int = 16) -> tuple[Any, Any, scores.Seen]:
    runs = load.load(model)
    given = samples.read(runs, images, Reading(), labels=True, held_out=0)
    return runs, given, scores.see(runs, given, layers.layers(runs), batch_size)


def test_features_are_the_class_token_before_the_final_norm_in_one_pass(vit: Path, images: str) -> None:
    calls = []
    runs = load.load(vit)
    handle = runs.module.register_forward_hook(lambda *_: calls.append(1))
    given = samples.read(runs, images, Reading(), labels=True, held_out=0)
    names = layers.layers(runs)
    calls.clear()
    found = scores.see(runs, given, names, 32)
    handle.remove()
    assert len(calls) == 2 and found.pooling == "class token"
    with torch.no_grad():
        tokens = runs.module.forward_features(given.train.batch(range(60)).inputs)  # after the norm
        rows = torch.cat(found.figures["blocks.3", "features"])
        torch.testing.assert_close(runs.module.norm(rows), tokens[:, 0])
    assert not any(module.training for module in runs.module.modules())
    again = scores.see(runs, given, names, 32)
    assert all(torch.equal(torch.cat(each), torch.cat(again.figures[key])) for key, each in found.figures.items())
    assert torch.equal(torch.cat(found.labels), torch.arange(60) % 5)


def test_a_model_that_takes_means_is_scored_by_means(tmp_path: Path, images: str, tiny_bert: Path) -> None:
    (tmp_path / "beit").mkdir()
    size = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 5}
    folder = save_timm(tmp_path / "beit", "beit_base_patch16_224", size, INPUT)
    runs, given, found = seen(folder, images)
    assert found.pooling == "mean over tokens" and any("cls_token" in n for n, _ in runs.module.named_parameters())
    runs = load.load(tiny_bert)
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\n" + "a word,another,0.5\none,two,0.1\n" * 8)
    read = {"labels": False, "held_out": 0}
    given = samples.read(runs, str(tmp_path / "pairs.csv"), Reading(), **read)
    assert scores.see(runs, given, layers.layers(runs), 4).pooling == "mean over tokens"


def test_padding_counts_for_nothing() -> None:
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = scores.pooled(tokens, mask)
    torch.testing.assert_close(found, torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)]))
    assert torch.equal(scores.pooled(tokens, mask, class_token=True), tokens[:, 0])


def test_pixels_are_tokens_wherever_the_width_stands() -> None:
    value = torch.randn(2, 5, 3, 4)  # (batch, width, height, width in pixels)
    first, last = scores.tokens_of(value, False), scores.tokens_of(value.permute(0, 2, 3, 1), True)
    assert first.shape == (2, 12, 5) and torch.equal(first, last)


# the decision and what is reported


def test_the_rule_keeps_what_the_scores_say(vit: Path, images: str, tmp_path: Path) -> None:
    report = peftc.prune_layers(vit, data=images, output_dir=tmp_path / "out", plot=tmp_path / "s.svg", **QUICK)
    _, _, given = seen(vit, images, 60)
    expected = [silhouette(**given.of(f"blocks.{at}", ("features", "labels"))) for at in range(4)]
    rows = report.data["layers"]
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert report.data["threshold"] == pytest.approx(0.3 * expected[-1])
    number = sum(row["kept"] for row in rows)
    assert [row["kept"] for row in rows] == [at < number for at in range(4)]
    assert all(score >= report.data["threshold"] for score in expected[number - 1 :])
    assert len(peftc.load(tmp_path / "out").blocks) == number < 4
    assert any("nothing has trained what is left" in note for note in report.notes)
    assert report.data["quality"]["data"]["split"] == "test"
    assert "threshold" in (tmp_path / "s.svg").read_text()


def test_labels_make_the_score_that_of_sls(vit: Path, images: str) -> None:
    report = peftc.prune_layers(vit, data=images, settings={"perplexity": 10.0}, dry_run=True, **CPU)
    assert (report.data["score"], report.data["alpha"], report.artifact) == ("tsne-silhouette", 0.3, None)


def test_text_without_labels_is_scored_by_block_influence(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_transformers(tmp_path / "base", "LlamaForCausalLM", **{**LLAMA, "num_hidden_layers": 3})
    data = str(text_of(tmp_path / "texts.csv"))
    report = peftc.prune_layers(tmp_path / "base", data=data, keep=2, max_length=8, output_dir=tmp_path / "out", **CPU)
    rows = report.data["layers"]
    assert report.data["score"] == "block-influence" and report.data["pooling"] == "mean over tokens"
    assert min(row["score"] for row in rows if row["kept"]) >= max(row["score"] for row in rows if not row["kept"])
    with pytest.raises(UsageError, match="does not say how many to keep"):
        peftc.prune_layers(tmp_path / "base", data=data, max_length=8, **CPU)


def test_layers_that_change_the_shape_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_timm(tmp_path / "base", "resnet18", {"channels": [8, 16, 24, 32], "num_classes": 5}, INPUT)
    report = peftc.prune_layers(tmp_path / "base", score="magnitude", keep=1, output_dir=tmp_path / "out", **CPU)
    kept = [row["name"] for row in report.data["layers"] if row["kept"]]
    assert kept == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    with pytest.raises(PlanError, match=r"`layer2\.0` cannot be dropped"):
        peftc.prune_layers(tmp_path / "base", drop="2", **CPU)


def test_the_command_says_it_all_is_done_once_and_can_be_rebuilt(vit: Path, images: str, tmp_path: Path, peftc) -> None:
    words = ("prune-layers", vit, "--data", images, "--score", "silhouette", "--device", "cpu", "-o", tmp_path / "out")
    first = peftc(*words)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"{tmp_path / 'out'}\n"
    again = peftc(*words, "--json")
    assert again.exit_code == 0
    found = json.loads(again.stdout)
    assert any("already done" in note for note in found["notes"]) and len(found["layers"]) == 4
    lines = peftc("show", tmp_path / "out", "--commands").stdout
    said = ("peftc prune-layers", "--score silhouette", "--alpha 0.3", f"--data {images}")
    assert [words for words in said if words not in lines] == []
    assert peftc(*words, "--max-params", "10").exit_code == 3
    refused = peftc(*words[:-2], "--keep", 2, "-o", tmp_path / "out")
    assert refused.exit_code == 1 and "another request" in refused.output
    dry = peftc(*words[:-1], tmp_path / "dry", "--dry-run")
    assert dry.exit_code == 0 and not (tmp_path / "dry").exists()


# refusals


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"data": "tiny"}, DataError, "too few for t-SNE"),
        ({"data": "one-class"}, DataError, "all of one class"),
        ({"data": "single"}, DataError, "classes have one sample only"),
        ({"data": "seven"}, DataError, "class"),
        ({"data": "noise", "score": "silhouette"}, DataError, "nothing is dropped and nothing is written"),
        ({}, UsageError, "looks at what layers do with samples"),
        ({"keep": 2, "drop": "1"}, UsageError, "both given"),
        ({"keep": 5, "score": "magnitude"}, PlanError, "has 4 layers"),
        ({"drop": "x"}, UsageError, "is no list of numbers"),
        ({"drop": "9"}, PlanError, "names layer 9"),
        ({"alpha": 0.0}, UsageError, "in \\(0, 1\\]"),
        ({"score": "silhouete"}, UsageError, "unknown value"),
        ({"score": "magnitude"}, UsageError, "does not say how many to keep"),
        ({"score": "magnitude", "keep": 1, "settings": {"depth": 1}}, UsageError, "has no setting `depth`"),
        ({"drop": "1", "plot": "scores.gif"}, UsageError, "no known ending"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    vit: Path, tmp_path: Path, options: dict[str, Any], kind: type[PeftcError], message: str
) -> None:
    if "data" in options:
        number, classes, noise = {
            "tiny": (20, 5, 0.1), "one-class": (40, 1, 0.1), "single": (5, 5, 0.1), "seven": (70, 7, 0.1),
            "noise": (60, 5, 100.0),
        }[options["data"]]  # fmt: skip
        data = save_images(tmp_path / "data.npz", classes=classes, noise=noise, number=number)
        options = {**options, "data": str(data)}
    with pytest.raises(kind, match=message):
        peftc.prune_layers(vit, output_dir=tmp_path / "out", **{**CPU, **options})
    assert not (tmp_path / "out").exists()


def test_samples_of_other_classes_rank_layers_where_no_label_is_needed(vit: Path, tmp_path: Path) -> None:
    data = str(save_images(tmp_path / "images.npz", classes=3))
    with pytest.raises(ClassesError, match="`peftc finetune`, or rank layers without labels"):
        peftc.prune_layers(vit, data=data, output_dir=tmp_path / "out", **CPU)
    for options in ({"score": "taylor", "keep": 2}, {"drop": "1", "retrain": True}, {"within_drop": 0.1}):
        with pytest.raises(ClassesError, match="`peftc finetune`"):
            peftc.prune_layers(vit, data=data, output_dir=tmp_path / "out", **options, **CPU)
    assert not (tmp_path / "out").exists()
    report = peftc.prune_layers(vit, data=data, score="block-influence", keep=2, output_dir=tmp_path / "out", **CPU)
    assert any("taken without labels" in note for note in report.notes) and "quality" not in report.data


def test_nan_features_name_the_layer(vit: Path, images: str) -> None:
    network = peftc.load(vit)
    with torch.no_grad():
        network.blocks[2].attn.proj.weight[0, 0] = float("nan")
    runs = load.load(network)
    given = samples.read(runs, images, Reading(), labels=True, held_out=0)
    with pytest.raises(WeightError, match=r"`blocks\.2`.*NaN"):
        scores.see(runs, given, layers.layers(runs), 16)


class Deep(nn.Module):
    """Three layers of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_network_without_a_stack_is_refused() -> None:
    with pytest.raises(PlanError, match="has no stack of layers to prune"):
        peftc.prune_layers(Perceptron(), drop="0", **CPU)
    with pytest.raises(PlanError, match="has no stack of layers to prune"):
        peftc.prune_layers(Deep(), drop="0", **CPU)


def test_layers_of_one_container_are_counted_from_0() -> None:
    assert shorten.renumbered(["a.0", "a.3", "b.1", "2"]) == {"a.0": "a.0", "a.3": "a.1", "b.1": "b.0", "2": "0"}


def test_of_two_towers_only_named_layers_are_dropped(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="more than one stack"):
        peftc.prune_layers(tiny_clip, output_dir=tmp_path / "no", score="magnitude", keep=2)
    assert list(tmp_path.iterdir()) == []


def test_names_of_stages_in_a_config_follow_the_depth(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    folder = save_transformers(tmp_path / "dinov2", "Dinov2ForImageClassification", **sizes, num_labels=3)
    peftc.prune_layers(folder, drop="1", output_dir=tmp_path / "shorter", **CPU)
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "shorter").eval()
    assert plain.config.num_hidden_layers == 2
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x).logits, peftc.load(tmp_path / "shorter")(x).logits)
