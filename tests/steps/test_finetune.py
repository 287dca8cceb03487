"""finetune, merge and deltas: only what was asked learns, what is written reloads, and a delta knows its base."""

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc import progress
from peftc.errors import ArtifactError, DataError, PeftcError, SourceError, UsageError
from peftc.methods import registry
from peftc.methods.adapter import sara
from peftc.models import load
from peftc.nn import surgery
from peftc.nn.adapted import adapted_modules
from peftc.store import manifest
from peftc.training import journal, loop
from tests.calibration.test_memory import launch
from tests.steps.test_distill import images  # noqa: F401

SHORT: dict[str, Any] = {"steps": 6, "batch_size": 16, "device": "cpu", "learning_rate": 1e-2}
METHODS = list(registry.METHODS["adapter"])


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes."""
    import numpy as np

    random = np.random.default_rng(0)
    splits = {}
    for split, number in (("train", 60), ("test", 30)):
        labels = np.arange(number) % 3
        pixels = random.normal(size=(number, 3, 32, 32)).astype(np.float32)
        for at, label in enumerate(labels):
            pixels[at, label] += 1
        splits |= {f"x_{split}": pixels, f"y_{split}": labels}
    path = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(path, **splits)
    return path


@pytest.fixture
def base(tiny_vit: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny ViT, which a test may damage."""
    return Path(shutil.copytree(tiny_vit, tmp_path / "base"))


def tensors(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach() for name, each in surgery.tensors_of(load.load(model, **options).module).items()}


def tune(model: Any, data: Path, output: Path, **options: Any) -> Any:
    return peftc.finetune(model, output_dir=output, data=str(data), **{**SHORT, **options})


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_is_the_whole_artifact_taken_apart(base: Path, few: Path, tmp_path: Path, method: str) -> None:
    whole = tune(base, few, tmp_path / "whole", method=method)
    part = tune(base, few, tmp_path / "part", method=method, delta=True)
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "part")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.data["quality"]["metrics"] == part.data["quality"]["metrics"]
    before = load_file(base / "model.safetensors")
    held = load_file(tmp_path / "part" / "model.safetensors")
    assert "head.weight" in held and not any(".base." in name for name in held)
    if method not in ("full", "bitfit"):
        same = [name for name in one if name in before and torch.equal(one[name], before[name])]
        assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.norm1.bias"} <= set(same)
    merged = peftc.merge(tmp_path / "part", output_dir=tmp_path / "merged")
    third = tensors(merged.artifact)
    assert all(torch.equal(one[name], third[name]) for name in one)


def test_a_merged_model_is_a_plain_one_of_timm(base: Path, few: Path, tmp_path: Path) -> None:
    tune(base, few, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["num_classes"] == 3
    network = timm.create_model(config["architecture"], num_classes=3, **config["model_args"])
    network.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(image), peftc.load(tmp_path / "whole")(image))


def test_only_updates_and_the_head_learn(base: Path, few: Path, tmp_path: Path) -> None:
    report = tune(base, few, tmp_path / "part", delta=True)
    held = load_file(tmp_path / "part" / "model.safetensors")
    assert {name for name in held if ".update." not in name} == {"head.weight", "head.bias"}
    modules = list(report.data["learning"]["updates"])
    assert len(modules) == 2 * 4 and all(name.startswith("blocks.") for name in modules)
    learning = report.data["learning"]["parameters"]
    assert learning == sum(each.numel() for each in held.values())
    assert report.data["memory"]["optimizer_bytes"] == pytest.approx(8 * learning, rel=0.01)


