"""Embedding distillation: pooled vectors of samples, and how alike the samples of a batch are, stay the teacher's.

The squared distance of normalised vectors, plus the squared error of their cosines within the batch (Park et al.,
"Relational knowledge distillation", 2019, arXiv 1904.05068, for the second half). For models that give vectors, as
sentence encoders and dual encoders do: what users compare is the cosine.
"""

from torch import Tensor


def embeddings(*, student_vectors: Tensor, teacher_vectors: Tensor, similarities: float = 1.0) -> Tensor:
    """Return the distance of the student's vectors from the teacher's.

    Args:
        student_vectors, teacher_vectors: (samples, width), of length 1.
        similarities: weight of the cosines between the samples of a batch, >= 0.
    """
    student, teacher = student_vectors.float(), teacher_vectors.detach().float()
    pointwise = (student - teacher).square().sum(1).mean()
    return pointwise + similarities * (student @ student.T - teacher @ teacher.T).square().mean()
