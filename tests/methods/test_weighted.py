"""Each method with statistics is the best of its rank for the objective that it states, on any moment, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftc.methods.decompose.asvd import asvd
from peftc.methods.decompose.fwsvd import fwsvd
from peftc.methods.decompose.kfac import kfac
from peftc.methods.decompose.svd import svd
from peftc.methods.decompose.whitened import whitened
from peftc.methods.spectrum import Spectrum
from peftc.methods.weighted import Moment

SHAPES = [(12, 20), (16, 16), (24, 10), (1, 9), (9, 1), (40, 6)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
METHODS = ["whitened", "kfac", "kfac-damped", "asvd", "asvd-0.9", "fwsvd"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(size: int, *, rows: int | None = None, seed: int = 0) -> Tensor:
    """Return the second moment of correlated rows that have a mean; fewer rows than features where asked."""
    mixing = random(size, size, seed=seed + 1)
    x = random(rows or 4 * size, size, seed=seed + 2) @ mixing + random(size, seed=seed + 3)
    return x.T @ x / len(x)


def diagonal(scale: Tensor) -> Tensor:
    return torch.diag(scale.square())


def made(name: str, weight: Tensor, seed: int) -> tuple[Spectrum, Tensor, Tensor]:
    """Return a method's spectrum, and its objective tr(G E C E^T) as C (in, in) and G (out, out)."""
    out, in_ = weight.shape
    inputs, outputs = moment_of(in_, seed=seed), moment_of(out, seed=seed + 10)
    positive = random(in_, seed=seed + 20).abs() + 0.05
    if name == "whitened":
        return whitened(weight, second_moment=Moment(inputs)), inputs, torch.eye(out).double()
    if name.startswith("kfac"):
        damping = 0.3 if name == "kfac-damped" else 0.0
        spectrum = kfac(weight, second_moment=Moment(inputs), output_gradient_gram=outputs, damping=damping)
        return spectrum, inputs, outputs + damping * outputs.diagonal().mean() * torch.eye(out).double()
    if name == "fwsvd":
        return fwsvd(weight, weight_fisher=positive), torch.diag(positive), torch.eye(out).double()
    alpha = 0.9 if name == "asvd-0.9" else 0.5
    return asvd(weight, input_magnitude=positive, alpha=alpha), diagonal(positive**alpha), torch.eye(out).double()


