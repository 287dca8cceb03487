"""What calibration gives a decomposed model: corrected means, a ladder that is never silent, losses that predict."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc import Source
from peftc.calibration import collection
from peftc.calibration.prepared import Request, prepare
from peftc.methods.decompose.kfac import kfac
from peftc.models import load as models
from peftc.models.inputs import outputs
from peftc.models.place import moved, runnable
from peftc.models.targets import find_targets as eligible
from peftc.steps.decompose import decompose

HERE = "python:tests.steps.test_calibrated"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat\na dog ran in the house !\nred\nthen a big bird sang under the tree .\n" * 8)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).integers(0, 255, (13, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=rows, y_train=np.arange(13) % 10)
    return tmp_path / "images.npz"


# -- the ladder ------------------------------------------------------------------------------------------------------


def raising(*_arguments: Any, **_options: Any) -> Any:
    raise torch.linalg.LinAlgError("it did not converge")


def garbage(matrix: Tensor, **_options: Any) -> Any:
    return torch.linalg.eigvalsh(matrix), torch.linalg.qr(torch.randn(matrix.shape).to(matrix))[0]


def of_nan(matrix: Tensor, **_options: Any) -> Any:
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


FAILURES = {"raises": raising, "garbage": garbage, "NaN": of_nan}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("method", ["whitened", "kfac"])
def test_a_fall_back_is_named_in_the_warnings(
    failure: Any, method: str, peftc: Callable[..., Any], tiny_bert: Path, texts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.linalg, "eigh", failure)
    asked = ["--ratio", 0.5, "--method", method, "--data", texts, "--allocation", "uniform"]
    done = peftc("decompose", tiny_bert, "-o", tmp_path / "small", *asked)
    assert done.exit_code == 0, done.output
    assert "svd64" in done.output
    assert "eigh64" in done.output


def test_a_weight_of_dependent_columns_is_solved_and_the_fall_back_named(
    peftc: Callable[..., Any], tiny_bert: Path, texts: Path, tmp_path: Path
) -> None:
    twice = shutil.copytree(tiny_bert, tmp_path / "twice")
    state = load_file(twice / "model.safetensors")
    wide = state["encoder.layer.0.intermediate.dense.weight"]
    wide[:, 1] = wide[:, 0]
    save_file(state, twice / "model.safetensors", metadata={"format": "pt"})
    asked = ["--ratio", 0.5, "--method", "whitened", "--data", texts, "--allocation", "uniform"]
    done = peftc("decompose", twice, "-o", tmp_path / "small", *asked)
    assert done.exit_code == 0, done.output
    said = "cholesky64: the columns of its weight are too near to depending on each other; computed by eigh64 instead"
    assert f"`encoder.layer.0.intermediate.dense`: {said}" in " ".join(done.output.split())
    assert done.output.count("cholesky64") == 1


@pytest.mark.parametrize("method", ["whitened", "kfac", "asvd", "fwsvd"])
def test_a_module_that_nothing_can_solve_is_refused_by_name_and_nothing_is_written(
    method: str, peftc: Callable[..., Any], tiny_bert: Path, texts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, raising)
    asked = ["--ratio", 0.5, "--method", method, "--data", texts]
    done = peftc("decompose", tiny_bert, "-o", tmp_path / "small", *asked)
    assert done.exit_code == 1, done.output
    assert "cannot decompose `encoder.layer.0.attention.self.query`" in done.output
    assert "svd64: it did not converge" in done.output
    assert "--skip encoder.layer.0.attention.self.query" in done.output
    assert not (tmp_path / "small" / "model.safetensors").exists()


# -- bias correction -------------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """Linears on rows of 3 x 32 x 32 numbers; the second has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 40), nn.Linear(40, 24, bias=False)
        self.third, self.head = nn.Linear(24, 36), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x))).mean((1, 2))


