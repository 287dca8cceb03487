"""Statistics are what their definitions say, whatever the batches, the padding and the modules that share an input."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc.calibration import collection, lanes, statistics
from peftc.calibration.collection import Statistics
from peftc.calibration.prepared import Request, prepare
from peftc.calibration.statistics import Collector, Site
from peftc.calibration.sums import Running
from peftc.errors import WeightError
from peftc.models import inputs
from peftc.models import load as models
from peftc.models.inputs import probe
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.models.targets import find_targets as eligible
from peftc.models.weights import save_part
from peftc.nn import forms, lowrank
from peftc.plans.plan import Target
from peftc.tasks import unlabelled
from peftc.tasks.table import TASKS

CPU = torch.device("cpu")
TEXTS = [
    "the cat sat",
    "a dog ran in the house and it was very small !",
    "red",
    "then a big bird sang under the tree .",
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- running sums ----------------------------------------------------------------------------------------------------


def rows_of(offset: float, dtype: torch.dtype) -> Tensor:
    mixing = random(7, 7, seed=1, dtype=torch.float64)
    return (random(500, 7, dtype=torch.float64) @ mixing + offset * torch.arange(1, 8).double()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1.0, -1e4])
@pytest.mark.parametrize("batch", [1, 3, 128, 500])
def test_running_gives_the_mean_and_covariance_of_numpy(dtype: torch.dtype, offset: float, batch: int) -> None:
    rows = rows_of(offset, dtype)
    seen = Running.empty(7, CPU, scatter=True)
    for part in rows.split(batch):
        seen.add(part)
    assert seen.scatter is not None
    assert seen.count == 500
    assert seen.mean.dtype == seen.scatter.entries.dtype == torch.float64
    wide = rows.double().numpy()
    expected = np.cov(wide.T, bias=True)
    loose = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(seen.mean, wide.mean(0), rtol=loose, atol=loose)
    np.testing.assert_allclose(seen.covariance(), expected, rtol=0, atol=max(loose, 1e-9) * np.abs(expected).max())


@pytest.mark.parametrize("size", [127, 128, 129, 300, 1100])
def test_a_scatter_of_several_blocks_is_whole_and_symmetric(size: int) -> None:
    rows = random(90, size) @ random(size, size, seed=1) / size**0.5 + 1e3 * random(size, seed=2)
    seen, other = (Running.empty(size, CPU, scatter=True) for _ in range(2))
    for part in rows[:50].split(20):
        seen.add(part)
    other.add(rows[50:])
    seen.merge(other)
    expected = np.cov(rows.double().numpy().T, bias=True)
    np.testing.assert_allclose(seen.covariance(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(seen.covariance(), seen.covariance().T, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_lanes_of_features_with_a_mean_far_from_zero_lose_nothing(tmp_path: Path) -> None:
    rows = rows_of(1e4, torch.float64)
    paths = []
    for number, part in enumerate(rows.split([10, 240, 150, 100])):
        seen = Running.empty(7, CPU, scatter=True)
        seen.add(part)
        paths.append(tmp_path / f"{number}.safetensors")
        lanes.save(paths[-1], statistics.Sums({"one.input": seen}, samples=len(part)))
    whole = lanes.Lanes(paths, CPU).running("one.input", scatter=True)
    expected = np.cov(rows.numpy().T, bias=True)
    np.testing.assert_allclose(whole.covariance(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [(500,), (1, 499), (0, 250, 0, 250), (10, 20, 70, 400)])
def test_merging_in_any_grouping_gives_the_same(offset: float, sizes: tuple[int, ...]) -> None:
    rows = rows_of(offset, torch.float64)
    whole = Running.empty(7, CPU, scatter=True)
    whole.add(rows)
    merged = Running.empty(7, CPU, scatter=True)
    for part in rows.split(list(sizes)):
        one = Running.empty(7, CPU, scatter=True)
        one.add(part)
        merged.merge(one)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(merged.covariance(), whole.covariance(), rtol=1e-9, atol=1e-8)


# -- a network of one's own ------------------------------------------------------------------------------------------


def found_by(
    network: nn.Module,
    runs: Sequence[Any],
    needs: Sequence[str] = ("second_moment",),
    *,
    form: str = "channel",
    loss: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, Site], dict[str, Tensor]]:
    """Collect statistics of every weight of a network over some batches, with a loss of its outputs if any."""
    model: Model = models.load(network.eval())
    every = calibrate_targets(model, form)
    sites = statistics.sites(model, every, lambda: model.module(runs[0]))
    collector = Collector(model, sites, needs)
    with collector.watching() as sums:
        for batch in runs:
            with torch.set_grad_enabled(loss is not None):
                outputs = model.module(batch)
            if loss is not None:
                loss(outputs).backward()
            sums.samples += len(batch)

    def weight_of(target: Target) -> Tensor:
        return lowrank.matrix(model.module.get_submodule(target.name).weight.detach(), target.form)  # type: ignore[arg-type, union-attr]

    with tempfile.TemporaryDirectory() as folder:
        lane, part = Path(folder) / "lane.safetensors", Path(folder) / "part.safetensors"
        lanes.save(lane, sums)
        save_part(part, lanes.stored(lanes.Lanes([lane], CPU), sites, weight_of), {})
        return sites, {name: tensor.clone() for name, tensor in load_file(part).items()}


def calibrate_targets(model: Model, form: str) -> dict[str, Target]:
    return eligible(model, conv_method=form, include=["*"])[0]


def second_moment(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the covariance (d, d) of rows."""
    rows = rows.double()
    centred = rows - rows.mean(0)
    return rows.mean(0), centred.T @ centred / len(rows)


