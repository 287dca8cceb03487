"""The terms of a loss are what their papers say, on numbers small enough to check by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftc.methods import registry
from peftc.methods.loss.embeddings import embeddings
from peftc.methods.loss.features import features
from peftc.methods.loss.logits import logits
from peftc.methods.loss.perturbation import perturbation
from peftc.nn.vocabulary import Unread, foremost


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_features_are_the_mean_square_over_samples_tokens_and_width_averaged_over_layers() -> None:
    student, teacher = ([random(3, 5, 4, seed=seed + at) for at in (0, 1)] for seed in (0, 10))
    expected = sum((one - other).square().mean() for one, other in zip(student, teacher, strict=True)) / 2
    found = features(student_features=student, teacher_features=teacher, masks=[None, None])
    torch.testing.assert_close(found, expected)
    assert features(student_features=teacher, teacher_features=teacher, masks=[None, None]) == 0


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("token", [0, 4])
def test_every_token_of_every_layer_counts(layer: int, token: int) -> None:
    teacher = [random(3, 5, 4, seed=at) for at in (0, 1)]
    student = [each.clone() for each in teacher]
    student[layer][1, token] += 1
    assert features(student_features=student, teacher_features=teacher, masks=[None, None]) == pytest.approx(1 / 15 / 2)


def test_padding_counts_for_nothing_and_every_sample_the_same() -> None:
    teacher = random(2, 4, 3)
    student = teacher.clone()
    student[0, :2] += 1  # a sample of two tokens
    student[0, 2:] += 100
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert features(student_features=[student], teacher_features=[teacher], masks=[mask]) == pytest.approx(0.5)


def test_scale_free_features_do_not_change_with_the_scale_of_a_layer() -> None:
    teacher = [random(6, 5, 4, seed=at) for at in (0, 1)]
    student = [each + 0.1 * random(6, 5, 4, seed=at + 5) for at, each in enumerate(teacher)]
    before = features(student_features=student, teacher_features=teacher, masks=[None, None], scale_free=True)
    larger = [[student[0] * 50, student[1]], [teacher[0] * 50, teacher[1]]]
    after = features(student_features=larger[0], teacher_features=larger[1], masks=[None, None], scale_free=True)
    torch.testing.assert_close(before, after)
    # a student that gives the mean token has lost all there is: 1 per layer
    flat = [each.mean((0, 1)).expand_as(each) for each in teacher]
    assert features(
        student_features=flat, teacher_features=teacher, masks=[None, None], scale_free=True
    ) == pytest.approx(1)


def pair() -> tuple[Tensor, Tensor, Tensor]:
    up = torch.tensor([[1.0], [2.0]], requires_grad=True)
    down = torch.tensor([[3.0, -1.0]], requires_grad=True)
    return up, down, torch.tensor([[3.1, -1.0], [6.0, -2.5]])  # the product is [[3, -1], [6, -2]]


def test_perturbation_is_the_largest_entry_beyond_epsilon_and_pulls_at_that_entry_alone() -> None:
    up, down, weight = pair()
    found = perturbation(products={"a": up @ down}, weights={"a": weight}, epsilon=0.1)
    assert found.detach() == pytest.approx((0.5 - 0.1) ** 2)
    found.backward()
    assert up.grad is not None and down.grad is not None
    assert up.grad[0] == 0 and up.grad[1] != 0
    assert down.grad[0, 0] == 0 and down.grad[0, 1] != 0


def test_perturbation_is_a_hinge_unless_asked_to_be_two_sided() -> None:
    up, down, weight = pair()
    given = {"products": {"a": (up @ down).detach()}, "weights": {"a": weight}}
    assert perturbation(**given, epsilon=0.6) == 0
    assert perturbation(**given, epsilon=0.6, two_sided=True) == pytest.approx(0.01, rel=1e-3)


def test_perturbation_is_averaged_over_modules_and_nothing_without_any() -> None:
    up, down, weight = pair()
    product = (up @ down).detach()
    found = perturbation(products={"a": product, "b": product}, weights={"a": weight, "b": product}, epsilon=0.0)
    assert found == pytest.approx(0.125)
    assert perturbation(products={}, weights={}) == 0


def test_relative_perturbation_is_that_of_the_whole_weight() -> None:
    up, down, weight = pair()
    found = perturbation(products={"a": (up @ down).detach()}, weights={"a": weight}, epsilon=0.0, norm="frobenius")
    gap = (up @ down - weight).detach()
    assert found == pytest.approx(float(gap.norm() / weight.norm()) ** 2)


def test_the_divergence_of_logits_is_that_of_distributions() -> None:
    student, teacher = random(7, 5, seed=1), random(7, 5, seed=2)
    p, q = teacher.log_softmax(1), student.log_softmax(1)
    torch.testing.assert_close(
        logits(student_outputs=student, teacher_outputs=teacher, mask=None), (p.exp() * (p - q)).sum(1).mean()
    )
    assert logits(student_outputs=teacher + 3, teacher_outputs=teacher, mask=None) == pytest.approx(0, abs=1e-6)
    assert logits(student_outputs=teacher + 3, teacher_outputs=teacher, mask=None, form="mse") == pytest.approx(9)


def test_the_gradient_of_the_divergence_keeps_its_size_when_the_temperature_rises() -> None:
    norms = []
    for temperature in (50.0, 500.0):
        student = random(7, 5, seed=1).requires_grad_()
        logits(
            student_outputs=student, teacher_outputs=random(7, 5, seed=2), mask=None, temperature=temperature
        ).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kept_words_bound_the_divergence_from_below(temperature: float) -> None:
    student, teacher = random(3, 5, 40), 3 * random(3, 5, 40, seed=1)
    student.requires_grad_(True)
    read = Unread(student, torch.eye(40))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    options: Any = {"mask": mask, "temperature": temperature}
    exact = logits(student_outputs=student, teacher_outputs=teacher, **options)
    (gradient,) = torch.autograd.grad(exact, student)
    before = 0.0
    for number in (1, 4, 16, 39):
        kept = foremost(teacher, number, temperature)
        found = logits(student_outputs=student, teacher_outputs=kept, **options)
        torch.testing.assert_close(logits(student_outputs=read, teacher_outputs=kept, **options), found)
        assert before < found.item() <= exact.item() + 1e-5
        before = found.item()
    (last,) = torch.autograd.grad(found, student)  # all but one: nothing is lumped together
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(last, gradient, rtol=1e-4, atol=1e-6)


def test_logits_of_padding_count_for_nothing() -> None:
    teacher = random(2, 3, 5)
    student = teacher.clone()
    student[0, 2] += random(5, seed=3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert logits(student_outputs=student, teacher_outputs=teacher, mask=mask) == pytest.approx(0, abs=1e-6)
    assert logits(student_outputs=student, teacher_outputs=teacher, mask=None) > 1e-3


@pytest.mark.parametrize("settings", [{"form": "cosine"}, {"temperature": 0.0}])
def test_a_form_that_does_not_exist_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not `kl` or `mse`"):
        logits(student_outputs=random(2, 3), teacher_outputs=random(2, 3), mask=None, **settings)  # type: ignore[arg-type]


def test_embeddings_are_the_distance_of_vectors_and_of_their_cosines() -> None:
    student, teacher = (torch.nn.functional.normalize(random(6, 4, seed=seed), dim=1) for seed in (1, 2))
    pointwise = (student - teacher).square().sum(1).mean()
    cosines = (student @ student.T - teacher @ teacher.T).square().mean()
    torch.testing.assert_close(embeddings(student_vectors=student, teacher_vectors=teacher), pointwise + cosines)
    turn = torch.linalg.qr(random(4, 4, seed=3))[0]  # a rotation keeps all cosines, but not the vectors
    turned = embeddings(student_vectors=teacher @ turn, teacher_vectors=teacher)
    alone = embeddings(student_vectors=teacher @ turn, teacher_vectors=teacher, similarities=0.0)
    torch.testing.assert_close(turned, alone)
    assert turned > 0.1


@pytest.mark.parametrize("name", registry.METHODS["loss"])
def test_a_term_asks_by_name_for_what_a_training_knows(name: str) -> None:
    known = {f"{who}_{what}" for who in ("student", "teacher") for what in ("features", "outputs", "vectors")}
    assert set(registry.needs_of(registry.find("loss", name, "--loss"))) <= known | {
        "mask",
        "masks",
        "products",
        "weights",
    }


@pytest.mark.parametrize("name", registry.METHODS["loss"])
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    leaf = random(4, 3).requires_grad_()
    student = random(4, 3, seed=1).requires_grad_()
    given = {
        "student_features": [student], "teacher_features": [leaf], "student_outputs": student, "teacher_outputs": leaf,
        "student_vectors": student, "teacher_vectors": leaf, "mask": None, "masks": [None], "products": {"a": student},
        "weights": {"a": leaf},
    }  # fmt: skip
    function = registry.find("loss", name, "--loss")
    function(**{need: given[need] for need in registry.needs_of(function)}).backward()
    assert leaf.grad is None and student.grad is not None
