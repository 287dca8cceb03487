"""Every decomposition keeps one contract, and each one what its paper promises."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftc.calibration import statistics
from peftc.errors import MethodError, UsageError
from peftc.methods import registry
from peftc.methods.decompose.svd import svd
from peftc.methods.decompose_conv.channel import channel
from peftc.methods.decompose_conv.spatial import spatial
from peftc.methods.registry import METHODS, find
from peftc.methods.spectrum import FLOOR, TOLERANCE, Solution, Spectrum, Truncation
from peftc.methods.weighted import Moment
from peftc.nn import lowrank
from peftc.nn.lowrank import matrix

DECOMPOSE = list(METHODS["decompose"])
DATA_FREE = [name for name in DECOMPOSE if not registry.needs_of(find("decompose", name, "--method"))]
CONV = list(METHODS["decompose_conv"])
SHAPES = [(48, 32), (32, 48), (32, 32), (300, 20)]
DTYPES = [torch.float32, torch.float64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(out: int, in_: int, values: Tensor) -> Tensor:
    """Return a matrix (out, in) with random singular vectors and the given singular values."""
    left, right = (torch.linalg.qr(random(side, min(out, in_), seed=side + 1))[0] for side in (out, in_))
    return (left * values) @ right.T


def power_law(exponent: float) -> Callable[[int, int], Tensor]:
    return lambda out, in_: with_values(out, in_, torch.arange(1, min(out, in_) + 1).double() ** exponent)


def steps_of(*levels: float) -> Callable[[int, int], Tensor]:
    """Return a maker of matrices whose singular values repeat in as many groups as there are levels."""

    def make(out: int, in_: int) -> Tensor:
        side = min(out, in_)
        return with_values(out, in_, torch.tensor(levels).double().repeat_interleave(-(-side // len(levels)))[:side])

    return make


WEIGHTS: dict[str, Callable[[int, int], Tensor]] = {
    "random": random,
    "i^-0.5": power_law(-0.5),
    "i^-1": power_law(-1),
    "i^-2": power_law(-2),
    "repeated": steps_of(1, 0.5, 0.25),
    "orthogonal": steps_of(1),
    "one cliff": steps_of(1, 1e-3),
    "deep cliffs": steps_of(1, 1e-3, 1e-6),
    "rank deficient": steps_of(1, 0.5, 0),
    "rank one": lambda out, in_: random(out, 1) @ random(1, in_),
    "tiny": lambda out, in_: random(out, in_) * 1e-25,
    "huge": lambda out, in_: random(out, in_) * 1e25,
    "zero": lambda out, in_: torch.zeros(out, in_, dtype=torch.float64),
    "a row": lambda out, in_: random(1, in_),
    "a column": lambda out, in_: random(out, 1),
    "one number": lambda out, in_: random(1, 1),
}
every_weight = pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
every_method = pytest.mark.parametrize("name", DECOMPOSE)
every_data_free_method = pytest.mark.parametrize("name", DATA_FREE)


def ranks_of(weight: Tensor) -> list[int]:
    full = min(weight.shape)
    return sorted({1, max(1, full // 3), max(1, full // 2), max(1, full - 1), full})


def squared_error(weight: Tensor, cut: Truncation) -> float:
    return float((weight.double() - cut.factors.up.double() @ cut.factors.down.double()).square().sum())


def gram(size: int, seed: int) -> Tensor:
    rows = random(2 * size, size, seed=seed) * torch.linspace(0.1, 2, size).double()
    return rows.T @ rows / len(rows)


STATISTICS: dict[str, Callable[[Tensor], Any]] = {
    "second_moment": lambda weight: Moment(gram(weight.shape[1], seed=1)),
    "input_magnitude": lambda weight: random(weight.shape[1], seed=2).abs(),
    "output_gradient_gram": lambda weight: gram(weight.shape[0], seed=3),
    "weight_fisher": lambda weight: random(weight.shape[1], seed=4).square(),
}


def decompose(name: str, weight: Tensor) -> Spectrum:
    """Decompose a weight; a method with needs gets made-up statistics."""
    method = find("decompose", name, "--method")
    return method(weight, **{need: STATISTICS[need](weight) for need in registry.needs_of(method)})


def test_there_is_a_made_up_statistic_for_everything_that_calibration_collects() -> None:
    assert tuple(STATISTICS) == statistics.STATISTICS


@every_method
@every_weight
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_have_their_shapes_and_dtype_and_are_finite(name: str, make: Any, dtype: torch.dtype) -> None:
    weight = make(24, 18).to(dtype)
    for rank in ranks_of(weight):
        factors = decompose(name, weight).truncate(rank).factors
        assert factors.up.shape == (weight.shape[0], rank)
        assert factors.down.shape == (rank, weight.shape[1])
        assert factors.up.dtype == factors.down.dtype == dtype
        assert torch.isfinite(factors.up).all()
        assert torch.isfinite(factors.down).all()


@every_method
@every_weight
def test_the_reported_error_is_the_true_one(name: str, make: Any) -> None:
    weight = make(48, 32).float()
    total = float(weight.double().square().sum())
    for rank in ranks_of(weight):
        cut = decompose(name, weight).truncate(rank)
        true = (squared_error(weight, cut) / total) ** 0.5 if total else 0.0
        assert cut.error == pytest.approx(true, rel=1e-3, abs=1e-7), f"rank {rank}, {cut.rung}"


@every_data_free_method
@pytest.mark.parametrize("shape", SHAPES)
def test_more_rank_is_never_worse(name: str, shape: tuple[int, int]) -> None:
    weight = random(*shape).float()
    spectrum = decompose(name, weight)
    errors = [squared_error(weight, spectrum.truncate(rank)) for rank in range(1, min(shape) + 1)]
    assert errors == sorted(errors, reverse=True)


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact_and_losses_fall_to_nothing(name: str, shape: tuple[int, int]) -> None:
    weight = random(*shape).float()
    spectrum = decompose(name, weight)
    assert squared_error(weight, spectrum.truncate(min(shape))) < 1e-11 * float(weight.square().sum())
    assert spectrum.losses().shape == (min(shape) + 1,)
    assert (spectrum.losses().diff() <= 0).all()
    assert float(spectrum.losses()[-1]) == 0


@every_method
@every_weight
def test_factors_are_balanced(name: str, make: Any) -> None:
    for rank in ranks_of(make(32, 48)):
        factors = decompose(name, make(32, 48).float()).truncate(rank).factors
        up, down = torch.linalg.vector_norm(factors.up, dim=0), torch.linalg.vector_norm(factors.down, dim=1)
        floor = float(up.max()) * 1e-3  # components of noise may be lopsided
        some = up * down > 0  # one side of a component that adds nothing may be any number
        torch.testing.assert_close(up[some], down[some], rtol=1e-3, atol=floor)


@every_method
@every_weight
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_the_same_weight_gives_the_same_bits(name: str, make: Any, shape: tuple[int, int]) -> None:
    weight = make(*shape).float()
    one, other = (decompose(name, weight.clone()).truncate(ranks_of(weight)[-2:][0]) for _ in range(2))
    assert torch.equal(one.factors.up, other.factors.up)
    assert torch.equal(one.factors.down, other.factors.down)


@every_data_free_method
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_run_from_the_whole_energy_down_to_nothing(name: str, shape: tuple[int, int]) -> None:
    weight = random(*shape).float()
    spectrum = decompose(name, weight)
    losses = spectrum.losses()
    assert losses.shape == (min(shape) + 1,)
    assert float(losses[0]) == pytest.approx(float(weight.square().sum()), rel=1e-4)
    assert float(losses[-1]) == 0
    assert (losses.diff() <= 0).all()
    assert float(losses[5]) == pytest.approx(squared_error(weight, spectrum.truncate(5)), rel=1e-4)


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, 0.0])
def test_every_convolution_method_is_exact_at_full_rank(name: str, dtype: torch.dtype, scale: float) -> None:
    weight = (random(8, 6, 3, 5) * scale).to(dtype)
    full = min(matrix(weight, name).shape)
    cut = find("decompose_conv", name, "--conv-method")(weight).truncate(full)
    back = lowrank.dense_weight(lowrank.tensors(cut.factors, tuple(weight.shape), name), tuple(weight.shape), name)
    torch.testing.assert_close(back, weight, rtol=1e-4, atol=1e-5 * scale)
    assert cut.error < 1e-5
    assert back.dtype == dtype


@pytest.mark.parametrize("kind", METHODS)
def test_every_registered_method_is_a_documented_function_of_its_name(kind: str) -> None:
    for name in METHODS[kind]:
        method = find(kind, name, "--method")
        assert method.__name__ == name
        assert inspect.getdoc(method)
        if kind.startswith("decompose"):
            assert next(iter(inspect.signature(method).parameters)) == "weight"
        assert all(isinstance(value, int | float | str | bool) for value in registry.settings_of(method).values())


@every_weight
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_certificate_of_svd_holds(make: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = make(*shape).to(dtype)
    sigma = torch.linalg.svdvals(weight.double()).square()
    total = float(sigma.sum())
    for rank in ranks_of(weight):
        cut = svd(weight).truncate(rank)
        assert cut.excess is not None
        assert cut.excess <= TOLERANCE
        optimum = float(sigma[rank:].sum())
        full = 1e-11 if rank == min(weight.shape) else 0  # nothing is left to be optimal about
        allowed = optimum * (1 + TOLERANCE) + (FLOOR + full) * total
        assert squared_error(weight, cut) <= allowed, f"rank {rank}, {cut.rung}"


@pytest.mark.parametrize("make", [WEIGHTS["one cliff"], WEIGHTS["random"]])
def test_the_certificate_of_svd_holds_at_the_size_of_a_layer(make: Any) -> None:
    weight = make(400, 384).float()
    sigma = torch.linalg.svdvals(weight.double()).square()
    for rank in (96, 192, 380):
        cut = svd(weight).truncate(rank)
        assert squared_error(weight, cut) <= float(sigma[rank:].sum()) * (1 + TOLERANCE), f"rank {rank}, {cut.rung}"


@every_weight
def test_svd_drops_exactly_the_smallest_singular_values(make: Any) -> None:
    weight = make(32, 48).double()
    sigma = torch.linalg.svdvals(weight).square()
    for rank in ranks_of(weight):
        error = squared_error(weight, svd(weight).truncate(rank))
        assert error == pytest.approx(float(sigma[rank:].sum()), rel=1e-4, abs=1e-20 * float(sigma.sum()))


@every_weight
@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_values_agree_with_lapack_to_the_promised_resolution(make: Any, dtype: torch.dtype) -> None:
    weight = make(48, 32).to(dtype)
    expected = torch.linalg.svdvals(weight.double())
    found = svd(weight).values
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    energy = float(expected.square().sum())
    resolution = 64 * torch.finfo(dtype).eps * float(expected[0]) ** 2  # of the squares: they are eigenvalues
    assert (found.square() - expected.square()).abs().max() <= resolution
    assert abs(float(found.square().sum()) - energy) <= 1e-4 * energy


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_signs_are_canonical(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    one, other = svd(weight).truncate(4).factors, svd(-weight).truncate(4).factors
    basis_side = 1 if shape[0] >= shape[1] else 0
    same = [(one.up, other.up), (one.down.T, other.down.T)][basis_side]
    flipped = [(one.up, other.up), (one.down.T, other.down.T)][1 - basis_side]
    assert torch.equal(same[0], same[1])
    assert torch.equal(flipped[0], -flipped[1])
    largest = same[0].gather(0, same[0].abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


def exact(weight: Tensor, vectors: bool) -> Solution:
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return Solution(values, None, right, "whatever it calls itself", exact=True)


def raising(weight: Tensor, vectors: bool) -> Solution:
    raise torch.linalg.LinAlgError("did not converge\nat all")


def silent(weight: Tensor, vectors: bool) -> None:
    return None


def nan(weight: Tensor, vectors: bool) -> Solution:
    return Solution(torch.full((6,), float("nan")), None, torch.eye(6), "nan")


def bad_basis(weight: Tensor, vectors: bool) -> Solution:
    return Solution(torch.linalg.svdvals(weight.double()), None, torch.eye(6).to(weight), "bad")


@pytest.mark.parametrize(
    ("failing", "why"),
    [
        (raising, "first: did not converge"),
        (silent, "first: its precision does not resolve"),
        (nan, "first: its precision does not resolve"),
        (bad_basis, "first: error within"),
    ],
)
def test_the_ladder_climbs_past_a_failing_rung_and_says_so(failing: Any, why: str) -> None:
    weight = random(9, 6)
    cut = Spectrum(weight, {"first": failing, "second": exact}).truncate(2)
    assert cut.rung == "second"
    assert [text[: len(why)] for text in cut.climbed] == [why]
    assert squared_error(weight, cut) == pytest.approx(float(torch.linalg.svdvals(weight)[2:].square().sum()))


def test_a_ladder_without_a_rung_left_refuses_with_every_reason() -> None:
    spectrum = Spectrum(random(9, 6), {"one": raising, "two": silent, "three": bad_basis})
    with pytest.raises(torch.linalg.LinAlgError, match="one: did not converge; two: .*; three: error within"):
        spectrum.truncate(2)


def test_a_rung_that_failed_is_not_tried_again() -> None:
    calls = []

    def failing(weight: Tensor, vectors: bool) -> None:
        calls.append(vectors)

    spectrum = Spectrum(random(9, 6), {"first": failing, "second": exact})
    spectrum.losses()
    spectrum.truncate(2)
    spectrum.truncate(3)
    assert calls == [False]


def test_a_resumed_spectrum_goes_on_with_the_same_bits() -> None:
    weight = power_law(-1)(48, 32).float()
    whole = svd(weight)
    resumed = Spectrum(weight, svd(weight).rungs, whole.solution, whole.climbed)
    for rank in (3, 30):
        one, other = whole.truncate(rank), resumed.truncate(rank)
        assert torch.equal(one.factors.up, other.factors.up)
        assert one.climbed == other.climbed


def test_ready_factors_are_balanced_and_kept() -> None:
    up, down = random(9, 6) * 100, random(6, 6)
    weight = up @ down
    cut = Spectrum.of(weight, torch.linalg.svdvals(weight), up, down).truncate(6)
    assert cut.excess is None
    torch.testing.assert_close(cut.factors.up.norm(dim=0), cut.factors.down.norm(dim=1))
    torch.testing.assert_close(cut.factors.up @ cut.factors.down, weight)


def test_ready_factors_of_too_few_components_are_refused() -> None:
    with pytest.raises(MethodError, match="a method gave 4 of 6 components"):
        Spectrum.of(random(9, 6), torch.ones(4), random(9, 4), random(4, 6))


@pytest.mark.parametrize("method", [channel, spatial])
def test_channel_and_spatial_are_svd_of_their_matrix(method: Any) -> None:
    weight = random(8, 6, 3, 5)
    expected = svd(matrix(weight, method.__name__)).truncate(4)
    assert torch.equal(method(weight).truncate(4).factors.up, expected.factors.up)


def test_an_unknown_method_and_setting_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown value `svdd` for `--method`") as refusal:
        find("decompose", "svdd", "--method")
    assert refusal.match("did you mean `--method svd`")
    with pytest.raises(UsageError, match="`svd` has no setting `alpha`") as refusal:
        registry.with_settings(svd, "svd", {"alpha": 1})
    assert refusal.match("its settings are: none")
    with pytest.raises(UsageError, match="setting `alpha` of `asvd` is `two`"):
        registry.with_settings(find("decompose", "asvd", "--method"), "asvd", {"alpha": "two"})
    assert registry.with_settings(find("decompose", "asvd", "--method"), "asvd", {"alpha": 2}) == {"alpha": 2}


class Point:
    """An entry point of another package."""

    name, value = "mine", "other.package:mine"

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_another_package_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "outsiders", lambda kind: {"mine": Point(svd)})
    assert find("decompose", "mine", "--method") is svd


def test_another_packages_broken_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "outsiders", lambda kind: {"mine": Point(ImportError("no module"))})
    with pytest.raises(MethodError, match="cannot import the method `mine` of `other.package:mine`"):
        find("decompose", "mine", "--method")


def test_needs_are_keywords_without_a_default() -> None:
    def method(weight: Tensor, *, input_gram: Tensor, alpha: float = 0.5) -> None: ...

    assert registry.needs_of(method) == ["input_gram"]
    assert registry.settings_of(method) == {"alpha": 0.5}
    assert registry.with_settings(method, "method", {"alpha": 1}) == {"alpha": 1.0}