class Wide(nn.Module):
    """A narrow and a wide linear that read one tensor, and one that narrows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(6, 10), nn.Linear(6, 24)
        self.narrow = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(self.other(x))) + self.one(x)[..., :5]


def test_moments_and_magnitudes_are_those_of_the_inputs_or_of_the_outputs_before_the_bias() -> None:
    network, runs = Wide(), [random(3, 4, 6) + 2, random(1, 4, 6, seed=1) + 2]
    sites, found = found_by(network, runs, ("second_moment", "input_magnitude"))
    assert {name: (site.leader, site.side) for name, site in sites.items()} == {
        "other": ("other", "input"), "one": ("other", "input"), "narrow": ("narrow", "output"),
    }  # fmt: skip
    x = torch.cat([run.flatten(0, -2) for run in runs])
    hidden = torch.relu(network.other(x)).detach()
    mean, covariance = second_moment(x)
    torch.testing.assert_close(found["other.input.mean"], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["other.input.covariance"].double(), covariance, rtol=1e-5, atol=1e-6)
    mean, covariance = second_moment(hidden @ network.narrow.weight.detach().T)
    torch.testing.assert_close(found["narrow.output.mean"], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["narrow.output.covariance"].double(), covariance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["narrow.input.mean"], hidden.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["other.magnitude"], x.abs().double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["narrow.magnitude"], hidden.abs().double().mean(0), rtol=1e-6, atol=1e-6)
    assert "one.input.mean" not in found
    assert "narrow.input.covariance" not in found


class Again(nn.Module):
    """A linear that runs twice, and another that reads only the first of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.once = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(x) + self.twice(self.twice(x))


