"""Whom a run's student learns from, and how: the flags, and the `Distiller` that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsight.compress import Distiller
from sparsight.models import load_resnet_cifar
from sparsight.train.architecture import Architecture
from sparsight.train.checkpoint import load_checkpoint
from sparsight.train.hardware import Hardware
from sparsight.train.initial_weights import initial_network


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Whom a run's student learns from, and how. The recipes take each as a flag.

    Attributes:
        teacher: file of a trained network's weights; None for the annotations alone.
        temperature: of the soft term, see `distillation_loss`.
        alpha: weight of the soft term, see `distillation_loss`.
    """

    teacher: str | None = None
    temperature: float = 4.0
    alpha: float = 0.9

    def distiller(self, student: nn.Module, like: Architecture, **options: Any) -> Distiller | None:
        """Return what teaches `student`; None without a teacher.

        Args:
            student: the network that is trained.
            like: architecture of the dense student; see `load_teacher`.
            **options: further arguments of `Distiller`.
        """
        if self.teacher is None:
            return None
        teacher = load_teacher(self.teacher, like=like)
        teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Distiller(
            teacher, student, temperature=self.temperature, alpha=self.alpha, **options
        )


def load_teacher(path: str | Path, *, like: Architecture) -> nn.Module:
    """Return a trained network that can teach one of another architecture."""
    if Path(path).suffix == ".safetensors":
        teacher, architecture = load_checkpoint(path)
        num_classes = architecture.num_classes
        task = architecture.task
    elif like.model == "resnet_cifar":
        teacher = load_resnet_cifar(path)
        num_classes, task = teacher.linear.out_features, like.task
    else:
        return initial_network(replace(like, sampling=None), path)
    if (task, num_classes) != (like.task, like.num_classes):
        raise ValueError(
            f"load_teacher: {str(path)!r} is for {task} in {num_classes} classes, the student for "
            f"{like.task} in {like.num_classes}; the same task and classes are required; pass the "
            "weights of a teacher of this data set."
        )
    return teacher


def shared_flags(
    *,
    teacher: str | None = None,
    distill_temperature: float = 4.0,
    distill_alpha: float = 0.9,
    **hardware: Any,
) -> tuple[Distillation, Hardware]:
    """Return what the flags say that all recipes share.

    Args:
        teacher: weights of a trained network to learn from beside the annotations: a checkpoint
            (*.safetensors) of any architecture for the same task and classes, or a state_dict saved
            with torch, of a CIFAR ResNet of any depth or of the student's own architecture. None:
            the annotations alone.
        distill_temperature: softens the classes of both in the loss; 1 leaves them as they are.
        distill_alpha: weight of the teacher's classes in [0, 1]; 1 minus it is that of the
            annotations.
        **hardware: flags of `sparsight.train.Hardware`: processes, machines, memory.
    """
    distillation = Distillation(
        teacher=teacher, temperature=distill_temperature, alpha=distill_alpha
    )
    return distillation, Hardware(**hardware)