class Convolutions(nn.Module):
    """Convolutions of all kinds of grids."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.plain = nn.Conv2d(8, 16, (3, 5), padding=(1, 2))
        self.strided = nn.Conv2d(16, 20, 3, stride=2, padding=1)
        self.circular = nn.Conv2d(20, 24, 3, padding=2, dilation=2, padding_mode="circular")
        self.point = nn.Conv2d(24, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.plain, self.strided, self.circular, self.point):
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


def stored(name: str, folder: Path) -> Source:
    torch.manual_seed(0)
    torch.save({"state_dict": globals()[name]().state_dict()}, folder / f"{name}.pth")
    preprocess = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    return Source(f"{HERE}:{name}", weights=folder / f"{name}.pth", allow_code=True, preprocess=preprocess)


def gpt2(folder: Path) -> Source:
    from tests.networks import save_transformers

    (folder / "gpt2").mkdir()
    config = {"n_positions": 64, "n_embd": 24, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    return Source(str(save_transformers(folder / "gpt2", "GPT2LMHeadModel", **config)))


def means_of(dense: Source, small: Path, data: Path, **asked: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return mean outputs of each factored module and of the dense one on the dense model's inputs, and their size."""
    prepared = prepare(models.load(dense), Request(str(data), **asked), "cpu")
    factored = runnable(models.load(Source(str(small), allow_code=True)), device="cpu")
    assert factored.manifest is not None
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in factored.manifest.modules}

    def hook(name: str) -> Callable[..., None]:
        small_module = factored.module.get_submodule(name)
        return lambda _module, inputs, output: seen[name].append(
            (
                rows(output, output.ndim == 4 and hasattr(_module, "kernel_size")),
                rows(small_module(inputs[0]), output.ndim == 4 and hasattr(_module, "kernel_size")),
            )
        )

    def rows(output: Tensor, image: bool) -> Tensor:
        return (output.movedim(1, -1) if image else output).flatten(0, -2).double()

    for name in seen:
        prepared.model.module.get_submodule(name).register_forward_hook(hook(name))
    encoded = prepared.encoded
    with torch.no_grad():
        for index in range(encoded.size):
            outputs(prepared.model, moved(prepared.model, encoded.batch([index]).inputs))
    found = {}
    for name, pairs in seen.items():
        one, other = (torch.cat(each) for each in zip(*pairs, strict=True))
        found[name] = one.mean(0), other.mean(0), float((one - other).square().mean() ** 0.5)
    return found


CASES: dict[str, tuple[Callable[[Path], Source], dict[str, Any]]] = {
    "linear": (lambda folder: stored("Linears", folder), {}),
    "channel": (lambda folder: stored("Convolutions", folder), {"conv_method": "channel"}),
    "spatial": (lambda folder: stored("Convolutions", folder), {"conv_method": "spatial"}),
    "transposed": (gpt2, {}),
}


