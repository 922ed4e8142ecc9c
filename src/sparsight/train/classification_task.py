"""Classification of whole images as a Lightning task."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sparsight.train.architecture import Architecture
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
        **options: the other arguments of `SampledTask`.

    Logs `val_top1` and, above five classes, `val_top5` beside what `SampledTask` logs.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        **options: Any,
    ) -> None:
        super().__init__(model, architecture, **options)
        self.accuracies = top_k_accuracies(architecture.num_classes)

    def task_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy; with a distiller, its loss."""
        images = self.inputs_of(batch)
        with self.recording() as features:
            logits = self.model(images).float()
        if self.distiller is None:
            return F.cross_entropy(logits, batch[1])
        return self.distiller.loss(images, logits, batch[1], features=features)

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