def test_a_module_that_reads_more_than_another_shares_no_moment_with_it() -> None:
    network, x = Again(), random(9, 6)
    sites, found = found_by(network, [x])
    assert [site.leader for site in sites.values()] == list(sites)
    both = torch.cat([x, network.twice(x).detach()])
    torch.testing.assert_close(found["once.input.covariance"].double(), second_moment(x)[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["twice.input.covariance"].double(), second_moment(both)[1], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_autograd_summed_over_positions_and_averaged_over_samples() -> None:
    network, runs = Wide(), [random(3, 4, 6), random(2, 4, 6, seed=1)]
    direction = random(4, 5, seed=2)

    def loss(outputs: Tensor) -> Tensor:
        return (outputs * direction).square().sum()

    _, found = found_by(network, runs, ("output_gradient_gram", "weight_fisher"), loss=loss)
    gram, fisher = torch.zeros(24, 24).double(), torch.zeros(6).double()
    for sample in torch.cat(runs):
        hidden = network.other(sample).detach().requires_grad_()
        loss(network.narrow(torch.relu(hidden)) + network.one(sample)[..., :5]).backward()
        assert hidden.grad is not None
        gram += (hidden.grad.T @ hidden.grad).double() / 5
        fisher += (hidden.grad.T @ sample).double().square().sum(0) / 5
    torch.testing.assert_close(found["other.gradient"], gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["other.fisher"], fisher, rtol=1e-4, atol=1e-5)


def test_a_gram_too_large_keeps_its_mean_eigenvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    network, runs = Wide(), [random(3, 4, 6)]
    needs = ["output_gradient_gram"]
    full = found_by(network, runs, needs, loss=lambda outputs: outputs.square().sum())[1]["other.gradient"]
    monkeypatch.setattr(statistics, "LARGEST_GRAM", 23)
    mean = found_by(network, runs, needs, loss=lambda outputs: outputs.square().sum())[1]["other.gradient"]
    assert mean.shape == ()
    torch.testing.assert_close(mean, full.diagonal().mean(), rtol=1e-5, atol=0.0)


class InPlace(nn.Module):
    """A convolution whose output an activation changes in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu_(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
def test_an_activation_may_change_outputs_in_place(frozen: bool) -> None:
    network = InPlace().requires_grad_(not frozen)
    x = random(2, 3, 6, 6)
    _, found = found_by(network, [x], ["output_gradient_gram"], loss=lambda outputs: outputs.sum())
    before = network.conv(x)
    ones = torch.ones(2, 10) @ network.head.weight / before[0, 0].numel()
    gradient = (ones[:, :, None, None] * (before > 0)).movedim(1, -1).flatten(0, -2).detach()
    torch.testing.assert_close(found["conv.gradient"], (gradient.T @ gradient).double() / 2, rtol=1e-4, atol=1e-7)


# -- convolutions ----------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """A stem, which is no convolution of interest, and one convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def same_padding(*arguments: Any, **keywords: Any) -> nn.Module:
    from timm.layers import Conv2dSame

    return Conv2dSame(*arguments, **keywords)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(3, 12, 3),
    "padded": lambda: nn.Conv2d(3, 12, (3, 5), padding=(1, 2)),
    "strided": lambda: nn.Conv2d(3, 12, 3, stride=(2, 3), padding=1),
    "dilated": lambda: nn.Conv2d(3, 12, (3, 2), dilation=(2, 3), padding=2),
    "1x1": lambda: nn.Conv2d(3, 12, 1),
    "1x1 strided": lambda: nn.Conv2d(3, 12, 1, stride=2),
    "1x1 padded": lambda: nn.Conv2d(3, 12, 1, padding=1, stride=2),
    "circular": lambda: nn.Conv2d(3, 12, 3, padding=1, padding_mode="circular"),
    "reflected": lambda: nn.Conv2d(3, 12, (1, 3), padding=(0, 1), padding_mode="reflect"),
    "same": lambda: nn.Conv2d(3, 12, (3, 4), padding="same"),
    "valid": lambda: nn.Conv2d(3, 12, 3, padding="valid"),
    "no bias": lambda: nn.Conv2d(3, 12, 3, bias=False),
    "Conv2dSame": lambda: same_padding(3, 12, 3, stride=2),
    "many channels": lambda: nn.Conv2d(20, 12, 3, padding=1, stride=2),
}


def padded_for(conv: Any, x: Tensor) -> Tensor:
    """Return what a convolution sees of its input."""
    if forms.pads_itself(conv):
        return forms.padded(conv, x)
    sides = [0] * 4 if conv.padding == "valid" else conv._reversed_padding_repeated_twice
    return F.pad(x, sides, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_what_a_convolution_multiplies_gives_its_own_outputs(make: Any, form: str) -> None:
    torch.manual_seed(0)
    conv: Any = make()
    x = random(3, conv.in_channels, 9, 10)
    x = torch.cat([x, 3 + x[:1]])
    outputs = conv(x).detach() - (0 if conv.bias is None else conv.bias.detach()[:, None, None])
    out, channels, kh, kw = conv.weight.shape
    form = form if (kh, kw) != (1, 1) else "channel"
    sites, found = found_by(Conv(conv), [x[:3], x[3:]], form=form)
    (site,) = sites.values()
    mean, covariance = second_moment(outputs.movedim(1, -1).flatten(0, -2))
    whole = found["conv.patch.mean"] if form == "spatial" else found["conv.input.mean"]
    torch.testing.assert_close(conv.weight.detach().flatten(1).double() @ whole, mean, rtol=1e-5, atol=1e-6)
    if form == "spatial":
        assert site.side == "input"
        padded = padded_for(conv, x)
        columns = []
        high = (padded.shape[2] - (kh - 1) * conv.dilation[0] - 1) // conv.stride[0] + 1
        for image in padded:
            for top in range(0, high * conv.stride[0], conv.stride[0]):
                for left in range(padded.shape[3]):
                    columns.append(image[:, top : top + kh * conv.dilation[0] : conv.dilation[0], left].flatten())
        mean, covariance = second_moment(torch.stack(columns))
        torch.testing.assert_close(found["conv.input.mean"], mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["conv.input.covariance"].double(), covariance, rtol=1e-4, atol=1e-5)
        return
    assert site.side == ("input" if channels * kh * kw <= out else "output")
    if site.side == "output":
        torch.testing.assert_close(found["conv.output.mean"], mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["conv.output.covariance"].double(), covariance, rtol=1e-4, atol=1e-5)
        return
    weight = conv.weight.detach().flatten(1).double()
    seen = weight @ found["conv.input.covariance"].double() @ weight.T
    torch.testing.assert_close(seen, covariance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("name", ["padded", "strided", "dilated", "Conv2dSame", "1x1 strided"])
def test_the_fisher_of_a_convolution_is_that_of_its_weight_sample_by_sample(name: str, form: str) -> None:
    torch.manual_seed(0)
    network: Any = Conv(CONVOLUTIONS[name]())
    x = random(3, 3, 9, 10)
    sites, found = found_by(
        network, [x[:1], x[1:]], ["weight_fisher"], form=form, loss=lambda outputs: outputs.square().sum()
    )
    expected = torch.zeros(network.conv.weight[0].shape).double()
    for sample in x.split(1):
        network.zero_grad()
        network(sample).square().sum().backward()
        expected += network.conv.weight.grad.double().square().sum(0) / 3
    expected = expected.sum(-1) if sites["conv"].target.form == "spatial" else expected
    torch.testing.assert_close(found["conv.fisher"], expected.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_images_weigh_alike_in_batches_of_different_sizes(form: str) -> None:
    torch.manual_seed(0)
    network = Conv(nn.Conv2d(20, 12, 3, padding=1))
    x = random(5, 20, 6, 6) + torch.arange(5).float()[:, None, None, None]
    needs = ("second_moment", "input_magnitude") if form == "spatial" else ("second_moment",)
    whole, parts = (found_by(network, x.split(size), needs, form=form)[1] for size in (5, 3))
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)


def test_convolutions_share_a_moment_only_where_they_cut_the_same_patches() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 40, 3, padding=1)
            self.strided = nn.Conv2d(3, 32, 3, padding=1, stride=2)
            self.circular = nn.Conv2d(3, 32, 3, padding=1, padding_mode="circular")

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).mean() + self.two(x).mean() + self.strided(x).mean() + self.circular(x).mean()

    sites, _ = found_by(Branches(), [random(2, 3, 8, 8)])
    leaders = {name: site.leader for name, site in sites.items()}
    assert leaders == {"one": "one", "two": "one", "strided": "strided", "circular": "circular"}


# -- models of the libraries -----------------------------------------------------------------------------------------


def sites_of(folder: Path, *, include: Sequence[str] = ()) -> dict[str, Site]:
    model = runnable(models.load(folder), device="cpu")
    found, _ = eligible(model, conv_method="spatial", include=include)
    return statistics.sites(model, found, lambda: inputs.outputs(model, probe(model)))


def test_query_key_and_value_share_one_moment_and_the_last_linear_is_seen_from_its_outputs(tiny_bert: Path) -> None:
    sites = sites_of(tiny_bert)
    for layer in range(2):
        at = f"encoder.layer.{layer}"
        leaders = {sites[f"{at}.attention.self.{name}"].leader for name in ("query", "key", "value")}
        assert leaders == {f"{at}.attention.self.query"}
        assert sites[f"{at}.attention.output.dense"].leader == f"{at}.attention.output.dense"
        assert sites[f"{at}.intermediate.dense"].side == "input"
        assert sites[f"{at}.output.dense"].side == "output"


def test_gate_and_up_share_one_moment(tiny_llama: Path) -> None:
    sites = sites_of(tiny_llama)
    for layer in range(2):
        assert sites[f"model.layers.{layer}.mlp.up_proj"].leader == f"model.layers.{layer}.mlp.gate_proj"
        assert sites[f"model.layers.{layer}.self_attn.v_proj"].leader == f"model.layers.{layer}.self_attn.q_proj"
        assert sites[f"model.layers.{layer}.mlp.down_proj"].side == "output"


def test_a_fused_projection_has_a_moment_of_its_inputs(tiny_vit: Path) -> None:
    sites = sites_of(tiny_vit)
    assert {name.split(".", 2)[2]: site.side for name, site in sites.items()} == {
        "attn.qkv": "input", "attn.proj": "input", "mlp.fc1": "input", "mlp.fc2": "output",
    }  # fmt: skip


def statistics_of(
    folder: Path | nn.Module, data: Path, out: Path, needs: Sequence[str] = statistics.STATISTICS, **asked: Any
) -> Statistics:
    include = asked.pop("include", ())
    out.mkdir(exist_ok=True)
    model = models.load(folder)
    prepared = prepare(model, Request(str(data), **asked), "cpu")
    found, _ = eligible(model, conv_method="spatial", include=include)
    return collection.collect(prepared, found, needs, out)


def tensors_of(known: Statistics) -> dict[str, Tensor]:
    return load_file(known.path)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS * 3))
    return path


