"""--repair: the map is the ridge regression of the gap, folded into a plain weight, and it reloads without peftc."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

import peftc
from peftc.data.tokens import sample
from peftc.errors import PlanError
from peftc.models import layers, load, shorten
from peftc.models.tokenizer import tokenizer_of
from peftc.nn import surgery
from peftc.options import Reading
from peftc.plans.depth import Asked
from peftc.pruning import closing
from peftc.pruning.asked import Work
from peftc.pruning.closing import Gap, Moments
from peftc.report import Report
from peftc.training import samples
from tests.conftest import save_images
from tests.networks import BERT, GPT2, INPUT, LLAMA, VIT, save_timm, save_transformers
from tests.steps.test_prune_layers import text_of

CPU: dict[str, Any] = {"device": "cpu"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of four layers, of which the third adds the same to every token."""
    folder = save_timm(tmp_path_factory.mktemp("constant_vit"), "vit_tiny_patch16_224", VIT, INPUT)
    weights = load_file(folder / "model.safetensors")
    for name in ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight"):
        weights[f"blocks.2.{name}"].zero_()
    weights["blocks.2.mlp.fc2.bias"] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def work(model: Path, data: Path, **settings: Any) -> Work:
    stored, runs = load.load(model), load.load(model)
    given = samples.read(runs, str(data), Reading(**settings), labels=True, held_out=0)
    return Work(stored, runs, layers.layers(runs), None, given, Asked(drop=(1,)), 16)


def changed(before: Path, after: Path, renamed: dict[str, str]) -> set[str]:
    one, other = (load_file(folder / "model.safetensors") for folder in (before, after))
    there = {next((k + n[len(v) :] for k, v in renamed.items() if n.startswith(f"{v}.")), n): n for n in other}
    return {name for name, now in there.items() if not torch.equal(one[name], other[now])}


def test_a_constant_gap_is_closed_by_a_bias_and_the_folder_is_plain(vit: Path, images: str, tmp_path: Path) -> None:
    report = peftc.prune_layers(
        vit, data=images, score="block-influence", drop="2", repair=True, output_dir=tmp_path / "out", **CPU
    )
    (row,) = report.data["repair"]
    assert (row["after"], row["layers"], row["into"]) == ("blocks.1", 1, "blocks.1.mlp.fc2")
    assert row["left"] < 1e-3
    x = torch.randn(4, 3, 32, 32)
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), peftc.load(vit)(x), atol=2e-3, rtol=1e-2)
    renamed = {"blocks.0": "blocks.0", "blocks.1": "blocks.1", "blocks.3": "blocks.2"}
    assert changed(vit, tmp_path / "out", renamed) == {"blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias"}
    assert "--repair" in peftc.show(tmp_path / "out", commands=True).lines[-1]


def gap_error(model: Path, whole: Path, images: str) -> float:
    """The squared error of the outputs on the samples that were fitted."""
    batch = work(whole, images).given.train.batch(range(60))  # type: ignore[union-attr]
    with torch.no_grad():
        return float((peftc.load(model)(batch.inputs) - peftc.load(whole)(batch.inputs)).square().mean())


def test_every_gap_is_closed_as_far_as_it_goes(tmp_path: Path, images: str) -> None:
    (tmp_path / "base").mkdir()
    base = save_timm(tmp_path / "base", "vit_tiny_patch16_224", {**VIT, "depth": 6}, INPUT)
    for name, repair in (("open", False), ("closed", True)):
        report = peftc.prune_layers(
            base, data=images, score="cka", drop="2,4,5", repair=repair, output_dir=tmp_path / name, **CPU
        )
    rows = report.data["repair"]
    assert [(row["after"], row["layers"]) for row in rows] == [("blocks.1", 1), ("blocks.3", 2)]
    assert all(row["left"] < 1 for row in rows)
    assert gap_error(tmp_path / "closed", base, images) < 0.5 * gap_error(tmp_path / "open", base, images)


