"""What a student learns from its teacher's outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the Kullback-Leibler divergence of the student's classes from the teacher's.

    Args:
        student: (B, K, ...) logits.
        teacher: logits of the same shape; no gradient flows to them.
        temperature: both are divided by it and the result is multiplied by its square, so that the
            gradient keeps its size; 1 as default.

    Returns:
        Scalar, the mean over positions; 0 where both agree.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
    1503.02531, section 2.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
    return temperature**2 * divergence.mean()
