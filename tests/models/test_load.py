"""Every form of MODEL loads exactly what its files hold, or is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc.errors import ArtifactError, DataError, PeftcError, SourceError, UsageError, WeightError
from peftc.models.inputs import outputs, probe
from peftc.models.load import load, load_base
from peftc.models.place import runnable
from peftc.nn import surgery
from peftc.steps.decompose import decompose
from peftc.store.source import Source
from tests.networks import INPUT, save_timm

HERE = "python:tests.models.test_load"


class Net(nn.Module):
    """A network of the user's own, with a constructor argument."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


class Computing(nn.Module):
    """A constructor that looks at its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 8)
        self.scale = float(self.first.weight.detach().abs().max())
        start = torch.eye(16, 8)
        start.copy_(self.first.weight.detach())
        self.register_buffer("start", start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def number() -> int:
    return 3


def failing() -> nn.Module:
    raise RuntimeError("the factory's own failure")


def same(model: Any, state: dict[str, torch.Tensor]) -> bool:
    found = model.module.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


# -- forms ------------------------------------------------------------------------------------------------------------


def test_folders_of_both_libraries(tiny_vit: Path, tiny_bert: Path, tiny_llama: Path, tiny_resnet: Path) -> None:
    for folder, library, kind in (
        (tiny_vit, "timm", "image"),
        (tiny_resnet, "timm", "image"),
        (tiny_bert, "transformers", "text"),
        (tiny_llama, "transformers", "text"),
    ):
        model = load(folder)
        stored = load_file(folder / "model.safetensors")
        found = model.module.state_dict()
        assert (model.library, model.kind, model.module.training) == (library, kind, False)
        assert all(torch.equal(found[name], tensor) for name, tensor in stored.items() if name in found)
        assert outputs(model, probe(model)).isfinite().all()
        assert same(load(str(folder)), found) and load(model) is model


def test_bare_weights_with_an_architecture(tiny_vit: Path, tmp_path: Path) -> None:
    weights = shutil.copy(tiny_vit / "model.safetensors", tmp_path / "weights.safetensors")
    arguments = json.loads((tiny_vit / "config.json").read_text())["model_args"]
    source = Source(str(weights), arch="timm:vit_tiny_patch16_224", arch_set=arguments)
    assert same(load(source), load_file(weights))
    assert same(load(Source("timm:vit_tiny_patch16_224", weights=weights, arch_set=arguments)), load_file(weights))
    with pytest.raises(UsageError, match="unknown architecture"):
        load(weights)
    with pytest.raises(UsageError, match="--arch vit"):
        load(Source(str(weights), arch="vit"))
    with pytest.raises(WeightError):
        load(Source(str(weights), arch="timm:vit_tiny_patch16_224"))
    with pytest.raises(UsageError, match="does not accept"):
        load(Source(str(weights), arch="timm:vit_tiny_patch16_224", arch_set={"no_such": 1}))


def test_code_of_the_users_own(tmp_path: Path) -> None:
    assert load(f"{HERE}:Net").module.first.out_features == 16  # type: ignore[union-attr]
    assert load(Source(f"{HERE}:Net", arch_set={"width": 24})).module.first.out_features == 24  # type: ignore[union-attr]
    state = Net(24).state_dict()
    torch.save({"epoch": 3, "model": {"state_dict": {f"module.{n}": t for n, t in state.items()}}}, tmp_path / "n.pth")
    save_file(state, tmp_path / "n.safetensors")
    for name in ("n.pth", "n.safetensors"):
        source = Source(f"{HERE}:Net", arch_set={"width": 24}, weights=tmp_path / name)
        assert same(load(source), state)
    model = load(source, weights=False)
    assert all(parameter.is_meta for parameter in model.module.parameters())


def test_a_constructor_that_computes_with_its_parameters_is_built_all_the_same(tmp_path: Path) -> None:
    state = Computing().state_dict()
    save_file(state, tmp_path / "c.safetensors")
    assert same(load(Source(f"{HERE}:Computing", weights=tmp_path / "c.safetensors")), state)


@pytest.mark.parametrize(
    ("factory", "error", "text"),
    [
        ("tests.models.test_load:Nowhere", SourceError, "cannot import"),
        ("tests.unit.nowhere:Net", SourceError, "cannot import"),
        ("tests.models.test_load:number", SourceError, "returned a int"),
        ("tests.models.test_load:HERE", UsageError, "does not accept"),
        ("tests.models.test_load:failing", SourceError, "the factory's own failure"),
        ("tests.models.test_load", UsageError, "names no factory"),
        (":Net", UsageError, "names no factory"),
    ],
)
def test_a_factory_that_makes_no_network_is_refused(factory: str, error: type[PeftcError], text: str) -> None:
    with pytest.raises(error, match=text):
        load(f"python:{factory}")


def test_live_networks(tiny_vit: Path) -> None:
    module = Net().train()
    model = load(module)
    assert same(model, module.state_dict()) and model.library == "python" and model.infos == {}
    assert module.training and not model.module.training
    assert load(load(tiny_vit).module).library == "timm"


def test_artifacts_load_and_code_needs_a_word(tiny_bert: Path, tmp_path: Path) -> None:
    decompose(tiny_bert, output_dir=tmp_path / "bert", ratio=0.5)
    assert peftc.load(tmp_path / "bert")(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 32)
    torch.save(Net(48).state_dict(), tmp_path / "n.pth")
    source = Source(f"{HERE}:Net", arch_set={"width": 48}, weights=tmp_path / "n.pth")
    decompose(source, output_dir=tmp_path / "net", rank=2, include=["first"])
    (tmp_path / "n.pth").unlink()
    with pytest.raises(ArtifactError, match="needs code of yours") as caught:
        peftc.load(tmp_path / "net")
    assert "--allow-code" in str(caught.value)
    assert peftc.load(tmp_path / "net", allow_code=True).first.up.out_features == 48


def test_nothing_is_copied_from_a_safetensors_file(tiny_vit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_vit, tmp_path / "vit")
    model = load(folder)
    assert set(model.infos) == set(model.module.state_dict())
    assert {info.path for info in model.infos.values()} == {folder / "model.safetensors"}


def test_one_floating_dtype_to_run_in(tiny_vit: Path) -> None:
    half = load(tiny_vit)
    half.module.half()
    assert {p.dtype for p in runnable(half, device="cpu").module.parameters()} == {torch.float32}
    mixed = load(tiny_vit)
    mixed.module.head.double()  # type: ignore[union-attr]
    assert {p.dtype for p in runnable(mixed).module.parameters()} == {torch.float32}
    with pytest.raises(UsageError, match="--dtype"):
        runnable(mixed, dtype="float3")


# -- strict -----------------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict], dict]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


CHANGES: dict[str, tuple[Callable[[dict], dict], str]] = {
    "missing": (without("blocks.0.attn.qkv.weight"), r"1 missing: `blocks\.0\.attn\.qkv\.weight`"),
    "left over": (lambda s: {**s, "extra.weight": torch.zeros(3)}, "1 left over: `extra.weight`"),
    "renamed": (
        lambda s: {n.replace("head.weight", "hdea.weight"): t for n, t in s.items()},
        r"1 missing: `head\.weight`; 1 left over: `hdea\.weight`",
    ),
    "transposed": (lambda s: {**s, "head.weight": s["head.weight"].T.contiguous()}, r"has shape \[32, 10\]"),
    "flat": (lambda s: {**s, "head.weight": s["head.weight"].flatten()}, r"has shape \[320\]"),
    "empty": (lambda s: {"x": torch.zeros(0)}, "missing"),
}


@pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_that_do_not_fit_are_refused_by_name(
    tiny_vit: Path, tmp_path: Path, change, text: str, name: str
) -> None:
    folder = shutil.copytree(tiny_vit, tmp_path / "vit")
    state = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
    with pytest.raises(WeightError, match=text):
        load(folder)


def test_two_different_tensors_for_a_tied_pair_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    state = load_file(folder / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    module = load(folder).module
    assert module.lm_head.weight is module.model.embed_tokens.weight  # type: ignore[union-attr]
    save_file({**state, "lm_head.weight": embedding + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"`model\.embed_tokens\.weight` and `lm_head\.weight` .* differ"):
        load(folder)


def shard(folder: Path, parts: int, suffix: str) -> dict[str, Any]:
    """Split the weights of a folder into shards with an index, and return the index."""
    whole = folder / "model.safetensors"
    state = load_file(whole)
    whole.unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    where = {}
    for number in range(parts):
        name = f"{stem}-{number + 1:05d}-of-{parts:05d}.{suffix}"
        some = dict(list(state.items())[number::parts])
        (save_file if suffix == "safetensors" else torch.save)(some, folder / name)
        where.update(dict.fromkeys(some, name))
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_checkpoints_load_and_a_lacking_shard_is_named(tiny_bert: Path, tmp_path: Path, suffix: str) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "bert")
    index = shard(folder, 3, suffix)
    model = load(folder)
    assert same(model, load(tiny_bert).module.state_dict()) and len(model.files) == 3
    first = next(iter(index["weight_map"].values()))
    (folder / first).rename(folder / "elsewhere")
    with pytest.raises(SourceError, match=f"lacks the shard `{first}`"):
        load(folder)


def test_an_index_that_points_outside_or_nowhere_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "bert")
    index = shard(folder, 2, "safetensors")
    path = folder / "model.safetensors.index.json"
    name = next(iter(index["weight_map"]))
    for changed in ("../x.safetensors", "/etc/passwd", "no.safetensors", 5, ""):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: changed}}))
        with pytest.raises(PeftcError):
            load(folder)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'):
        path.write_text(text)
        with pytest.raises(PeftcError):
            load(folder)


def test_a_python_artifact_is_never_imported_to_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fresh_code.py").write_text(
        "from torch import nn\nclass N(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(32, 32), nn.Linear(32, 32))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    decompose(Source("python:fresh_code:N"), output_dir=tmp_path / "out", ratio=0.5)
    (tmp_path / "fresh_code.py").write_text("raise SystemExit('it was run')")
    import sys

    del sys.modules["fresh_code"]
    with pytest.raises(ArtifactError, match="needs code of yours"):
        load(tmp_path / "out")


def test_a_timm_folder_that_says_nothing_of_images_reads_them_as_its_architecture_does(
    tiny_vit: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_vit / "config.json").read_text())
    del config["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny_vit / "model.safetensors").read_bytes())
    assert load(tmp_path).preprocess["input_size"] == [3, 32, 32]


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("tiny_bert", {"num_hidden_layers": 10_000_000}),
        ("tiny_bert", {"max_position_embeddings": 10**9}),
        ("tiny_bert", {"intermediate_size": 10**8}),
        ("tiny_llama", {"num_hidden_layers": 10_000_000}),
        ("tiny_bert", {"num_labels": 10**9}),
        ("tiny_vit", {"depth": 10_000_000}),
        ("tiny_vit", {"img_size": 1_000_000}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_a_config_that_asks_for_far_more_than_the_weights_is_refused_before_it_is_built(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, change: dict[str, int]
) -> None:
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (config["model_args"] if model == "tiny_vit" else config).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PeftcError, match=r"the config asks for|is not read|allocate") as refusal:
        load(folder)
    assert any(character.isdigit() for character in str(refusal.value)), "the limit is named"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "its weights are quantised by `mxfp4`"),
        ({"transformers_weights": "other.safetensors"}, "names another file of weights, 'other.safetensors'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"architectures": "BertModel"}, "`architectures` is"),
        ({"architectures": ["BertTokenizer"]}, "is no model of transformers"),
        ({"id2label": ["a", "b"]}, "`id2label` is"),
        ({"id2label": {"x": "a"}}, "`id2label` is not a map from numbers to names"),
        ({"eos_token_id": "2"}, "`eos_token_id` is"),
        ({"max_position_embeddings": "64"}, "`max_position_embeddings` is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_transformers_that_is_not_understood_is_refused(
    tiny_bert: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SourceError) as refusal:
        load(folder)
    assert said in str(refusal.value)


def test_whole_numbers_in_the_place_of_weights_are_refused(tiny_vit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_vit, tmp_path / "vit")
    state = load_file(folder / "model.safetensors")
    state["head.weight"] = state["head.weight"].view(torch.int32)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"`head.weight` .* holds torch.int32; the network needs torch.float32"):
        load(folder)


def test_a_small_rest_of_a_large_network_is_built(tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    from peftc.models import skeleton

    monkeypatch.setattr(skeleton, "SMALL", 1)  # as if the network were large
    few: dict[str, Any] = {"data": "sklearn:digits", "steps": 1, "num_samples": 20, "held_out": 0, "device": "cpu"}
    peftc.finetune(tiny_vit, method="bitfit", delta=True, output_dir=tmp_path / "delta", **few)
    decompose(tiny_vit, rank=1, output_dir=tmp_path / "small")
    for name in ("delta", "small"):
        assert load(tmp_path / name).module is not None
    config = json.loads((tiny_vit / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path, weights=False).module is not None, "the weights are still on the hub"


def test_whole_numbers_of_another_size_are_refused() -> None:
    network = nn.BatchNorm1d(2)
    tensors = {**network.state_dict(), "num_batches_tracked": torch.tensor(0, dtype=torch.int32)}
    with pytest.raises(WeightError, match=r"`num_batches_tracked` .* holds torch.int32; the network needs torch.int64"):
        surgery.fill(network, tensors, tensors.__getitem__, where="file")


def test_a_file_of_float16_and_bfloat16_is_named(tiny_vit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_vit, tmp_path / "vit")
    path = folder / "model.safetensors"
    state = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(state, path)
    assert not load(folder).notes
    save_file({**state, "head.bias": state["head.bias"].view(torch.bfloat16)}, path)
    (note,) = load(folder).notes
    assert note.startswith("weights: 1 of the tensors are bfloat16, as `head.bias`, and ")


# images of another size


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch16_18x2_224", {"embed_dim": 24, "num_heads": 2, "depth": 2}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}),
        ("beit_base_patch16_224", {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}),
    ],
)
def test_position_embeddings_are_resampled_as_timm_does(
    tmp_path: Path, architecture: str, arguments: dict[str, Any]
) -> None:
    import timm

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 5}
    folder = save_timm(tmp_path, architecture, size | arguments, INPUT)
    model = load(Source(str(folder), arch_set={"img_size": 48}))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=48).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model.module(x), theirs(x))
    assert model.preprocess["input_size"] == [3, 48, 48]
    (note,) = [note for note in model.notes if "resampled" in note]
    assert "48x48 pixels" in note and "pos" in note


def test_an_artifact_of_another_size_reloads_and_knows_its_base(tiny_vit: Path, tmp_path: Path) -> None:
    source = Source(str(tiny_vit), arch_set={"img_size": 48})
    decompose(source, rank=4, output_dir=tmp_path / "small", device="cpu")
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        peftc.load(tmp_path / "small")(x)
    kept = load_file(tmp_path / "small" / "model.safetensors")["pos_embed"]
    assert torch.equal(kept, load(source).module.pos_embed)
    assert load_base(load(tmp_path / "small")).preprocess["input_size"] == [3, 48, 48]


def test_weights_that_differ_otherwise_are_still_refused(tiny_vit: Path) -> None:
    with pytest.raises(WeightError, match="has shape"):
        load(Source(str(tiny_vit), arch_set={"img_size": 48, "embed_dim": 16}))
    with pytest.raises(WeightError, match="has shape"):
        load(Source(str(tiny_vit), arch_set={"num_classes": 7}))


def test_a_size_of_images_that_a_model_does_not_read_says_what_to_type(tiny_vit: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--arch-set img_size=48") as refusal:
        peftc.evaluate(tiny_vit, data="sklearn:digits", image_size=48, num_samples=8, device="cpu")
    assert refusal.value.hint is not None
    other = Source(str(tiny_vit), arch_set={"img_size": 48})
    peftc.evaluate(other, data="sklearn:digits", num_samples=8, device="cpu")
    decompose(other, rank=4, output_dir=tmp_path / "small", device="cpu")
    with pytest.raises(DataError) as refusal:
        peftc.evaluate(tmp_path / "small", data="sklearn:digits", image_size=32, num_samples=8, device="cpu")
    assert refusal.value.hint is None, "an artifact keeps the size that it was made for"
