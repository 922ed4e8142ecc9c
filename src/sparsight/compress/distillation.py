"""What a student loses against its teacher's softened classes and against the labels.

N is the number of positions that a mean is over: samples, or samples times pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["distillation_loss"]

# Elements of the logits that are worked on at once: ten temporaries of 2 MiB in float32.
_CHUNK_ELEMENTS = 1 << 19


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    ignore_index: int = -100,
    distills_ignored: bool = True,
) -> Tensor:
    """Return `alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy`, a scalar.

    Both terms are means over samples and pixels. KL is that of the softmax over classes of the
    logits divided by the temperature T; its factor T^2 keeps the size of its gradient, whatever T.
    Without labels the loss is `T^2 * KL` alone, and alpha does not matter.

    `alpha` weighs the *soft* term. The paper's text and torchdistill weigh the hard one; their
    alpha is 1 minus this one. torchdistill also leaves T^2 out where there are no labels; here it
    is always there. `torch.nn.KLDivLoss(reduction="batchmean")` divides by the samples alone: for
    maps of logits it is H * W times this mean.

    Args:
        student_logits: (B, C, ...) floating point, any memory format and any number of spatial
            axes, such as (B, C) or (B, C, H, W). Has a gradient.
        teacher_logits: the same shape, floating point of any width. Takes no gradient.
        labels: (B, ...) int64 classes in [0, C), or `ignore_index`; None for the teacher alone.
        temperature: T > 0, of both softmaxes of the soft term; 4 as usual for CIFAR (the paper
            tries 1 to 20). The hard term is at 1, as the student is used afterwards.
        alpha: weight of the soft term in [0, 1]; 0.9: the paper finds that a considerably lower
            weight of the labels works best.
        ignore_index: label of the positions without one. They have no hard term, and are not
            counted in its mean; a batch without any label has a hard term of 0.
        distills_ignored: the soft term is over all positions, since the teacher says something
            about those that nobody labelled too. False leaves the ignored ones out of it and of
            its mean.

    Returns:
        Scalar in float32, float64 for logits in float64. 0 for an empty batch; NaN where a logit
        that counts is NaN.

    Raises:
        TypeError: logits that are not floating point, labels that are not int64.
        ValueError: shapes or devices that do not fit, temperature or alpha out of range, or, on the
            CPU, a label that is neither a class nor `ignore_index`.

    Cost: one copy of the student's logits for the gradient, made while the loss is computed; what
    else is needed is held for half a million logits at a time. Computed in float32 at least, also
    under autocast.

    Gradient: `alpha * T * (q - p) / N` for the soft term, p and q being the teacher's and the
    student's softened classes; exactly 0 where both have equal logits in equal order of memory. It
    has no gradient of its own.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]])
        >>> print(f"{distillation_loss(student, teacher, temperature=4.0):.4f}")
        0.3282

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
    1503.02531, section 2.
    """
    _check_logits(student_logits, teacher_logits)
    _check_numbers(temperature, alpha)
    if labels is None:
        alpha = 1.0
    else:
        _check_labels(student_logits, labels, ignore_index)
    return _Distillation.apply(
        student_logits,
        teacher_logits.detach(),
        labels,
        float(temperature),
        float(alpha),
        ignore_index,
        distills_ignored,
    )


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not logits.is_floating_point():
            raise TypeError(
                f"distillation_loss: {name} is {logits.dtype}; floating point logits are required, "
                "what the network returns before softmax or argmax; pass those, or labels as "
                "`labels`."
            )
    if student.ndim < 2:
        raise ValueError(
            f"distillation_loss: student_logits has shape {tuple(student.shape)}; (B, C, ...) with "
            "the classes on axis 1 is required; add the axis of the batch with logits[None]."
        )
    if student.ndim != teacher.ndim or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"distillation_loss: student_logits has shape {tuple(student.shape)}, teacher_logits "
            f"{tuple(teacher.shape)}; equal shapes are required; run both on the same images."
        )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"distillation_loss: student_logits has {student.shape[1]} classes, teacher_logits "
            f"{teacher.shape[1]}; the same classes are required; pick the common ones of both on "
            "axis 1, or distil features instead (FeatureHints)."
        )
    if student.shape != teacher.shape:
        size = tuple(student.shape[2:])
        raise ValueError(
            f"distillation_loss: student_logits is a map of {size}, teacher_logits one of "
            f"{tuple(teacher.shape[2:])}; equal sizes are required; resize the logits, not their "
            f"softmax: F.interpolate(teacher_logits, size={size}, mode='bilinear', "
            "align_corners=False)."
        )
    if student.device != teacher.device:
        raise ValueError(
            f"distillation_loss: student_logits is on {student.device}, teacher_logits on "
            f"{teacher.device}; one device is required; move the teacher to {student.device}."
        )


def _check_numbers(temperature: float, alpha: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"distillation_loss: temperature={temperature}; a positive number is required; 4 is "
            "usual, 1 leaves the softmax as it is."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"distillation_loss: alpha={alpha}; the share of the soft term, in [0, 1], is "
            "required; 1 is the teacher alone, 0 the labels alone."
        )


def _check_labels(student: Tensor, labels: Tensor, ignore_index: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(
            f"distillation_loss: labels is {labels.dtype}; int64 classes are required; pass "
            "labels.long(), or soft labels as teacher_logits."
        )
    required = (student.shape[0], *student.shape[2:])
    if tuple(labels.shape) != required:
        raise ValueError(
            f"distillation_loss: labels has shape {tuple(labels.shape)}, student_logits "
            f"{tuple(student.shape)}; labels of shape {required} are required; resize the logits "
            "to the labels with F.interpolate(..., mode='bilinear', align_corners=False)."
        )
    if labels.device != student.device:
        raise ValueError(
            f"distillation_loss: labels is on {labels.device}, student_logits on {student.device}; "
            f"one device is required; pass labels.to({str(student.device)!r})."
        )
    if labels.device.type == "cpu" and labels.numel():
        is_class = (labels >= 0) & (labels < student.shape[1])
        wrong = labels[~is_class & (labels != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"distillation_loss: labels holds {int(wrong[0])}; classes in [0, "
                f"{student.shape[1]}) or ignore_index={ignore_index} are required; pass "
                f"ignore_index={int(wrong[0])} if it marks what has no label."
            )


class _Distillation(torch.autograd.Function):
    """The loss and, in the same pass over chunks of positions, its gradient.

    Composed of log_softmax, kl_div and cross_entropy it holds five more copies of the logits: 0.8
    GB for one image of 19 classes and 1024 x 2048 pixels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        temperature: float,
        alpha: float,
        ignore_index: int,
        distills_ignored: bool,
    ) -> Tensor:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=dtype, device=student.device)
        num_positions = student.numel() // max(1, student.shape[1])
        soft_weight: Any = alpha / max(1, num_positions)
        hard_weight: Any = 0.0
        if labels is not None:
            num_labelled = (labels != ignore_index).sum().clamp(min=1)
            hard_weight = (1 - alpha) / num_labelled.to(dtype)
            if not distills_ignored:
                soft_weight = alpha / num_labelled.to(dtype)
        # Elements of a mean over millions of pixels are too small for float16.
        stored = dtype if student.dtype == torch.float16 else student.dtype
        gradient = torch.empty_like(student, dtype=stored) if ctx.needs_input_grad[0] else None
        for of_logits, of_labels in _chunks(student.shape):
            z = student[of_logits].to(dtype)
            classes = None if labels is None else labels[of_labels]
            slope = torch.zeros_like(z)
            log_q = None
            if alpha > 0:
                log_q = torch.log_softmax(z / temperature, dim=1)
                log_p = torch.log_softmax(teacher[of_logits].to(dtype) / temperature, dim=1)
                p = log_p.exp()
                # A class that the teacher rules out, with a logit of -inf, adds nothing.
                kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)
                pull = log_q.exp().sub_(p)
                if classes is not None and not distills_ignored:
                    is_ignored = classes == ignore_index
                    kl = kl.masked_fill(is_ignored, 0.0)
                    pull = pull.masked_fill(is_ignored.unsqueeze(1), 0.0)
                loss += kl.sum() * (soft_weight * temperature**2)
                slope = pull.mul_(soft_weight * temperature)
            if classes is not None and alpha < 1:
                is_ignored = classes == ignore_index
                index = classes.masked_fill(is_ignored, 0).unsqueeze(1)
                reuses = log_q is not None and temperature == 1
                log_s = log_q if reuses else torch.log_softmax(z, dim=1)
                assert log_s is not None
                picked = log_s.gather(1, index).squeeze(1).masked_fill(is_ignored, 0.0)
                loss -= picked.sum() * hard_weight
                pull = log_s.exp().scatter_add_(1, index, -torch.ones_like(index, dtype=dtype))
                slope += pull.masked_fill(is_ignored.unsqueeze(1), 0.0).mul_(hard_weight)
            if gradient is not None:
                gradient[of_logits] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None, None, None, None


def _chunks(shape: torch.Size) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Indices that cut logits (B, C, ...), and labels (B, ...), into parts of bounded size.

    Whole samples, or rows of one sample.
    """
    samples, num_classes, *spatial = shape
    per_sample = max(1, num_classes * math.prod(spatial))
    num_samples = max(1, _CHUNK_ELEMENTS // per_sample)
    whole = slice(None)
    for start in range(0, samples, num_samples):
        batch = slice(start, start + num_samples)
        if per_sample <= _CHUNK_ELEMENTS or not spatial:
            yield (batch, whole), (batch,)
            continue
        num_rows = max(1, _CHUNK_ELEMENTS * spatial[0] // per_sample)
        for first in range(0, spatial[0], num_rows):
            rows = slice(first, first + num_rows)
            yield (batch, whole, rows), (batch, rows)
