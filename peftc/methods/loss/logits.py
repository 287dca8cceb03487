"""Logit distillation: the student's distribution over classes or tokens is the teacher's.

`kl`: T^2 KL(teacher || student) at temperature T, Hinton, Vinyals and Dean, "Distilling the knowledge in a neural
network", 2015, arXiv 1503.02531, section 2. `mse`: the mean squared error of logits, PELA's flag, off in all its runs.

Of a teacher of whom only the likeliest words are kept, all others count as one word: by the chain rule that is the
divergence less what is left among the others, so never more than it.
"""

import functools
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from peftc.methods.loss.features import per_sample
from peftc.nn.vocabulary import Foremost, Kept, Logits, Unread, by_rows, logs_of


def logits(
    *,
    student_outputs: Logits,
    teacher_outputs: Kept,
    mask: Tensor | None,
    temperature: float = 1.0,
    form: str = "kl",
) -> Tensor:
    """Return the distance of the student's outputs from the teacher's.

    Args:
        student_outputs: (batch, classes), or (batch, tokens, classes).
        teacher_outputs: of the same shape; or the likeliest words of it at that temperature, for ``kl``.
        mask: (batch, tokens), 0 at padding, or None.
        temperature: > 0, of ``kl``.
        form: ``kl`` or ``mse``.

    Raises:
        ValueError: ``form`` is neither, or the temperature is not above 0.
    """
    if form not in ("kl", "mse") or temperature <= 0:
        raise ValueError(f"form is {form!r}, not `kl` or `mse`, or the temperature {temperature} is not above 0")
    distance = functools.partial(_squared if form == "mse" else _divergence, temperature=temperature)
    if isinstance(teacher_outputs, Foremost):
        each = _of_some(student_outputs, teacher_outputs, temperature)[..., None]
    elif isinstance(student_outputs, Unread) and isinstance(teacher_outputs, Unread):
        teacher = replace(teacher_outputs, hidden=teacher_outputs.hidden.detach())
        each = by_rows(distance, [student_outputs.flat(), teacher.flat()]).view(*student_outputs.shape[:-1], 1)
    else:
        assert isinstance(student_outputs, Tensor) and isinstance(teacher_outputs, Tensor)
        each = distance(student_outputs, teacher_outputs.detach())[..., None]
    return per_sample(each, mask).mean()


def _of_some(student: Logits, teacher: Foremost, temperature: float) -> Tensor:
    """Return the divergence over some words and all others together."""

    def distance(logits: Tensor, words: Tensor, p: Tensor) -> Tensor:
        return (p.exp() * (p - logs_of(logits, words, temperature))).sum(-1) * temperature**2

    if isinstance(student, Tensor):
        return distance(student, teacher.words, teacher.logs)
    flat = [each.flatten(0, -2) for each in (teacher.words, teacher.logs)]
    return by_rows(distance, [student.flat()], *flat).view(student.shape[:-1])


def _squared(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return (student.float() - teacher.float()).square().mean(-1)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (F.log_softmax(each.float() / temperature, -1) for each in (teacher, student))
    return (p.exp() * (p - q)).sum(-1) * temperature**2
