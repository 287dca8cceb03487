"""Fitting in order, and correcting predicted losses by measured ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftc
from peftc.calibration import collection
from peftc.calibration.prepared import Request, prepare
from peftc.errors import UsageError
from peftc.factors import sensitivity
from peftc.factors import trial as trials
from peftc.factors.factoring import Factoring
from peftc.factors.spectra import factorizer
from peftc.factors.trial import Trial
from peftc.methods.decompose.whitened import whitened
from peftc.methods.weighted import Moment
from peftc.models.load import load
from peftc.models.targets import find_targets

DATA = "sklearn:digits"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty-four random images in twelve classes' worth of labels, as tensors."""
    import numpy as np

    path = tmp_path_factory.mktemp("images") / "images.npz"
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (64, 32, 32, 3), dtype=np.uint8)
    np.savez(path, x_train=pixels, y_train=np.arange(64) % 10, x_test=pixels[:8], y_test=np.arange(8))
    return path


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def corrected(trial: Trial) -> dict[str, torch.Tensor]:
    return {name: losses * scale for name, (losses, scale) in sensitivity.alone(trial).items()}


def test_the_first_module_is_fitted_as_without_an_order(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    asked = {"ratio": 0.5, "data": str(images), "allocation": "uniform", "sensitivity": 0}
    peftc.decompose(tiny_vit, output_dir=tmp_path / "apart", **asked)
    peftc.decompose(tiny_vit, output_dir=tmp_path / "ordered", sequential=True, **asked)
    apart, ordered = factors(tmp_path / "apart"), factors(tmp_path / "ordered")
    assert apart.keys() == ordered.keys()
    products = {}
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        products[name] = [each[f"{name}.up.weight"] @ each[f"{name}.down.weight"] for each in (apart, ordered)]
    first, last = products.values()
    torch.testing.assert_close(*first, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(*last, rtol=1e-3, atol=1e-5)  # its inputs come from factored modules


def test_a_module_is_fitted_on_what_the_factored_ones_produce(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    peftc.decompose(
        tiny_vit, output_dir=tmp_path / "out", rank=4, data=str(images), method="whitened", sequential=True,
        calibration_samples=64,
    )  # fmt: skip
    made, dense = peftc.load(tmp_path / "out"), load(tiny_vit)
    seen: list[torch.Tensor] = []
    made.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    prepared = prepare(load(tiny_vit), Request(str(images), samples=64), "cpu")
    with torch.no_grad():
        made(prepared.encoded.batch(range(64)).inputs)
    rows = seen[0].flatten(0, 1).double()
    weight: torch.Tensor = dense.module.get_submodule("blocks.1.mlp.fc1").weight.detach()
    best = whitened(weight, second_moment=Moment(rows.T @ rows / len(rows))).truncate(4).factors
    fc1 = made.blocks[1].mlp.fc1
    torch.testing.assert_close(fc1.up.weight @ fc1.down.weight, best.up @ best.down, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["asvd", "whitened", "kfac"])
def test_every_method_that_looks_at_inputs_is_fitted_in_order(
    tiny_vit: Path, images: Path, tmp_path: Path, method: str
) -> None:
    for name, sequential in (("once", False), ("ordered", True)):
        peftc.decompose(
            tiny_vit, output_dir=tmp_path / name, rank=4, data=str(images), method=method, sequential=sequential
        )
    one, two = (peftc.load(tmp_path / name).blocks[1].mlp.fc2.down.weight for name in ("once", "ordered"))
    assert not torch.equal(one, two)


def test_the_same_request_gives_the_same_bytes(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        peftc.decompose(tiny_vit, output_dir=tmp_path / name, ratio=0.5, data=str(images), sequential=True)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"keep_all_ranks": True}, "cannot be combined"),
        ({"ratio": 0.5, "method": "svd"}, "needs a calibration set"),
        ({"ratio": 0.5, "method": "fwsvd"}, "needs a calibration set"),
        ({"ratio": 0.5, "joint": True}, "cannot be combined"),
    ],
)
def test_what_cannot_be_fitted_in_order_is_refused(
    extra: dict[str, object], why: str, tiny_vit: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        peftc.decompose(tiny_vit, output_dir=tmp_path / "no", data=str(images), sequential=True, **extra)
    assert not (tmp_path / "no").exists()


def test_texts_with_padding_are_fitted_in_order(tiny_bert_classifier: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.csv"
    words = ("the cat sat .", "the dog ran . the cat sat .", "dog", "the cat ran . the dog sat . the cat ran .")
    data.write_text("text\n" + "\n".join(words * 8) + "\n")
    report = peftc.decompose(
        tiny_bert_classifier, output_dir=tmp_path / "out", ratio=0.5, data=str(data), sequential=True
    )
    assert report.artifact is not None and isinstance(peftc.load(report.artifact), nn.Module)


# -- sensitivity ------------------------------------------------------------------------------------------------------


def calibrated(model: Path, images: Path, folder: Path, samples: int = 8) -> Trial:
    loaded = load(model)
    targets, reasons = find_targets(loaded, conv_method="spatial")
    by = factorizer("kfac", "spatial", None, with_data=True)
    work = Factoring(loaded, targets, by, torch.device("cpu"), reasons)
    prepared = prepare(loaded, Request(str(images), samples=64), "cpu")
    work.use(collection.collect(prepared, targets, work.factorize.needs, folder))
    return Trial(work, prepared, samples, folder)


def test_measuring_leaves_the_network_as_it_was_and_is_kept(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    trial = calibrated(tiny_vit, images, tmp_path)
    before = {name: tensor.clone() for name, tensor in trial.prepared.model.module.state_dict().items()}
    one = corrected(trial)
    after = trial.prepared.model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = (tmp_path / sensitivity.KEPT).read_text()
    two = corrected(trial)  # nothing is measured again
    assert (tmp_path / sensitivity.KEPT).read_text() == kept
    assert all(torch.equal(one[name], two[name]) for name in trial.work.targets)


def test_at_the_measured_rank_half_the_loss_is_the_measured_divergence(
    tiny_vit: Path, images: Path, tmp_path: Path
) -> None:
    from peftc.tasks.unlabelled import divergence

    trial = calibrated(tiny_vit, images, tmp_path)
    found, prepared = corrected(trial), trial.prepared
    name = "blocks.0.mlp.fc1"
    target = trial.work.targets[name]
    rank, tried = sensitivity.rank_of(target), trial.on(8, tmp_path)
    dense = [trials.outputs(prepared, batch) for batch in tried.batches]
    with trial.cut(target, trial.work.spectrum(target), rank):
        parts = [
            divergence(prepared.task, one, trials.outputs(prepared, batch), batch.inputs)
            for one, batch in zip(dense, tried.batches, strict=True)
        ]
    assert float(found[name][rank]) / 2 == pytest.approx(float(torch.cat(parts).mean()), rel=1e-6)


def test_corrected_losses_never_rise_with_the_rank(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    for losses in corrected(calibrated(tiny_vit, images, tmp_path, samples=4)).values():
        assert bool((losses.diff() <= 1e-12 * losses[0]).all())


def test_no_samples_measure_nothing(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    plain = peftc.decompose(tiny_vit, output_dir=tmp_path / "a", ratio=0.5, data=str(images), sensitivity=0)
    asked = peftc.decompose(tiny_vit, output_dir=tmp_path / "b", ratio=0.5, data=str(images))
    ranks = [[row["rank"] for row in report.data["modules"]] for report in (plain, asked)]
    assert ranks[0] != ranks[1]
