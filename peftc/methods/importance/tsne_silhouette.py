"""SLS: how well the features after a layer cluster by class in a t-SNE map.

Han et al., "Straightforward Layer-wise Pruning for More Efficient Visual Adaptation", 2024, arXiv:2407.14330,
section 3: a map of two components by scikit-learn with PCA initialisation and random state 0, each axis scaled to
[0, 1], and the mean silhouette coefficient of the map with the true labels.
"""

import numpy as np
from torch import Tensor

from peftc.errors import DataError
from peftc.methods.importance.silhouette import checked


def tsne_silhouette(*, features: Tensor, labels: Tensor, perplexity: float = 30.0, seed: int = 0) -> float:
    """Return the mean silhouette coefficient in [-1, 1] of the features' t-SNE map with the true labels.

    Args:
        features: (n, width), one row per sample after a layer.
        labels: (n,), its class.
        perplexity: of t-SNE; below n.
        seed: of t-SNE; the paper's is 0.

    Raises:
        WeightError, DataError: as for `silhouette`, or the samples are too few for the perplexity.
    """
    return with_map(features=features, labels=labels, perplexity=perplexity, seed=seed)[0]


def with_map(*, features: Tensor, labels: Tensor, perplexity: float = 30.0, seed: int = 0) -> tuple[float, np.ndarray]:
    """Return the score, and the map (n, 2) that it is taken of, each axis scaled to [0, 1]."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    _, classes = checked(features, labels)
    if len(features) <= perplexity:
        what = f"{len(features)} samples are too few for t-SNE at perplexity {perplexity:g}"
        why = "it needs more samples than that; the paper takes 1,000"
        raise DataError(what, why=why, hint="use more samples, or `--score silhouette`")
    points = features.float().cpu().numpy()
    found = np.zeros((len(points), 2))
    if points.std(0).any():  # else all are in one place, and t-SNE would divide by 0
        found = TSNE(n_components=2, init="pca", random_state=seed, perplexity=perplexity).fit_transform(points)
    low, high = found.min(0), found.max(0)
    scaled = np.asarray((found - low) / np.where(high > low, high - low, 1.0))
    return float(silhouette_score(scaled, classes)), scaled
