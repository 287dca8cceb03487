"""Feature distillation: every layer of the student gives what the teacher's layer gives.

PELA (arXiv 2310.10700): the mean squared error between the residual streams after each layer, all tokens, before the
final norm, averaged over layers. Padding does not count, and every sample counts the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def features(
    *,
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scale_free: bool = False,
) -> Tensor:
    """Return the distance of the student's layers from the teacher's.

    Args:
        student_features, teacher_features: one tensor (batch, ...) per layer, mostly (batch, tokens, width).
        masks: of each layer (batch, tokens), 0 at padding, or None.
        scale_free: divide each layer's by the variance of the teacher's features there, so that no layer and no model
            counts for more because its numbers are larger; PELA does not.
    """
    total = torch.zeros((), device=student_features[0].device)
    for student, teacher, mask in zip(student_features, teacher_features, masks, strict=True):
        teacher = teacher.detach().float()
        distance = per_sample((student.float() - teacher).square(), mask)
        if scale_free:
            spread = per_sample((teacher - _mean_token(teacher, mask)).square(), mask).mean()
            distance = distance / spread.clamp_min(torch.finfo(torch.float32).tiny)
        total = total + distance.mean()
    return total / len(student_features)


def per_sample(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return (batch,): the mean of (batch, tokens, ...) over what the mask keeps of each sample."""
    if mask is None or not _applies(mask, values):
        return values.flatten(1).mean(1)
    weights = mask.to(values.dtype)
    return (values.flatten(2).mean(2) * weights).sum(1) / weights.sum(1).clamp_min(1)


def _mean_token(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over samples and tokens, in the shape of one token."""
    if mask is None or not _applies(mask, values):
        return values.mean(tuple(range(values.ndim - 1)))
    return values[mask.bool()].mean(0)


def _applies(mask: Tensor, values: Tensor) -> bool:
    return values.ndim >= 3 and values.shape[:2] == mask.shape
