"""On a GPU: the numbers of the CPU within tolerance, in half precision too; skipped where there is none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peftc
from peftc.data.loading import ahead
from peftc.methods import registry
from peftc.models import load
from peftc.nn import surgery
from peftc.tasks.task import Batch
from tests.conftest import TEXTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
METHODS = list(registry.METHODS["decompose"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    random = np.random.default_rng(0)
    splits = {}
    for split, number in (("train", 96), ("test", 48)):
        splits[f"x_{split}"] = random.normal(size=(number, 3, 32, 32)).astype(np.float32)
        splits[f"y_{split}"] = np.arange(number) % 10
    np.savez(path, **splits)
    return path


def products(folder: Path) -> dict[str, torch.Tensor]:
    module = peftc.load(folder)
    record = load.load(folder).manifest
    assert record is not None
    return {name: module.get_submodule(name).weight.detach() for name in record.modules}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"sequential": True}, {"joint": True}], ids=["plain", "sequential", "joint"])
def test_factors_are_those_of_the_cpu(
    method: str, options: dict[str, Any], tiny_vit: Path, images: Path, tmp_path: Path
) -> None:
    if options.get("sequential") and method in ("svd", "fwsvd"):
        pytest.skip("it asks for nothing that modules before one change")
    data = None if method == "svd" else str(images)
    for device in ("cpu", "cuda"):
        peftc.decompose(
            tiny_vit,
            output_dir=tmp_path / device,
            rank=8,
            method=method,
            data=data,
            sensitivity=0,
            device=device,
            **options,
        )
    cpu, cuda = products(tmp_path / "cpu"), products(tmp_path / "cuda")
    assert cpu.keys() == cuda.keys()
    for name, one in cpu.items():
        gap = float((one - cuda[name]).norm() / one.norm())
        assert gap < 1e-2, f"{name}: {gap}"


def test_the_default_decides_as_on_the_cpu(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    ranks = {}
    for device in ("cpu", "cuda"):
        report = peftc.decompose(
            tiny_vit, output_dir=tmp_path / device, ratio=0.5, data=str(images), sensitivity=8, device=device
        )
        ranks[device] = {row["name"]: row["rank"] or 32 for row in report.data["modules"]}
    gaps = [abs(rank - ranks["cuda"][name]) for name, rank in ranks["cpu"].items()]
    assert max(gaps) <= 2, ranks


@pytest.mark.parametrize("method", ["svd", "whitened", "kfac"])
def test_half_precision_is_calibrated_and_factored(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "half").mkdir()
    for path in tiny_llama.iterdir():
        (tmp_path / "half" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "half" / "model.safetensors"
    save_file({name: each.bfloat16() for name, each in load_file(weights).items()}, weights, metadata={"format": "pt"})
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 20))
    data = None if method == "svd" else str(tmp_path / "texts.txt")
    for device in ("cpu", "cuda"):
        peftc.decompose(
            tmp_path / "half", output_dir=tmp_path / device, rank=8, method=method, data=data, sensitivity=0,
            max_length=16, device=device,
        )  # fmt: skip
    cpu, cuda = products(tmp_path / "cpu"), products(tmp_path / "cuda")
    for name, one in cpu.items():
        assert one.dtype == torch.bfloat16
        assert float((one.float() - cuda[name].float()).norm() / one.float().norm()) < 0.1, name


def test_max_memory_streams_to_the_gpu(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    for name, limit in (("free", None), ("bound", "2GB")):
        peftc.decompose(
            tiny_vit,
            output_dir=tmp_path / name,
            rank=8,
            data=str(images),
            sensitivity=0,
            device="cuda",
            max_memory=limit,
        )
    free, bound = products(tmp_path / "free"), products(tmp_path / "bound")
    for name, one in free.items():
        torch.testing.assert_close(one, bound[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_distilling_comes_nearer_to_the_teacher(
    mixed_precision: str, tiny_vit: Path, images: Path, tmp_path: Path
) -> None:
    peftc.decompose(tiny_vit, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    report = peftc.distill(
        tmp_path / "small", output_dir=tmp_path / "out", data=str(images), steps=40, batch_size=32, device="cuda",
        loss="features=1,logits=1,perturbation=1", mixed_precision=mixed_precision,
    )  # fmt: skip
    scores = dict(report.data["held_out"]["scores"])
    assert scores[40] > scores[0]
    assert {each.dtype for each in surgery.tensors_of(load.load(tmp_path / "out").module).values()} == {torch.float32}


def test_the_losses_of_a_gpu_are_those_of_the_cpu(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    import json

    peftc.decompose(tiny_vit, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    losses = {}
    for device in ("cpu", "cuda"):
        peftc.distill(
            tmp_path / "small", output_dir=tmp_path / device, data=str(images), steps=5, held_out=0, device=device
        )
        lines = [json.loads(line) for line in (tmp_path / device / "log.jsonl").read_text().splitlines()]
        losses[device] = [line["loss"] for line in lines]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)


def test_what_is_read_ahead_lies_in_pinned_memory() -> None:
    torch.cuda.init()

    def read(key: int) -> Batch:
        return Batch({"pixel_values": torch.full((4, 3, 8, 8), float(key))}, torch.full((4,), key))

    for key, batch in enumerate(ahead(read, range(8), 2)):
        assert isinstance(batch.inputs, dict)
        assert batch.inputs["pixel_values"].is_pinned() and batch.targets.is_pinned()
        assert (batch.inputs["pixel_values"].to("cuda", non_blocking=True) == key).all()