@pytest.mark.parametrize("need", statistics.STATISTICS)
def test_a_method_is_handed_the_statistic_that_it_names(
    need: str, texts: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    known = statistics_of(tiny_llama, texts, tmp_path / "out", [need])
    assert known.note["modules"]
    for name in known.note["modules"]:
        assert known.of(name, torch.device("cpu")).of([need]).keys() == {need}


FAMILIES = ["tiny_bert", "tiny_bert_classifier", "tiny_bert_mlm", "tiny_llama"]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_depend_on_no_batch_size_and_on_no_padding(
    family: str, texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    alone = tensors_of(statistics_of(folder, texts, tmp_path / "alone", batch_size=1))
    for size in (3, 12):
        padded = tensors_of(statistics_of(folder, texts, tmp_path / f"by{size}", batch_size=size))
        assert padded.keys() == alone.keys()
        for name, expected in alone.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                padded[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("family", ["tiny_bert_classifier", "tiny_llama"])
def test_the_same_request_gives_the_same_bytes(
    family: str, texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    one, other = (statistics_of(folder, texts, tmp_path / name) for name in ("one", "other"))
    assert one.path.read_bytes() == other.path.read_bytes()
    third = statistics_of(folder, texts, tmp_path / "third", seed=1)
    assert third.path.read_bytes() != one.path.read_bytes()


def test_outputs_that_are_not_numbers_are_refused(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_bert, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["encoder.layer.1.output.LayerNorm.weight"].fill_(torch.nan)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    for needs in (["second_moment"], ["output_gradient_gram"]):
        with pytest.raises(WeightError, match="gives NaN or infinite outputs on the calibration set"):
            statistics_of(broken, texts, tmp_path / needs[0], needs)


def test_embeddings_are_seen_from_what_they_look_up(tmp_path: Path, texts: Path) -> None:
    from tests.networks import BERT, save_transformers

    narrow = save_transformers(tmp_path, "BertModel", **{**BERT, "hidden_size": 8})
    needs = ("second_moment", "output_gradient_gram")
    known = statistics_of(narrow, texts, tmp_path / "s", needs, include=["embeddings.word_embeddings"])
    about = known.note["modules"]["embeddings.word_embeddings"]
    assert (about["side"], about["lookup"], about["width"]) == ("output", True, 8)
    found = known.of("embeddings.word_embeddings", CPU)
    model = models.load(narrow)
    encoded = prepare(model, Request(str(texts)), "cpu").encoded
    ids = torch.cat([encoded.batch([index]).inputs["input_ids"].flatten() for index in range(encoded.size)])
    mean, covariance = second_moment(model.module.embeddings.word_embeddings.weight.detach()[ids])  # type: ignore[union-attr, index]
    assert about["rows"] == len(ids)
    torch.testing.assert_close(found.output_mean, mean, rtol=1e-5, atol=1e-7)
    assert found.covariance is not None
    torch.testing.assert_close(found.covariance.double(), covariance, rtol=1e-5, atol=1e-8)
    assert found.others["output_gradient_gram"].shape == (8, 8)


def test_of_a_tied_pair_the_output_head_is_watched(tiny_llama: Path, texts: Path, tmp_path: Path) -> None:
    known = statistics_of(tiny_llama, texts, tmp_path / "s", include=["model.embed_tokens", "lm_head"])
    about = known.note["modules"]["model.embed_tokens"]
    assert not about["lookup"]
    found = known.of("model.embed_tokens", CPU)
    assert found.mean is not None
    assert found.mean.shape == (32,)
    assert found.others["output_gradient_gram"].shape[0] == models.load(tiny_llama).module.lm_head.out_features  # type: ignore[union-attr]


def test_a_module_that_no_gradient_reaches_is_left_out_of_what_needs_one(
    tiny_bert: Path, texts: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"include": ["pooler.dense"]}
    assert "pooler.dense" in statistics_of(tiny_bert, texts, tmp_path / "one", ["second_moment"], **asked)
    both = ["second_moment", "output_gradient_gram"]
    assert "pooler.dense" not in statistics_of(tiny_bert, texts, tmp_path / "other", both, **asked)


def test_transposed_weights_of_gpt2_are_seen_as_linears(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    network: Any = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(30, (3, 8), generator=torch.Generator().manual_seed(0))
    inputs: list[Tensor] = []
    network.transformer.h[0].mlp.c_fc.register_forward_pre_hook(lambda _m, given: inputs.append(given[0].detach()))
    model = models.load(network)
    targets, _ = eligible(model, conv_method="spatial")
    sites = statistics.sites(model, targets, lambda: model.module(ids))
    assert statistics.matrix_shape(targets["transformer.h.0.mlp.c_fc"]) == (64, 16)
    assert sites["transformer.h.0.mlp.c_proj"].side == "output"
    collector = Collector(model, sites, ["second_moment"])
    with torch.no_grad(), collector.watching() as sums:
        model.module(ids)
    seen = sums.running["transformer.h.0.mlp.c_fc.input"]
    network(ids)
    mean, covariance = second_moment(inputs[-1].flatten(0, -2))
    torch.testing.assert_close(seen.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.covariance(), covariance, rtol=1e-5, atol=1e-6)


# -- the loss towards the model's own prediction ---------------------------------------------------------------------


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 1000 + index) for index in range(count)]


def test_drawn_labels_give_the_fisher_information_of_a_softmax() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 20_000
    scores = chances.log().expand(draws, 4).clone().requires_grad_()
    task = TASKS["image-classification"]
    unlabelled.loss_of_own_prediction(task, scores, torch.zeros(draws, 1), generators(draws)).backward()
    assert scores.grad is not None
    exact = torch.diag(chances) - torch.outer(chances, chances)
    torch.testing.assert_close(scores.grad.T @ scores.grad / draws, exact, rtol=0.0, atol=0.01)
    torch.testing.assert_close(scores.grad.mean(0), torch.zeros(4), rtol=0.0, atol=0.015)


def test_vectors_are_read_as_gaussians() -> None:
    draws = 20_000
    outputs = torch.zeros(draws, 3, requires_grad=True)
    unlabelled.loss_of_own_prediction(None, outputs, torch.zeros(draws, 1), generators(draws)).backward()
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad.T @ outputs.grad / draws, torch.eye(3), rtol=0.0, atol=0.04)


def test_padding_takes_no_part_and_no_sample_changes_what_another_draws() -> None:
    task = TASKS["causal-lm"]
    scores = random(3, 5, 7)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0

    def gradient(scores: Tensor, mask: Tensor, which: Sequence[int]) -> Tensor:
        leaf = scores.clone().requires_grad_()
        own = [generators(3)[index] for index in which]
        unlabelled.loss_of_own_prediction(task, leaf, {"attention_mask": mask}, own).backward()
        assert leaf.grad is not None
        return leaf.grad

    together = gradient(scores, mask, [0, 1, 2])
    assert not together[1, 3:].any()
    torch.testing.assert_close(together[1:2, :3], gradient(scores[1:2, :3], mask[1:2, :3], [1]))
    torch.testing.assert_close(together[2:], gradient(scores[2:], mask[2:], [2]))
