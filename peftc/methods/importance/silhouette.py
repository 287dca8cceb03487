"""Silhouette of the features themselves: how well they cluster by class, without a map.

Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of cluster analysis", Journal of
Computational and Applied Mathematics 20, 1987: per sample s = (b - a) / max(a, b), a the mean distance to its own class
and b the smallest mean distance to another. SLS (arXiv 2407.14330) takes it of t-SNE maps; this is the quick
cross-check, and not the same at one threshold.
"""

import numpy as np
from torch import Tensor

from peftc.errors import DataError, WeightError


def silhouette(*, features: Tensor, labels: Tensor) -> float:
    """Return the mean silhouette coefficient in [-1, 1] of features with the true labels.

    Args:
        features: (n, width), one row per sample after a layer.
        labels: (n,), its class.

    Raises:
        WeightError: a feature is NaN or infinite.
        DataError: there are fewer than two classes, or a class has one sample.
    """
    from sklearn.metrics import silhouette_score

    points, classes = checked(features, labels)
    return float(silhouette_score(points, classes))


def checked(features: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels as arrays, and refuse what no silhouette is defined for."""
    points, classes = features.double().cpu().numpy(), labels.cpu().numpy()
    if not np.isfinite(points).all():
        why = f"{int((~np.isfinite(points)).any(1).sum())} samples have NaN or infinity"
        raise WeightError("the features are not finite", why=why)
    values, counts = np.unique(classes, return_counts=True)
    if len(values) < 2:
        why = "a silhouette compares classes"
        raise DataError("the samples are all of one class", why=why, hint="use more classes")
    if counts.min() < 2:
        what = f"{int((counts < 2).sum())} of {len(values)} classes have one sample only"
        why = "a silhouette compares a sample with others of its class"
        raise DataError(what, why=why, hint="use more samples, or leave those classes out")
    return points, classes
