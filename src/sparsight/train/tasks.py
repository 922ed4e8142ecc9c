"""Segmentation as a Lightning task: loss and metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from sparsight.train.architecture import Architecture
from sparsight.train.processes import reduce_over_processes
from sparsight.train.sampled_task import SampledTask


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Return the IoU of each class from a confusion matrix.

    Args:
        confusion: (K, K) counts of pixels, rows truth, columns prediction.

    Returns:
        (K,) float64 in [0, 1]; NaN for a class that neither truth nor prediction contains, so that
        `nanmean` is the mIoU.
    """
    counts = confusion.double()
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return torch.where(union > 0, hits / union.clamp(min=1), torch.nan)


class SegmentationTask(SampledTask):
    """Trains a segmentation model, dense or sampled, on (images, class maps).

    Args:
        model: (B, 3, H, W) -> {"out": (B, K, H, W) logits}.
        architecture: as for `SampledTask`.
        ignore_index: label of the pixels that do not count.
        pixel_loss: (logits, class maps) -> scalar, the mean over the batch, instead of the
            cross-entropy over its pixels; None for that.
        **options: the other arguments of `SampledTask`.

    Logs `val_miou` beside what `SampledTask` logs.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        ignore_index: int,
        pixel_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, architecture, **options)
        self.pixel_loss = pixel_loss
        self.ignore_index = ignore_index
        self.confusion = MulticlassConfusionMatrix(
            architecture.num_classes, ignore_index=ignore_index, validate_args=False
        )

    def task_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss over the pixels that count; with a distiller, its loss.

        The teacher's part is over all pixels: it has something to say about the void ones too.
        """
        images = self.inputs_of(batch)
        with self.recording() as features:
            logits = self.model(images)["out"].float()
        if self.pixel_loss is None:
            loss = F.cross_entropy(
                logits, batch[1], ignore_index=self.ignore_index, reduction="sum"
            ) / self._mean_num_pixels(batch[1])
        else:
            loss = self.pixel_loss(logits, batch[1])
        if self.distiller is None:
            return loss
        return self.distiller.loss(images, logits, features=features, hard_loss=loss)

    def _mean_num_pixels(self, labels: Tensor) -> Tensor:
        """Pixels that count, the mean over processes: then all weigh the same in their gradient."""
        counted = (labels != self.ignore_index).sum().float()
        return reduce_over_processes(counted, "mean").clamp(min=1.0)

    def update_metric(self, batch: tuple[Tensor, Tensor]) -> None:
        """Count pixels, at the size of the annotation."""
        labels = batch[1]
        logits = self.model(self.inputs_of(batch))["out"].float()
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        self.confusion.update(logits.argmax(1), labels)

    def compute_metric(self) -> dict[str, Any]:
        """Return the mIoU."""
        miou = intersection_over_union(self.confusion.compute()).nanmean().float()
        self.confusion.reset()
        return {"val_miou": miou}
