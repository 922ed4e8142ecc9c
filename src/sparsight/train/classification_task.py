"""Classification of whole images as a Lightning task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sparsight.train.architecture import Architecture
from sparsight.train.distillation import distillation
from sparsight.train.sampled_task import SampledTask


def top_k_accuracies(num_classes: int) -> nn.ModuleDict:
    """Return torchmetrics' accuracies over all images, "top1" and, above five classes, "top5"."""
    options: dict[str, Any] = {"average": "micro", "validate_args": False}
    metrics: dict[str, nn.Module] = {"top1": MulticlassAccuracy(num_classes, **options)}
    if num_classes > 5:
        metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, **options)
    return nn.ModuleDict(metrics)


class ClassificationTask(SampledTask):
    """Trains a classifier, dense or sampled, on (images, classes).

    Args:
        model: (B, 3, H, W), or clips (B, 1, T, H, W), -> (B, K) logits.
        architecture: as for `SampledTask`.
        teacher: a model of the same contract that is learnt from, usually the dense network that
            `model` was made of; None for the labels alone. It is run in eval mode and is not saved
            with the training state.
        teacher_weight: of the divergence from the teacher, beside the cross-entropy's 1.
        teacher_temperature: of that divergence; 4 by default, so that the unlikely classes teach
            too.
        **options: the other arguments of `SampledTask`.

    Logs `val_top1` and, above five classes, `val_top5` beside what `SampledTask` logs.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        teacher: nn.Module | None = None,
        teacher_weight: float = 1.0,
        teacher_temperature: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(model, architecture, **options)
        # In a tuple: a child would be trained, saved, and set to training mode.
        self._teacher = None if teacher is None else (teacher.eval().requires_grad_(False),)
        self.teacher_weight = teacher_weight
        self.teacher_temperature = teacher_temperature
        self.accuracies = top_k_accuracies(architecture.num_classes)

    def task_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy, and the divergence from the teacher if there is one."""
        images = self.inputs_of(batch)
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, batch[1])
        if self._teacher is None:
            return loss
        with torch.no_grad():
            taught = self._teacher[0].to(images.device)(images).float()
        divergence = distillation(logits, taught, temperature=self.teacher_temperature)
        return loss + self.teacher_weight * divergence

    def update_metric(self, batch: tuple[Tensor, Tensor]) -> None:
        """Count images whose class is the likeliest, or among the five likeliest."""
        logits = self.model(self.inputs_of(batch)).float()
        for metric in self.accuracies.values():
            metric.update(logits, batch[1])  # type: ignore[operator]  # a ModuleDict of metrics

    def compute_metric(self) -> dict[str, Any]:
        """Return the accuracies in [0, 1]."""
        found = {}
        for name, metric in self.accuracies.items():
            found[f"val_{name}"] = metric.compute()  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]
        return found
