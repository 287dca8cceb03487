"""Logit distillation: the student's distribution over classes or tokens is the teacher's.

`kl`: T^2 KL(teacher || student) at temperature T, Hinton, Vinyals and Dean, "Distilling the knowledge in a neural
network", 2015, arXiv 1503.02531, section 2. `mse`: the mean squared error of logits, PELA's flag, off in all its runs.
"""

import torch.nn.functional as F
from torch import Tensor

from peftc.methods.loss.features import per_sample


def logits(
    *, student_outputs: Tensor, teacher_outputs: Tensor, mask: Tensor | None, temperature: float = 1.0, form: str = "kl"
) -> Tensor:
    """Return the distance of the student's outputs from the teacher's.

    Args:
        student_outputs, teacher_outputs: (batch, classes), or (batch, tokens, classes).
        mask: (batch, tokens), 0 at padding, or None.
        temperature: > 0, of ``kl``.
        form: ``kl`` or ``mse``.

    Raises:
        ValueError: ``form`` is neither, or the temperature is not above 0.
    """
    student, teacher = student_outputs.float(), teacher_outputs.detach().float()
    if form == "mse":
        return per_sample((student - teacher).square(), mask).mean()
    if form != "kl" or temperature <= 0:
        raise ValueError(f"form is {form!r}, not `kl` or `mse`, or the temperature {temperature} is not above 0")
    p, q = (F.log_softmax(each / temperature, -1) for each in (teacher, student))
    divergence = (p.exp() * (p - q)).sum(-1, keepdim=True)
    return per_sample(divergence, mask).mean() * temperature**2