@pytest.mark.parametrize("method", ["whitened", "kfac"])
@pytest.mark.parametrize("case", CASES)
def test_a_corrected_bias_keeps_the_mean_of_the_outputs(
    case: str, method: str, texts: Path, images: Path, tmp_path: Path
) -> None:
    make, options = CASES[case]
    source = make(tmp_path)
    data = texts if case == "transposed" else images
    asked: dict[str, Any] = {"ratio": 0.5, "method": method, "allocation": "uniform", "data": str(data), **options}
    asked["sensitivity"] = 0  # else some of the samples are kept apart
    decompose(source, output_dir=tmp_path / "with", **asked)
    decompose(source, output_dir=tmp_path / "without", bias_correction=False, **asked)
    corrected, plain = (means_of(source, tmp_path / name, data) for name in ("with", "without"))
    assert len(corrected) >= 3
    module = models.load(source).module
    without_bias = [name for name in corrected if module.get_submodule(name).bias is None]
    assert without_bias == (["second"] if case == "linear" else [])
    for name, (dense, small, error) in corrected.items():
        far = float((plain[name][0] - plain[name][1]).abs().max())
        if name in without_bias:
            assert torch.equal(small, plain[name][1])
            continue
        assert error > 1e-3
        assert far > 2e-5, name
        torch.testing.assert_close(small, dense, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", ["whitened", "kfac", "asvd", "fwsvd"])
@pytest.mark.parametrize("conv_method", ["channel", "spatial"])
def test_every_method_factors_every_convolution(method: str, conv_method: str, images: Path, tmp_path: Path) -> None:
    source = stored("Convolutions", tmp_path)
    report = decompose(
        source, output_dir=tmp_path / "small", ratio=0.6, method=method, conv_method=conv_method, data=str(images)
    )
    assert {row["name"] for row in report.data["modules"]} == {"plain", "strided", "circular", "point"}
    assert report.data["ratio"]["eligible"] <= 0.6


@pytest.mark.parametrize("correct", [True, False])
def test_the_moment_is_the_raw_one_with_and_without_a_bias_to_correct(
    correct: bool, images: Path, tmp_path: Path
) -> None:
    source = stored("Linears", tmp_path)
    asked: dict[str, Any] = {"ratio": 0.5, "method": "whitened", "allocation": "uniform", "data": str(images)}
    report = decompose(source, output_dir=tmp_path / "small", bias_correction=correct, **asked)
    losses = {row["name"]: row["loss"] for row in report.data["modules"]}
    network = models.load(source).module
    seen: dict[str, Tensor] = {}
    prepared = prepare(models.load(source), Request(str(images)), "cpu")
    for name in ("first", "second", "third"):
        prepared.model.module.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.update({name: inputs[0].flatten(0, -2).double()})
        )
    outputs(prepared.model, moved(prepared.model, prepared.encoded.batch(range(13)).inputs))
    ranks = {row["name"]: row["rank"] for row in report.data["modules"]}
    for name, x in seen.items():
        values = torch.linalg.svdvals(x @ network.get_submodule(name).weight.detach().double().T).square()  # type: ignore[union-attr, operator]
        expected = float(values[ranks[name] :].sum() / values.sum()) ** 0.5
        assert losses[name] == pytest.approx(expected, rel=1e-3, abs=1e-4)


# -- what the losses of kfac predict ---------------------------------------------------------------------------------


@pytest.mark.real
def test_half_of_the_loss_of_kfac_predicts_the_divergence_that_is_measured(data_folder: Path, tmp_path: Path) -> None:
    weights = data_folder / "weights/vit_tiny_patch16_224/model.safetensors"
    model = models.load(Source(str(weights), arch="timm:vit_tiny_patch16_224"))
    data = data_folder / "sets/imagenet_sample/imagenet_sample_150.zip"
    prepared = prepare(model, Request(str(data), samples=16), "cpu")
    every, _ = eligible(prepared.model, conv_method="channel")
    targets = {name: target for name, target in every.items() if name.split(".")[1] in ("1", "7")}
    needs = ("second_moment", "output_gradient_gram")
    known = collection.collect(prepared, targets, needs, tmp_path)
    batch = prepared.encoded.batch(range(prepared.encoded.size)).inputs
    with torch.no_grad():
        dense = outputs(prepared.model, batch).double().log_softmax(-1)
    ratios = {}
    for name in targets:
        module: Any = prepared.model.module.get_submodule(name)
        weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
        found = known.of(name, torch.device("cpu"))
        spectrum = kfac(weight, **found.of(needs))
        rank = min(weight.shape) * 2 // 3
        factors = spectrum.truncate(rank).factors
        lost = weight - factors.up @ factors.down
        with torch.no_grad():
            module.weight.copy_(weight - lost)
            module.bias.copy_(bias + lost @ found.mean.float())  # type: ignore[union-attr]
            small = outputs(prepared.model, batch).double().log_softmax(-1)
            module.weight.copy_(weight)
            module.bias.copy_(bias)
        measured = float((dense.exp() * (dense - small)).sum(-1).mean())
        ratios[name] = measured / (float(spectrum.losses()[rank]) / 2)
    assert len(ratios) == 8
    near = [name for name, ratio in ratios.items() if 1 / 4 <= ratio <= 4]
    assert len(near) >= 7, ratios