def test_small_modules_learn_whole_and_go_on_learning_and_the_rest_is_named(
    tiny_vit: Path, few: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": "snell", "settings": {"rank": 18}, "delta": True}
    report = tune(tiny_vit, few, tmp_path / "one", **options)
    learning = report.data["learning"]
    small = [f"blocks.{at}.attn.{name}" for at in (0, 1) for name in ("qkv", "proj")]  # 32 x 32 each < 18 (32 + 32)
    assert learning["whole"] == small
    assert any("4 modules learn whole" in note and "`blocks.0.attn.proj`" in note for note in report.notes)
    assert any("not adapted: `patch_embed.proj` (" in note for note in report.notes)
    before = load_file(tiny_vit / "model.safetensors")
    one = tensors(tmp_path / "one")
    assert not torch.equal(one["blocks.0.attn.proj.weight"], before["blocks.0.attn.proj.weight"])
    assert torch.equal(one["patch_embed.proj.weight"], before["patch_embed.proj.weight"])
    assert report.data["sparsity"]["changed"] == report.data["sparsity"]["asked"]
    again = tune(tmp_path / "one", few, tmp_path / "two", **options)
    assert again.data["learning"]["whole"] == learning["whole"]
    assert again.data["learning"]["parameters"] == learning["parameters"]
    two = tensors(tmp_path / "two")
    assert not torch.equal(one["blocks.0.attn.proj.weight"], two["blocks.0.attn.proj.weight"])


def test_a_penalty_of_the_method_is_in_the_loss(
    tiny_vit: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sara, "NARROW", 16)
    settings = {"share": 0.1, "penalty": 0.5}
    report = tune(tiny_vit, few, tmp_path / "with", method="sara", settings=settings)
    assert report.data["terms"].keys() == {"task", "penalty"} and report.data["terms"]["penalty"] > 0
    assert not any("raise its weight" in note for note in report.notes)
    tune(tiny_vit, few, tmp_path / "without", method="sara", settings={**settings, "penalty": 0.0})
    one, other = (tensors(tmp_path / name)["blocks.0.mlp.fc1.weight"] for name in ("with", "without"))
    assert not torch.equal(one, other)


def test_sparsity_is_exact_in_what_is_written(base: Path, few: Path, tmp_path: Path) -> None:
    settings = {"rank": 2, "sparsity": 0.8}
    report = tune(base, few, tmp_path / "out", method="snella", settings=settings, delta=True, evaluations=6)
    found = report.data["sparsity"]
    assert found["changed"] == found["asked"] and found["changed"] / found["entries"] == pytest.approx(0.2, abs=1e-3)
    assert report.data["held_out"]["best"] == 6
    before, after = load_file(base / "model.safetensors"), tensors(tmp_path / "out")
    changed = sum(int((after[f"{name}.weight"] != before[f"{name}.weight"]).sum()) for name in found["modules"])
    assert changed <= found["changed"]  # a change may be too small for the weight that it meets
    assert changed > 0.8 * found["changed"]


def test_the_task_is_learnt(base: Path, few: Path, tmp_path: Path) -> None:
    report = tune(base, few, tmp_path / "out", steps=40)
    assert report.data["quality"]["metrics"]["top1"]["value"] > 0.8
    assert manifest.read(tmp_path / "out").labels == ["0", "1", "2"]


def test_classes_that_fit_keep_their_head_unless_a_new_one_is_asked_for(base: Path, few: Path, tmp_path: Path) -> None:
    tune(base, few, tmp_path / "first")
    tune(tmp_path / "first", few, tmp_path / "second", steps=1, learning_rate=1e-9)
    one, other = (tensors(tmp_path / name)["head.weight"] for name in ("first", "second"))
    torch.testing.assert_close(one, other)
    report = tune(tmp_path / "first", few, tmp_path / "third", steps=1, learning_rate=1e-9, head="new")
    assert not torch.allclose(tensors(tmp_path / "third")["head.weight"], one, atol=1e-3)
    assert "a new head for 3 classes" in report.notes
    with pytest.raises(DataError, match="cannot match 3 classes with a model of 10 outputs") as refused:
        tune(base, few, tmp_path / "kept", head="keep", task="image-classification")
    assert "`--head new`" in str(refused.value)
    assert not (tmp_path / "kept").exists()


def test_an_encoder_becomes_a_classifier_of_texts(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [("the cat sat on the mat .", "pets"), ("a big red tree !", "plants")] * 12
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(f"{text},{label}" for text, label in rows))
    report = peftc.finetune(
        tiny_bert, output_dir=tmp_path / "out", data=str(tmp_path / "train.csv"), delta=True, **SHORT
    )
    record = manifest.read(tmp_path / "out")
    assert record.labels == ["pets", "plants"] and record.base["architecture"] == "BertForSequenceClassification"
    assert record.delta["tensors"]["bert.embeddings.word_embeddings.weight"] == "embeddings.word_embeddings.weight"
    assert report.data["losses"][1] < report.data["losses"][0]
    whole = peftc.merge(tmp_path / "out", output_dir=tmp_path / "whole").artifact
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(whole)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, peftc.load(tmp_path / "out")(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_language_model_learns_without_a_head_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat . " * 200)
    report = peftc.finetune(
        tiny_llama, output_dir=tmp_path / "out", data=str(tmp_path / "text.txt"), max_length=16, **SHORT
    )
    assert report.data["losses"][1] < report.data["losses"][0]
    assert not any("lm_head" in name for name in report.data["learning"]["updates"])


def test_factors_are_adapted_and_keep_their_ranks(base: Path, few: Path, tmp_path: Path) -> None:
    peftc.decompose(base, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    report = tune(tmp_path / "small", few, tmp_path / "tuned", settings={"rank": 2})
    record = manifest.read(tmp_path / "tuned")
    assert record.modules == manifest.read(tmp_path / "small").modules
    assert [step["request"]["command"] for step in record.steps] == ["decompose", "finetune"]
    assert any(name.endswith(".up") for name in report.data["learning"]["updates"])
    assert report.data["merge"]["relative_deviation"] < 1e-5


def test_products_are_adapted_whole_and_merged_at_a_rank_that_is_said(base: Path, few: Path, tmp_path: Path) -> None:
    small = peftc.decompose(base, output_dir=tmp_path / "small", rank=4, device="cpu").artifact
    options: dict[str, Any] = {"on_product": True, "settings": {"rank": 2}}
    tune(small, few, tmp_path / "grown", **options)
    assert {entry["rank"] for entry in manifest.read(tmp_path / "grown").modules.values()} == {6}
    tune(small, few, tmp_path / "delta", delta=True, **options)
    one, other = tensors(tmp_path / "grown"), tensors(tmp_path / "delta")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    cut = peftc.merge(tmp_path / "delta", output_dir=tmp_path / "cut", same_rank=True)
    assert {entry["rank"] for entry in manifest.read(tmp_path / "cut").modules.values()} == {4}
    lines = peftc.show(tmp_path / "cut", commands=True).lines
    assert "--on-product" in lines[-2] and "--same-rank" in lines[-1]
    errors = cut.data["merge"]["errors"]
    for name, error in errors.items():
        whole, less = (peftc.load(tmp_path / folder).get_submodule(name).weight.detach() for folder in ("grown", "cut"))
        assert float((whole - less).norm() / whole.norm()) == pytest.approx(error, rel=1e-2, abs=1e-6)
    assert max(errors.values()) > 1e-4


def test_a_product_smaller_than_its_update_learns_by_its_factors(base: Path, few: Path, tmp_path: Path) -> None:
    peftc.decompose(base, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    report = tune(tmp_path / "small", few, tmp_path / "out", settings={"rank": 100}, on_product=True)
    assert {"blocks.0.mlp.fc1.up", "blocks.0.mlp.fc1.down"} <= report.data["learning"]["own"].keys()
    before, after = tensors(tmp_path / "small"), tensors(tmp_path / "out")
    assert all(
        not torch.equal(before[name], after[name]) for name in before if name.startswith("blocks.0.mlp.fc1.up.weight")
    )


@pytest.fixture
def delta(base: Path, few: Path, tmp_path: Path) -> Path:
    tune(base, few, tmp_path / "delta", delta=True, steps=1)
    return tmp_path / "delta"


def test_a_base_that_changed_by_one_bit_is_refused(base: Path, delta: Path) -> None:
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"not what it was[^`]*`model.safetensors` holds other bytes"):
        peftc.load(delta)


def test_a_base_that_is_gone_is_named(base: Path, delta: Path) -> None:
    base.rename(base.with_name("elsewhere"))
    with pytest.raises(SourceError, match=r"delta on `[^`]*base`, which is not there"):
        peftc.load(delta)


def test_a_delta_finds_its_base_beside_it(base: Path, delta: Path, tmp_path: Path) -> None:
    expected = tensors(delta)
    (tmp_path / "moved").mkdir()
    for folder in (base, delta):
        folder.rename(tmp_path / "moved" / folder.name)
    found = tensors(tmp_path / "moved" / "delta")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_another_base_is_refused(base: Path, delta: Path, tiny_resnet: Path) -> None:
    shutil.rmtree(base)
    shutil.copytree(tiny_resnet, base)
    with pytest.raises(ArtifactError, match="not what it was"):
        peftc.load(delta)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_running_statistics_change_only_where_their_norm_learns(
    tiny_resnet: Path, few: Path, tmp_path: Path, method: str
) -> None:
    tune(tiny_resnet, few, tmp_path / "out", method=method, delta=True)
    held = {name for name in load_file(tmp_path / "out" / "model.safetensors") if "running_mean" in name}
    before = {name for name in load_file(tiny_resnet / "model.safetensors") if "running_mean" in name}
    assert held == (before if method == "full" else set())


def test_several_deltas_share_one_base_in_one_process(base: Path, few: Path, delta: Path, tmp_path: Path) -> None:
    tune(base, few, tmp_path / "other", delta=True, steps=2, seed=1)
    network = peftc.load(base)
    image = torch.randn(2, 3, 32, 32)
    for folder in (delta, tmp_path / "other"):
        tuned = peftc.with_adapter(network, folder)
        assert tuned.blocks[0].attn.qkv.base.weight.data_ptr() == network.blocks[0].attn.qkv.weight.data_ptr()
        assert tuned.pos_embed.data_ptr() == network.pos_embed.data_ptr()
        with torch.no_grad():
            torch.testing.assert_close(tuned(image), peftc.load(folder)(image), atol=1e-5, rtol=1e-4)
    assert network(image).shape == (2, 10)
    with torch.no_grad():
        network.pos_embed.data = network.pos_embed.data + 1
    with pytest.raises(ArtifactError, match="not the base of .*\n.*`pos_embed` has other values"):
        peftc.with_adapter(network, delta)
    with pytest.raises(ArtifactError, match="is no delta"):
        peftc.with_adapter(network, peftc.merge(delta, output_dir=tmp_path / "whole").artifact)


def test_a_delta_learns_on_and_stays_on_its_base(base: Path, few: Path, delta: Path, tmp_path: Path) -> None:
    tune(delta, few, tmp_path / "on", delta=True, steps=3)
    record = manifest.read(tmp_path / "on")
    assert record.delta["files"] == manifest.read(delta).delta["files"]
    assert record.delta["source"] == manifest.read(delta).delta["source"]
    shutil.rmtree(delta)
    assert len(adapted_modules(peftc.load(tmp_path / "on", merge=False))) == 8
    with pytest.raises(UsageError, match="has updates of `lora`, and `--method` is `head`"):
        tune(tmp_path / "on", few, tmp_path / "head", method="head")


def test_a_delta_goes_on_in_the_chain(base: Path, few: Path, delta: Path, tmp_path: Path) -> None:
    peftc.decompose(delta, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    shutil.rmtree(base), shutil.rmtree(delta)
    assert peftc.load(tmp_path / "small")(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    record = manifest.read(tmp_path / "small")
    assert not record.adapters and not record.delta
    assert [step["request"]["command"] for step in record.steps] == ["finetune", "decompose"]


def test_pruning_a_delta_writes_a_smaller_delta_on_the_same_base(base: Path, delta: Path, tmp_path: Path) -> None:
    peftc.prune_layers(delta, output_dir=tmp_path / "less", drop="0", device="cpu")
    before, after = manifest.read(delta), manifest.read(tmp_path / "less")
    assert after.delta["source"] == before.delta["source"] and after.kept_layers == ["blocks.1"]
    assert after.weight_bytes < 0.6 * before.weight_bytes
    assert set(load_file(tmp_path / "less" / "model.safetensors")) == {
        name.replace("blocks.1", "blocks.0")
        for name in load_file(delta / "model.safetensors")
        if "blocks.0" not in name
    }
    peftc.prune_layers(delta, output_dir=tmp_path / "whole", drop="0", device="cpu", delta=False)
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "less")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    shutil.rmtree(delta)
    assert torch.equal(tensors(base)["blocks.1.norm1.weight"], tensors(tmp_path / "less")["blocks.0.norm1.weight"])


def test_a_delta_of_a_dense_model_is_which_layers_stay(base: Path, tmp_path: Path) -> None:
    peftc.prune_layers(base, output_dir=tmp_path / "less", drop="1", device="cpu", delta=True)
    assert not load_file(tmp_path / "less" / "model.safetensors")
    assert sum(path.stat().st_size for path in (tmp_path / "less").iterdir()) < 2**14
    peftc.prune_layers(base, output_dir=tmp_path / "whole", drop="1", device="cpu")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "less")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UsageError, match="`--repair` changes weights of the base"):
        peftc.prune_layers(base, output_dir=tmp_path / "no", drop="1", data="sklearn:digits", repair=True, delta=True)


def test_merging_what_is_whole_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="nothing to merge"):
        peftc.merge(base, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_stays_and_merging_says_what_it_costs(base: Path, few: Path, tmp_path: Path) -> None:
    path = base / "model.safetensors"
    save_file({name: each.bfloat16() for name, each in load_file(path).items()}, path, {"format": "pt"})
    report = tune(base, few, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {each.dtype for each in stored.values()} == {torch.bfloat16}
    assert report.data["merge"]["relative_deviation"] < 2e-2


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """Interrupt a training when it says that it has made a step, before anything is saved of it."""

    @contextmanager
    def sink(title: str, _total: int | None) -> Iterator[progress.Advance]:
        made = itertools.count(1)

        def advance(_detail: str = "") -> None:
            if title.startswith("training") and next(made) == step:
                raise KeyboardInterrupt

        yield advance

    progress.set_sink(sink)
    try:
        yield
    finally:
        progress.set_sink(None)


@pytest.mark.parametrize("method", ["lora", "sara"])  # the latter has held some values where they are since step 3
def test_a_killed_run_resumes_to_the_same_bytes(
    base: Path, few: Path, tmp_path: Path, monkeypatch: Any, method: str
) -> None:
    tune(base, few, tmp_path / "whole", delta=True, method=method)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    with interrupted(5), pytest.raises(KeyboardInterrupt):
        tune(base, few, tmp_path / "killed", delta=True, method=method)
    checkpoint = tmp_path / "killed.partial" / "work" / journal.CHECKPOINT
    assert checkpoint.stat().st_size < (base / "model.safetensors").stat().st_size * 2  # what is frozen is not in it
    report = tune(base, few, tmp_path / "killed", delta=True, method=method)
    assert any(note.startswith("resumed at step 4") for note in report.notes)
    for name in ("model.safetensors", "peftc.json", journal.LOG):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_two_processes_learn_what_one_does(base: Path, few: Path, tmp_path: Path) -> None:
    words = ["finetune", base, "--data", few, "--steps", 4, "--batch-size", 16, "--held-out", 0, "--delta"]
    for code, _, told in launch(*words, "-o", tmp_path / "two"):
        assert code == 0, told
    peftc.finetune(
        base, output_dir=tmp_path / "one", data=str(few), steps=4, batch_size=16, held_out=0, delta=True, device="cpu"
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "nothing"}, "nothing"),
        ({"settings": {"rnak": 4}}, "`lora` has no setting `rnak`"),
        ({"include": ["layers.*"]}, r"`--include layers.\*` matches no module"),
        ({"skip": ["heads"]}, "`--skip heads` matches no module"),
        ({"settings": {"dropout": 0.1}}, "add `--dropout`"),
        ({"head": "other"}, "--head"),
        ({"max_drop": 0.1}, "`--max-drop` needs something to compare with"),
        ({"loss": "logits=1"}, "teacher"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_left(
    base: Path, few: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(PeftcError, match=match):
        tune(base, few, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_no_numbers_are_refused_before_the_training(base: Path, few: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    state["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(state, base / "model.safetensors", {"format": "pt"})
    for step in (peftc.finetune, peftc.distill):
        with pytest.raises(PeftcError, match="`blocks.0.mlp.fc1.weight`"):
            step(base, output_dir=tmp_path / "out", data=str(few), teacher=base, steps=1, device="cpu")
    assert not list(tmp_path.glob("out*"))


def test_a_teacher_is_imitated_too(base: Path, few: Path, tmp_path: Path) -> None:
    report = tune(base, few, tmp_path / "out", teacher=base)
    assert set(report.data["terms"]) == {"features", "task"}


def test_the_command_line_writes_and_merges(peftc: Any, base: Path, few: Path, tmp_path: Path) -> None:
    done = peftc(
        "finetune",
        base,
        "--data",
        few,
        "--steps",
        2,
        "--set",
        "rank=2",
        "--delta",
        "-o",
        tmp_path / "d",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "d")
    done = peftc("merge", "-", "-o", tmp_path / "m", input=done.stdout)
    assert done.exit_code == 0 and (tmp_path / "m" / "model.safetensors").is_file()


def test_a_live_network_is_tuned_and_left_as_it_was(base: Path, few: Path, tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=3)
    before = {name: each.clone() for name, each in network.state_dict().items()}
    report = tune(network, few, tmp_path / "out", head="keep", steps=1, batch_size=4)
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())
    assert "against" in report.data["quality"]