def test_weights_without_bias_are_fitted_too_and_generate_with_and_without_cache(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_transformers(tmp_path / "base", "LlamaForCausalLM", **{**LLAMA, "num_hidden_layers": 4})
    data = str(text_of(tmp_path / "texts.csv"))
    report = peftc.prune_layers(
        tmp_path / "base", data=data, score="block-influence", drop="2", max_length=8, repair=True,
        output_dir=tmp_path / "out", **CPU,
    )  # fmt: skip
    assert report.data["repair"][0]["into"] == "model.layers.1.mlp.down_proj"
    assert report.data["repair"][0]["left"] < 1
    made = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(5, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    texts = [made.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)
    assert made.model.layers[1].mlp.down_proj.bias is None


@pytest.mark.parametrize(
    ("name", "config", "drop", "message"),
    [
        ("BertForSequenceClassification", BERT, "1", "is no sum that a linear module"),
        ("BertForSequenceClassification", BERT, "0", "nothing before it"),
        ("GPT2LMHeadModel", {**GPT2, "n_layer": 4}, "1", "is no sum that a linear module"),
    ],
)
def test_what_cannot_be_folded_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, config: dict[str, Any], drop: str, message: str
) -> None:
    (tmp_path / "base").mkdir()
    save_transformers(tmp_path / "base", name, **config)
    data = str(text_of(tmp_path / "texts.csv"))
    with pytest.raises(PlanError, match=message):
        peftc.prune_layers(
            tmp_path / "base", data=data, score="cka", drop=drop, max_length=8, repair=True,
            output_dir=tmp_path / "out", **CPU,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_gap_at_the_start_is_left_open_beside_one_that_is_closed(vit: Path, images: str, tmp_path: Path) -> None:
    report = peftc.prune_layers(
        vit, data=images, score="cka", drop="0,2", repair=True, output_dir=tmp_path / "out", **CPU
    )
    first, second = report.data["repair"]
    assert (first["after"], first["into"], first["why"]) == (None, None, "nothing before it reads samples")
    assert second["into"] == "blocks.1.mlp.fc2"
    table = next(table for table in report.tables if table.title == "gaps")
    assert len(table.rows) == 2


def test_gaps_are_runs_of_neighbours() -> None:
    same = dict.fromkeys("abcdefg")
    assert closing._gaps(list("abcdefg"), ["b", "e"], same) == [
        Gap(None, "a", 1), Gap("b", "d", 2), Gap("e", "g", 2)
    ]  # fmt: skip
    assert closing._gaps(list("abc"), list("abc"), same) == []
    assert closing._gaps(list("abcd"), ["a"], {"a": 1, "b": 1, "c": 2, "d": 2}) == [Gap("a", "b", 1), Gap("a", "d", 2)]


def test_only_the_class_token_counts_after_the_last_layer(vit: Path, images: str) -> None:
    done = work(vit, images)
    assert closing._tokens_that_count(done, done.runs, "blocks.3").tolist() == [True, *[False] * 16]  # type: ignore[union-attr]
    assert closing._tokens_that_count(done, done.runs, "blocks.2") is None


def test_the_place_to_fold_is_found_by_what_it_does(tmp_path: Path, images: str) -> None:
    (tmp_path / "scaled").mkdir()
    arguments = {**VIT, "init_values": 0.5}
    base = save_timm(tmp_path / "scaled", "vit_tiny_patch16_224", arguments, INPUT)
    done = work(base, images)
    found = closing._site(done.runs, "blocks.1", done)
    assert found is not None and found[0] == "blocks.1.mlp.fc2"
    torch.testing.assert_close(found[1], torch.full((32,), 0.5), atol=1e-3, rtol=0)
    (tmp_path / "conv").mkdir()
    shape = {"dims": (8, 16, 24, 32), "num_classes": 5}
    done = work(save_timm(tmp_path / "conv", "convnext_atto", shape, INPUT), images)
    assert closing._site(done.runs, done.names[1], done) is None  # its last modules are convolutions


def test_the_map_is_the_ridge_regression_and_its_error_what_it_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    t = h @ torch.randn(6, 3, dtype=torch.float64, generator=generator) + 0.1 * torch.randn(50, 3).double() + 2
    parts = [Moments(6, 3, torch.device("cpu")) for _ in range(2)]
    parts[0].add(h[:20], t[:20])
    parts[1].add(h[20:], t[20:])
    moments = parts[0].with_(parts[1])
    assert moments.rows == 50
    for shift in (True, False):
        columns = torch.cat([h, torch.ones(50, 1)], 1) if shift else h
        expected = torch.linalg.lstsq(columns, t).solution
        weight, bias = moments.solve(1e-12, shift=shift)
        torch.testing.assert_close(weight, expected[:6].T)
        torch.testing.assert_close(bias, expected[6] if shift else torch.zeros(3).double())
        left = float((h @ weight.T + bias - t).square().sum() / t.square().sum())
        assert moments.error(weight, bias) == pytest.approx(left, rel=1e-6)
    assert moments.solve(1e6, shift=False)[0].abs().max() < 1e-4  # a large ridge leaves things as they are


def test_noise_is_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    fitted, checked = (Moments(8, 2, torch.device("cpu")) for _ in range(2))
    fitted.add(torch.randn(10, 8, generator=generator), torch.randn(10, 2, generator=generator))
    assert closing._fit(fitted, checked, shift=True) is None  # nothing to check on
    checked.add(torch.randn(400, 8, generator=generator), torch.randn(400, 2, generator=generator))
    found = closing._fit(fitted, checked, shift=False)
    assert found is None or found[0] > 0.98


def test_the_whole_network_keeps_its_weights(vit: Path, images: str) -> None:
    done = work(vit, images)
    before = {name: tensor.clone() for name, tensor in surgery.tensors_of(done.stored.module).items()}
    shorter = shorten.shorten(done.stored, done.names, [done.names[at] for at in (0, 2, 3)])
    report = Report("prune-layers")
    closing.close_gaps(done, shorter, report)
    assert report.data["repair"][0]["left"] < 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in surgery.tensors_of(done.stored.module).items())
    made = shorter.model.module.get_parameter("blocks.0.mlp.fc2.weight")
    assert not torch.equal(made, before["blocks.0.mlp.fc2.weight"])


def test_a_gap_behind_a_change_of_shape_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    arguments = {"embed_dim": 24, "img_size": 56, "depths": (2, 2, 4, 2), "num_classes": 5}
    base = save_timm(tmp_path / "base", "swin_tiny_patch4_window7_224", arguments, {**INPUT, "input_size": [3, 56, 56]})
    data = str(save_images(tmp_path / "images.npz", side=56))
    options: dict[str, Any] = {"data": data, "score": "cka", "repair": True, **CPU}
    report = peftc.prune_layers(base, drop="6,7,8,9", output_dir=tmp_path / "out", **options)
    first, second = report.data["repair"]
    assert (first["after"], first["layers"], first["into"]) == (
        "layers.2.blocks.1", 2, "layers.2.blocks.1.mlp.fc2"
    )  # fmt: skip
    assert first["left"] < 1
    assert (second["after"], second["layers"], second["into"]) == ("layers.2.blocks.1", 2, None)
    assert "another stack, or gives another shape" in second["why"]


def test_factors_take_the_map_too(vit: Path, images: str, tmp_path: Path) -> None:
    peftc.decompose(vit, ratio=0.7, output_dir=tmp_path / "small", **CPU)
    report = peftc.prune_layers(
        tmp_path / "small", data=images, score="cka", drop="2", repair=True, output_dir=tmp_path / "out", **CPU
    )
    (row,) = report.data["repair"]
    assert row["into"].startswith("blocks.1.mlp.fc2") and row["left"] < 0.05
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            peftc.load(tmp_path / "out")(x), peftc.load(tmp_path / "small")(x), atol=5e-3, rtol=2e-2
        )


