"""Importance scores are what their papers say, on features small enough to know the answer."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from peftc.errors import DataError, WeightError
from peftc.methods import registry
from peftc.methods.importance.angular import angular
from peftc.methods.importance.block_influence import block_influence
from peftc.methods.importance.cka import cka
from peftc.methods.importance.magnitude import magnitude
from peftc.methods.importance.silhouette import silhouette
from peftc.methods.importance.tsne_silhouette import tsne_silhouette, with_map
from peftc.pruning.scores import OF_DATA


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(distance: float) -> tuple[Tensor, Tensor]:
    """60 points in three classes, whose centres are so far apart."""
    labels = torch.arange(60) % 3
    return random(60, 8) + distance * torch.eye(8)[labels], labels


def by_hand(points: np.ndarray, labels: np.ndarray) -> float:
    """The mean silhouette coefficient, straight from its definition."""
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
    found = []
    for at, own in enumerate(labels):
        means = {k: gaps[at, labels == k].sum() / ((labels == k).sum() - (k == own)) for k in np.unique(labels)}
        a, b = means.pop(own), min(means.values())
        found.append((b - a) / max(a, b))
    return float(np.mean(found))


def test_the_silhouette_is_that_of_its_definition() -> None:
    features, labels = clusters(2.0)
    assert silhouette(features=features, labels=labels) == pytest.approx(by_hand(features.numpy(), labels.numpy()))


def test_the_silhouette_of_a_map_is_sls() -> None:
    from sklearn.manifold import TSNE

    features, labels = clusters(2.0)
    plain = TSNE(init="pca", random_state=0, perplexity=10).fit_transform(features.numpy())
    scaled = (plain - plain.min(0)) / (plain.max(0) - plain.min(0))
    found = tsne_silhouette(features=features, labels=labels, perplexity=10.0)
    assert found == pytest.approx(by_hand(scaled, labels.numpy()), abs=1e-4)
    assert registry.settings_of(tsne_silhouette) == {"perplexity": 30.0, "seed": 0}


def test_clusters_score_higher_than_noise() -> None:
    for score in (silhouette, lambda **known: tsne_silhouette(**known, perplexity=10.0)):
        near, far = (score(features=f, labels=labels) for f, labels in (clusters(0.0), clusters(20.0)))
        assert near < 0.1 < 0.5 < far


def test_each_axis_of_a_map_goes_from_0_to_1_and_equal_points_have_one() -> None:
    labels = torch.arange(40) % 2
    _, found = with_map(features=random(40, 5), labels=labels, perplexity=5.0)
    assert (found.min(0), found.max(0)) == (pytest.approx([0, 0]), pytest.approx([1, 1]))
    assert not with_map(features=torch.ones(40, 5), labels=labels, perplexity=5.0)[1].any()


def test_what_no_silhouette_is_defined_for_is_refused() -> None:
    features, labels = clusters(1.0)
    for score in (silhouette, tsne_silhouette):
        with pytest.raises(DataError, match="all of one class"):
            score(features=features, labels=torch.zeros(60))
        with pytest.raises(DataError, match="1 of 4 classes have one sample only"):
            score(features=features, labels=torch.cat([labels[:-1], torch.tensor([3])]))
        with pytest.raises(WeightError, match="not finite") as refusal:
            score(features=features.index_fill(0, torch.tensor([4]), float("nan")), labels=labels)
        assert "1 samples have NaN" in str(refusal.value)
    with pytest.raises(DataError, match="30 samples are too few for t-SNE at perplexity 30"):
        tsne_silhouette(features=features[:30], labels=labels[:30])


def test_block_influence_and_angle_of_what_stays_turns_and_reverses() -> None:
    assert block_influence(cosines=torch.tensor([1.0, 1.0])) == 0
    assert block_influence(cosines=torch.tensor([1.0, 0.0, -1.0])) == pytest.approx(1.0)
    assert angular(angles=torch.tensor([0.0, 0.5])) == pytest.approx(0.25)


def test_cka_is_blind_to_rotation_and_scale_and_0_for_what_stays() -> None:
    x, (q, _) = random(50, 6), torch.linalg.qr(random(6, 6, seed=1))
    assert cka(input_features=x, features=x) == pytest.approx(0, abs=1e-12)
    assert cka(input_features=x, features=3 * x @ q + 7) == pytest.approx(0, abs=1e-5)
    assert 0.5 < cka(input_features=x, features=random(50, 4, seed=2)) <= 1


def test_cka_is_the_same_from_samples_and_from_features() -> None:
    x, y = random(20, 30).double(), random(20, 7, seed=1).double()
    x, y = x - x.mean(0), y - y.mean(0)
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    assert cka(input_features=x, features=y) == pytest.approx(1 - float((y.T @ x).square().sum() / norms))


def test_magnitude_sums_absolute_weights() -> None:
    assert magnitude(weights=[torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0]])]) == 6


@pytest.mark.parametrize("name", registry.METHODS["importance"])
def test_a_score_asks_only_for_what_a_step_knows_and_gives_a_number(name: str) -> None:
    function = registry.find("importance", name, "--score")
    needs = registry.needs_of(function)
    assert set(needs) <= {*OF_DATA, "weights"}
    features, labels = clusters(3.0)
    known = {
        "features": features, "input_features": random(60, 8), "labels": labels, "cosines": random(60).tanh(),
        "angles": random(60).sigmoid(), "weights": [features], "gradient_products": random(60), "loss": 1.0,
        "loss_without": 1.5,
    }  # fmt: skip
    found = function(**{need: known[need] for need in needs})
    assert type(found) is float and math.isfinite(found)
