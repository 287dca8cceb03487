"""import peftc.timm: `create_model` of timm builds the factors of `export --format timm`, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
import peftc.timm
from peftc.errors import SourceError
from peftc.runtimes import registry
from peftc.store import quantization
from tests.forked import forked
from tests.hub_server import Hub
from tests.networks import INPUT, RESNET, SWIN, VIT, save_timm

timm: Any = pytest.importorskip("timm")
QUICK: dict[str, Any] = {"format": "timm", "rounds": 5, "batch_size": 1}
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT, {"ratio": 0.5}),
    "vit, shared factors": ("vit_tiny_patch16_224", VIT, {"ratio": 0.5, "joint": True}),
    "convolutions": ("resnet26", {**RESNET, "num_classes": 5}, {"ratio": 0.5, "conv_method": "channel"}),
    "two halves of a convolution": ("resnet26", {**RESNET, "num_classes": 5}, {"ratio": 0.5, "conv_method": "spatial"}),
    "head as well": ("vit_tiny_patch16_224", VIT, {"ratio": 0.7, "include": ["*"]}),
    "windows": ("swin_tiny_patch4_window7_224", {**SWIN, "num_classes": 5}, {"ratio": 0.5}),
}
ENDS = {"vit_tiny_patch16_224": {"classifier": "head", "first_conv": "patch_embed.proj"}}
FRESH = """
import sys
import timm, torch
from safetensors.torch import load_file, save_file
name, place = sys.argv[1:]
try:
    timm.create_model(name, pretrained=True)
except RuntimeError as error:
    assert "import_peftc_timm" in str(error), error
else:
    raise SystemExit("it loads without the import")
import peftc.timm
network = timm.create_model(name, pretrained=True).eval()
with torch.inference_mode():
    save_file({"y": network(load_file(f"{place}/x")["x"])}, f"{place}/y")
"""


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def given(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(images())  # type: ignore[no-any-return]


def exported(kind: str, place: Path) -> tuple[Path, Path]:
    """Return an artifact of a kind and its export."""
    (place / "base").mkdir()
    architecture, arguments, how = NETWORKS[kind]
    base = save_timm(place / "base", architecture, arguments, {**INPUT, **ENDS.get(architecture, {})})
    peftc.decompose(base, output_dir=place / "small", **how)
    report = peftc.export(place / "small", output_dir=place / "out", **QUICK)
    assert report.data["deviation"] < 1e-6 and report.data["factors"] > 0
    assert report.data["runtime"].endswith("after `import peftc.timm`")
    return place / "small", place / "out"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return exported("vit, shared factors", tmp_path_factory.mktemp("vit"))


@pytest.mark.usefixtures("quick_exports")
@pytest.mark.parametrize("kind", NETWORKS)
def test_it_computes_what_peftc_does_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    small, out = exported(kind, tmp_path)
    network = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert torch.equal(given(network), given(peftc.load(small)))
    assert sum(each.numel() for each in network.parameters()) == sum(
        each.numel() for each in peftc.load(small).parameters()
    )
    sizes = {
        name: sum(each.numel() for each in load_file(f / "model.safetensors").values())
        for name, f in (("a", small), ("b", out))
    }
    assert sizes["a"] == sizes["b"], "what is shared is stored once"


def test_in_a_fresh_process_and_not_without_the_import(vit: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"x": images()}, tmp_path / "x")
    done = forked(f"local-dir:{vit[1]}", tmp_path, code=FRESH)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "y")["y"], given(peftc.load(vit[0])))


@pytest.mark.filterwarnings("ignore:Use 'content=")
def test_by_the_id_of_a_hub(hub: Hub, vit: tuple[Path, Path], tmp_path: Path) -> None:
    hub.add("me/small", {path.name: path.read_bytes() for path in vit[1].iterdir()})
    save_file({"x": images()}, tmp_path / "x")
    done = subprocess.run([sys.executable, "-c", FRESH, "hf-hub:me/small", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "y")["y"], given(peftc.load(vit[0])))


def test_it_trains_and_takes_another_head(vit: tuple[Path, Path]) -> None:
    network = timm.create_model(f"local-dir:{vit[1]}", pretrained=True, num_classes=3, drop_path_rate=0.1)
    assert network(images()).shape == (2, 3)
    network(images()).sum().backward()
    assert all(each.grad is not None for each in network.parameters())
    body = timm.create_model(f"local-dir:{vit[1]}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        assert torch.equal(
            body(images()),
            peftc.load(vit[0]).forward_head(peftc.load(vit[0]).forward_features(images()), pre_logits=True),
        )
    torch.manual_seed(0)
    fresh = timm.create_model(f"local-dir:{vit[1]}", pretrained=False)
    assert all(torch.isfinite(each).all() for each in fresh.parameters())


def test_dropped_layers(vit: tuple[Path, Path], tmp_path: Path) -> None:
    peftc.prune_layers(vit[0], drop="1", output_dir=tmp_path / "shorter", device="cpu")
    peftc.export(tmp_path / "shorter", output_dir=tmp_path / "out", **QUICK)
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(given(network), given(peftc.load(tmp_path / "shorter")))


def test_preprocessing_and_classes_are_those_of_the_model(vit: tuple[Path, Path]) -> None:
    network = timm.create_model(f"local-dir:{vit[1]}", pretrained=True)
    assert network.num_classes == 5
    assert timm.data.resolve_model_data_config(network)["mean"] == [0.5, 0.5, 0.5]


# what is refused


def test_a_second_import_changes_nothing() -> None:
    registry.register()
    assert timm.is_model(quantization.ARCHITECTURE)


def test_the_architecture_alone_is_no_network() -> None:
    with pytest.raises(SourceError, match="alone is no network"):
        timm.create_model(quantization.ARCHITECTURE)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": 3},
        {"modules": []},
        {"modules": {"no.such": {"form": "linear", "rank": 2}}},
        {"modules": {"blocks.0.attn.proj": {"form": "nothing", "rank": 2}}},
    ],
    ids=str,
)
def test_a_config_that_is_not_understood_is_refused(change: Any, vit: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((vit[1] / "config.json").read_text())
    config["model_args"]["peftc"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((vit[1] / "model.safetensors").read_bytes())
    with pytest.raises(peftc.PeftcError):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_factors_that_the_file_lacks_or_holds_otherwise_are_refused(vit: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((vit[1] / "config.json").read_bytes())
    tensors = load_file(vit[1] / "model.safetensors")
    name = next(each for each in tensors if each.endswith("down.weight"))
    for state in ({key: each for key, each in tensors.items() if key != name}, {**tensors, name: tensors[name][1:]}):
        save_file({key: each.contiguous() for key, each in state.items()}, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match="down.weight"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_folder_without_a_manifest_is_left_to_timm(vit: tuple[Path, Path]) -> None:
    with pytest.raises(SourceError, match="no `peftc.json`: timm loads it after `import peftc.timm`"):
        peftc.load(vit[1])