@pytest.mark.real
def test_the_small_llama_is_nearer_to_itself_with_its_gap_closed(data_folder: Path, tmp_path: Path) -> None:
    llama = load.load(data_folder / "weights" / "stories260K")
    drawn, tokenizer = sample(llama, 16, 128, seed=1), tokenizer_of(llama)
    text = " ".join(tokenizer.decode(drawn[at][0], skip_special_tokens=True) for at in range(len(drawn)))
    (tmp_path / "own.txt").write_text(text)
    divergence = {}
    for repair in (False, True):
        out = tmp_path / f"closed-{repair}"
        report = peftc.prune_layers(
            llama, data=str(tmp_path / "own.txt"), score="drop", keep=3, repair=repair, max_length=128, output_dir=out,
            **CPU,
        )  # fmt: skip
        found = peftc.evaluate(out, data="generated:8", against=llama, max_length=64, **CPU)
        divergence[repair] = found.data["against"]["divergence"]["value"]
        made, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and made.config.num_hidden_layers == 3
        start = torch.tensor([[1]])
        texts = [made.generate(start, max_new_tokens=32, do_sample=False, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*texts)
    assert [removal["rise"] for removal in report.data["measured"]["removals"]] == sorted(
        removal["rise"] for removal in report.data["measured"]["removals"]
    )
    assert divergence[True] < 0.85 * divergence[False]


def test_a_stack_is_not_closed_from_another(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
    save_transformers(tmp_path / "base", "T5ForConditionalGeneration", decoder_start_token_id=0, **sizes)
    stored = load.load(tmp_path / "base")
    names = layers.layers(stored)
    done = Work(stored, stored, names, None, None, Asked(drop=(2,)), 4)
    (gap,) = closing._gaps(names, [name for name in names if name != "decoder.block.0"], closing._shapes(done))
    assert gap == Gap("encoder.block.1", "decoder.block.0", 1)
    shapes = closing._shapes(done)
    assert shapes["encoder.block.1"] != shapes["decoder.block.0"]