def objective(weight: Tensor, product: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    """Return tr(G (W - W') C (W - W')^T), for a moment of the inputs and a gram matrix of the outputs."""
    error = weight.double() - product.double()
    return float(((outputs @ error) * (error @ inputs)).sum())


def product(spectrum: Spectrum, rank: int) -> Tensor:
    factors = spectrum.truncate(rank).factors
    return factors.up.double() @ factors.down.double()


def root(matrix: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return (basis * values.clamp_min(0).sqrt()) @ basis.T


def ranks_of(weight: Tensor) -> list[int]:
    full = min(weight.shape)
    return sorted({1, -(-full // 2), max(1, full - 1), full})


@pytest.mark.parametrize("name", METHODS)
@every_shape
@pytest.mark.parametrize("seed", range(4))
def test_every_rank_reaches_the_closed_form_optimum_and_losses_say_so(name: str, shape: Any, seed: int) -> None:
    weight = random(*shape, seed=seed)
    spectrum, inputs, outputs = made(name, weight, seed)
    values = torch.linalg.svdvals(root(outputs) @ weight @ root(inputs)).square()
    losses = spectrum.losses()
    assert losses.shape == (min(shape) + 1,)
    assert float(losses[0]) == pytest.approx(objective(weight, torch.zeros_like(weight), inputs, outputs), rel=1e-9)
    before = float(losses[0])
    for rank in range(1, min(shape) + 1):
        reached = objective(weight, product(spectrum, rank), inputs, outputs)
        floor = 1e-11 * float(losses[0])
        assert reached == pytest.approx(float(values[rank:].sum()), rel=1e-7, abs=floor)
        assert float(losses[rank]) == pytest.approx(reached, rel=1e-7, abs=floor)
        assert reached <= before + floor
        before = reached


@pytest.mark.parametrize("name", METHODS)
@every_shape
@pytest.mark.parametrize("seed", range(4))
def test_no_random_or_perturbed_competitor_of_the_same_rank_does_better(name: str, shape: Any, seed: int) -> None:
    weight = random(*shape, seed=seed)
    spectrum, inputs, outputs = made(name, weight, seed)
    for rank in ranks_of(weight)[:-1]:
        factors = spectrum.truncate(rank).factors
        best = objective(weight, factors.up @ factors.down, inputs, outputs)
        for trial in range(30):
            up, down = random(shape[0], rank, seed=1000 + trial), random(rank, shape[1], seed=2000 + trial)
            fitted = torch.linalg.lstsq(root(outputs) @ up, root(outputs) @ weight).solution  # the best for this `up`
            step = 10.0 ** -(trial % 6)
            moved = (factors.up + step * factors.up.abs().max() * up) @ (
                factors.down + step * factors.down.abs().max() * down
            )
            tilted = (factors.up + step * factors.up.abs().max() * up) @ factors.down
            for other in (up @ down, up @ fitted, moved, tilted):
                assert objective(weight, other, inputs, outputs) >= best * (1 - 1e-9)


@pytest.mark.parametrize("name", METHODS)
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_is_exact(name: str, shape: Any, dtype: torch.dtype) -> None:
    weight = random(*shape).to(dtype)
    spectrum, *_ = made(name, weight, 0)
    factors = spectrum.truncate(min(shape)).factors
    assert factors.up.dtype == factors.down.dtype == dtype
    tight = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=tight, atol=tight * float(weight.abs().max()))


@pytest.mark.parametrize("name", ["asvd", "fwsvd"])
def test_float32_weights_of_the_size_of_a_layer_lose_nothing_to_rounding(name: str) -> None:
    left, right = (torch.linalg.qr(random(200, 160, seed=seed))[0] for seed in (1, 2))
    weight = ((left * torch.arange(1, 161).double() ** -2) @ right.T).float()
    spectrum, inputs, outputs = made(name, weight, 0)
    values = torch.linalg.svdvals(weight.double() @ root(inputs)).square()
    for rank in (20, 80, 140):
        assert objective(weight, product(spectrum, rank), inputs, outputs) <= float(values[rank:].sum()) * (
            1 + 1e-6
        ) + (1e-13 * float(values.sum()))


@every_shape
@pytest.mark.parametrize("gram", [False, True])
def test_a_moment_of_the_outputs_gives_what_that_of_the_inputs_gives(shape: Any, gram: bool) -> None:
    weight = random(*shape)
    inputs, outputs = moment_of(shape[1]), moment_of(shape[0], seed=5)

    def spectrum(moment: Moment) -> Spectrum:
        if gram:
            return kfac(weight, second_moment=moment, output_gradient_gram=outputs)
        return whitened(weight, second_moment=moment)

    one, other = spectrum(Moment(inputs)), spectrum(Moment(weight @ inputs @ weight.T, "output"))
    scale = float(one.values[0])
    torch.testing.assert_close(one.values, other.values, rtol=1e-6, atol=1e-7 * scale)
    for rank in ranks_of(weight):
        torch.testing.assert_close(product(one, rank), product(other, rank), rtol=1e-5, atol=1e-6)


@every_shape
def test_without_preferences_every_method_is_svd(shape: Any) -> None:
    weight = random(*shape)
    out, in_ = shape
    one = torch.ones(in_).double()
    same = {
        "whitened": whitened(weight, second_moment=Moment(torch.diag(one))),
        "kfac": kfac(
            weight, second_moment=Moment(torch.diag(one)), output_gradient_gram=torch.eye(out).double(), damping=0.0
        ),
        "asvd": asvd(weight, input_magnitude=random(in_).abs() + 0.1, alpha=0.0),
        "fwsvd": fwsvd(weight, weight_fisher=one),
    }
    for name, spectrum in same.items():
        torch.testing.assert_close(spectrum.values, svd(weight).values, msg=lambda text, name=name: f"{name}: {text}")
        for rank in ranks_of(weight):
            torch.testing.assert_close(product(spectrum, rank), product(svd(weight), rank))


@every_shape
@pytest.mark.parametrize("factor", [1e-15, 1e15])
@pytest.mark.parametrize("name", ["weight", "inputs", "outputs", "all"])
def test_scales_change_no_product(shape: Any, factor: float, name: str) -> None:
    weight, inputs, outputs = random(*shape), moment_of(shape[1]), moment_of(shape[0], seed=5)
    expected = kfac(weight.float(), second_moment=Moment(inputs), output_gradient_gram=outputs)
    factors = {each: factor if name in (each, "all") else 1.0 for each in ("weight", "inputs", "outputs")}
    found = kfac(
        (weight * factors["weight"]).float(),
        second_moment=Moment(inputs * factors["inputs"]),
        output_gradient_gram=outputs * factors["outputs"],
    )
    by = factors["weight"] ** 2 * factors["inputs"] * factors["outputs"]
    torch.testing.assert_close(
        found.losses() / by, expected.losses(), rtol=1e-5, atol=1e-6 * float(expected.losses()[0])
    )
    for rank in ranks_of(weight):
        torch.testing.assert_close(
            product(found, rank) / factors["weight"], product(expected, rank), rtol=1e-4, atol=1e-5
        )


@every_shape
@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_the_scale_of_magnitudes_and_fisher_changes_no_product(shape: Any, factor: float) -> None:
    weight, positive = random(*shape).float(), random(shape[1], seed=3).abs() + 0.1
    for rank in ranks_of(weight):
        for one, other in (
            (asvd(weight, input_magnitude=positive), asvd(weight, input_magnitude=positive * factor)),
            (fwsvd(weight, weight_fisher=positive), fwsvd(weight, weight_fisher=positive * factor)),
        ):
            torch.testing.assert_close(product(one, rank), product(other, rank), rtol=1e-4, atol=1e-5)


MOMENTS: dict[str, Callable[[int], Tensor]] = {
    "rank deficient": lambda size: random(size, max(1, size // 3)) @ random(size, max(1, size // 3)).T,
    "three rows": lambda size: moment_of(size, rows=3),
    "one row": lambda size: moment_of(size, rows=1),
    "zero": lambda size: torch.zeros(size, size).double(),
    "dead features": lambda size: torch.diag((torch.arange(size) % 2).double()),
    "condition 1e12": lambda size: conditioned(size, 1e-12),
    "condition 1e24": lambda size: conditioned(size, 1e-24),
    "rounded to float32": lambda size: moment_of(size, rows=3).float().double(),
}


def conditioned(size: int, smallest: float) -> Tensor:
    basis = torch.linalg.qr(random(size, size))[0]
    matrix = (basis * torch.logspace(0, torch.tensor(smallest).log10().item(), size, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("make", MOMENTS.values(), ids=MOMENTS)
@every_shape
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_moments_are_solved_to_their_optimum_and_full_rank_stays_exact(
    make: Any, shape: Any, side: str, dtype: torch.dtype
) -> None:
    weight = random(*shape).to(dtype)
    inputs: Tensor = make(shape[1])
    wide = weight.double()
    outer = wide @ inputs @ wide.T
    moment = Moment(inputs) if side == "input" else Moment((outer + outer.T) / 2, "output")
    spectrum = whitened(weight, second_moment=moment)
    values = torch.linalg.svdvals(wide @ root(inputs)).square()
    total = float(values.sum())
    slack = 1e-10 if dtype == torch.float32 else 1e-12
    if make is MOMENTS["rounded to float32"]:  # no moment of anything: some eigenvalues lie below zero
        slack = 1e-6
    eye = torch.eye(shape[0]).double()
    for rank in ranks_of(weight):
        factors = spectrum.truncate(rank).factors
        assert torch.isfinite(factors.up).all()
        assert torch.isfinite(factors.down).all()
        assert (factors.up.norm(dim=0) > 0).all()  # a component of zeros could never be trained
        reached = objective(weight, factors.up.double() @ factors.down.double(), inputs, eye)
        assert reached <= float(values[rank:].sum()) * (1 + 1e-7) + slack * total
    if side == "output" and shape[0] > shape[1]:
        return  # never collected; of a tall weight, rounding tells noise from outputs that are as small
    tight = 1e-5 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(product(spectrum, min(shape)), wide, rtol=tight, atol=tight * float(wide.abs().max()))


@every_shape
def test_what_the_moment_knows_nothing_of_is_kept_as_svd_would(shape: Any) -> None:
    weight = random(*shape)
    for rank in ranks_of(weight):
        found = whitened(weight, second_moment=Moment(torch.zeros(shape[1], shape[1]).double()))
        torch.testing.assert_close(product(found, rank), product(svd(weight), rank), rtol=1e-7, atol=1e-9)
        assert float(found.losses()[0]) == 0


@pytest.mark.parametrize("name", METHODS)
@every_shape
def test_a_weight_of_zeros_has_no_loss_and_finite_factors(name: str, shape: Any) -> None:
    spectrum, *_ = made(name, torch.zeros(shape), 0)
    for rank in range(1, min(shape) + 1):
        factors = spectrum.truncate(rank).factors
        assert torch.isfinite(factors.up).all()
        assert torch.isfinite(factors.down).all()
        assert not (factors.up @ factors.down).any()
    assert not spectrum.losses().any()


@every_shape
def test_a_gram_known_by_its_mean_only_scales_the_losses_of_whitened(shape: Any) -> None:
    weight, moment = random(*shape), Moment(moment_of(shape[1]))
    plain = whitened(weight, second_moment=moment)
    found = kfac(weight, second_moment=moment, output_gradient_gram=torch.tensor(3.0).double(), damping=0.3)
    full = kfac(weight, second_moment=moment, output_gradient_gram=3 * torch.eye(shape[0]).double(), damping=0.3)
    torch.testing.assert_close(found.losses(), plain.losses() * 3 * 1.3)
    torch.testing.assert_close(found.losses(), full.losses())
    for rank in ranks_of(weight):
        torch.testing.assert_close(product(found, rank), product(plain, rank))


@every_shape
@pytest.mark.parametrize("scalar", [False, True])
def test_a_gram_of_zeros_costs_nothing_and_keeps_what_whitened_keeps(shape: Any, scalar: bool) -> None:
    weight, moment = random(*shape).float(), Moment(moment_of(shape[1]))
    gram = torch.zeros(()) if scalar else torch.zeros(shape[0], shape[0])
    found = kfac(weight, second_moment=moment, output_gradient_gram=gram)
    assert not found.losses().any()
    for rank in ranks_of(weight):
        torch.testing.assert_close(product(found, rank), product(whitened(weight, second_moment=moment), rank))


@every_shape
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_gram_from_a_single_gradient_is_solved(shape: Any, damping: float) -> None:
    weight, moment = random(*shape), moment_of(shape[1])
    gram = moment_of(shape[0], rows=1)
    found = kfac(weight, second_moment=Moment(moment), output_gradient_gram=gram, damping=damping)
    total = float(found.losses()[0])
    metric = gram + damping * gram.diagonal().mean() * torch.eye(shape[0]).double()
    for rank in ranks_of(weight):
        reached = objective(weight, product(found, rank), moment, metric)
        assert reached == pytest.approx(float(found.losses()[rank]), rel=1e-6, abs=1e-6 * total)


@every_shape
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(shape: Any, bad: float) -> None:
    weight, inputs, outputs = random(*shape), moment_of(shape[1]), moment_of(shape[0])
    line = random(shape[1]).abs()
    spoiled = [each.clone() for each in (inputs, outputs, line)]
    for each in spoiled:
        each.view(-1)[0] = bad
    cases = {
        "inputs": whitened(weight, second_moment=Moment(spoiled[0])),
        "outputs": whitened(weight, second_moment=Moment(spoiled[1], "output")),
        "gram": kfac(weight, second_moment=Moment(inputs), output_gradient_gram=spoiled[1]),
        "scalar": kfac(weight, second_moment=Moment(inputs), output_gradient_gram=torch.tensor(bad)),
        "magnitude": asvd(weight, input_magnitude=spoiled[2]),
        "fisher": fwsvd(weight, weight_fisher=spoiled[2]),
    }
    for name, spectrum in cases.items():
        with pytest.raises(torch.linalg.LinAlgError):
            pytest.fail(f"{name} gave factors: {spectrum.truncate(1).error}")


# -- the ladder ------------------------------------------------------------------------------------------------------


def raising(matrix: Tensor) -> Any:
    raise torch.linalg.LinAlgError("it did not converge")


def of_nan(matrix: Tensor) -> Any:
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


def garbage(matrix: Tensor) -> Any:
    return torch.linalg.eigvalsh(matrix), torch.linalg.qr(torch.randn(matrix.shape).to(matrix))[0]


def all_zero(matrix: Tensor) -> Any:
    return torch.zeros_like(matrix[0]), torch.zeros_like(matrix)


def repeated(matrix: Tensor) -> Any:
    values, basis = torch.linalg.svd(matrix)[1].flip(0), torch.linalg.svd(matrix)[0].flip(1)
    return values[-1:].expand(len(values)), basis[:, -1:].expand(basis.shape)


FAILURES = [raising, of_nan, garbage, all_zero, repeated]


@pytest.mark.parametrize("failure", FAILURES)
@every_shape
@pytest.mark.parametrize("gram", [False, True])
def test_a_solver_that_fails_is_followed_by_svd_which_is_as_good(
    failure: Any, shape: Any, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if max(shape) == 1 or (min(shape) == 1 and failure in (garbage, repeated)):
        pytest.skip("a matrix of one number has but one basis")
    weight, inputs, outputs = random(*shape), moment_of(shape[1]), moment_of(shape[0], seed=5)
    arguments: Any = {"second_moment": Moment(inputs), **({"output_gradient_gram": outputs} if gram else {})}
    method: Any = kfac if gram else whitened
    expected = method(weight, **arguments)
    wanted = {rank: product(expected, rank) for rank in ranks_of(weight)}
    monkeypatch.setattr(torch.linalg, "eigh", failure)
    found = method(weight, **arguments)
    for rank, best in wanted.items():
        cut = found.truncate(rank)
        assert cut.rung == "svd64"
        tall = ["cholesky64"] if shape[0] > shape[1] else []
        assert [text.partition(":")[0] for text in cut.climbed] == [*tall, "eigh64"]
        torch.testing.assert_close(cut.factors.up @ cut.factors.down, best, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", MOMENTS.values(), ids=MOMENTS)
@every_shape
def test_svd_takes_every_degenerate_moment_that_eigh_takes(
    make: Any, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = random(*shape), make(shape[1])
    values = torch.linalg.svdvals(weight @ root(inputs)).square()
    monkeypatch.setattr(torch.linalg, "eigh", raising)
    spectrum = whitened(weight, second_moment=Moment(inputs))
    for rank in ranks_of(weight):
        reached = objective(weight, product(spectrum, rank), inputs, torch.eye(shape[0]).double())
        assert reached <= float(values[rank:].sum()) * (1 + 1e-6) + 1e-6 * float(values.sum())


@pytest.mark.parametrize("make", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("shape", [(24, 10), (40, 6), (300, 160)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("gram", [False, True])
def test_cholesky_and_reflections_agree_on_every_moment(make: Any, shape: Any, gram: bool) -> None:
    weight, inputs = random(*shape), make(shape[1])
    metric = moment_of(shape[0], seed=5) if gram else torch.eye(shape[0]).double()
    spectrum = kfac(weight, second_moment=Moment(inputs), output_gradient_gram=metric, damping=0.0)
    quick, sure = (spectrum.rungs[rung](spectrum.weight, True) for rung in ("cholesky64", "eigh64"))
    assert quick is not None
    assert sure is not None
    assert quick.up is not None
    assert quick.down is not None
    torch.testing.assert_close(quick.values, sure.values, rtol=1e-7, atol=1e-7 * float(sure.values[0]))
    total = objective(weight, torch.zeros_like(weight), inputs, metric)
    for rank in ranks_of(weight):
        reached, expected = (
            objective(weight, found.up[:, :rank] @ found.down[:rank], inputs, metric)  # type: ignore[union-attr, index]
            for found in (quick, sure)
        )
        assert reached == pytest.approx(expected, rel=1e-7, abs=1e-10 * total)
    torch.testing.assert_close(quick.up @ quick.down, weight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [0.0, 1e-12, 1e-6])
def test_a_tall_weight_of_dependent_columns_is_split_by_reflections(dtype: torch.dtype, smallest: float) -> None:
    weight = random(24, 10)
    weight[:, 9] = weight[:, 0] + smallest * weight[:, 9]
    weight, inputs = weight.to(dtype), moment_of(10)
    spectrum = whitened(weight, second_moment=Moment(inputs))
    values = torch.linalg.svdvals(weight.double() @ root(inputs)).square()
    for rank in ranks_of(weight):
        cut = spectrum.truncate(rank)
        assert cut.rung == "eigh64"
        assert cut.climbed == ("cholesky64: the columns of its weight are too near to depending on each other",)
        reached = objective(weight, product(spectrum, rank), inputs, torch.eye(24).double())
        assert reached <= float(values[rank:].sum()) * (1 + 1e-7) + 1e-12 * float(values.sum())


def test_a_singular_moment_needs_no_other_rung() -> None:
    weight = random(24, 10).float()
    for make in MOMENTS.values():
        cut = whitened(weight, second_moment=Moment(make(10))).truncate(4)
        assert (cut.rung, cut.climbed) == ("cholesky64", ())


def test_without_a_rung_left_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", garbage)
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix: raising(matrix))
    spectrum = whitened(random(8, 6), second_moment=Moment(moment_of(6)))
    with pytest.raises(
        torch.linalg.LinAlgError, match="eigh64: its eigenvectors do not .*; svd64: it did not converge"
    ):
        spectrum.truncate(2)


def test_off_the_cpu_lapack_on_the_cpu_is_the_last_rung() -> None:
    spectrum = whitened(torch.empty(8, 6, device="meta"), second_moment=Moment(torch.empty(6, 6, device="meta")))
    assert list(spectrum.rungs) == ["cholesky64", "eigh64", "svd64", "svd64-cpu"]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # to the CPU
        spectrum.rungs["svd64-cpu"](spectrum.weight, True)
