"""Detection as a Lightning task: torchvision's losses, COCO's metric, the published optimiser."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsight.measure import MacCount, count_macs, count_published_macs
from sparsight.train.annealing import warmup_steps_down
from sparsight.train.architecture import DetectorArchitecture
from sparsight.train.average_precision import average_precision, to_coco
from sparsight.train.data.boxes import DetectionBatch
from sparsight.train.data.coco import Coco
from sparsight.train.processes import gather_lists
from sparsight.train.sampled_task import SampledTask


class DetectionTask(SampledTask):
    """Trains a detector, dense or sampled, on lists of images and targets.

    With a distiller, its teacher and student are backbones with their pyramids, and what it
    compares are their maps: the losses of detection count whole beside it. What the heads return
    is not distilled. Objectness has two classes, whose softened forms say little more than the
    labels do, and the box heads of teacher and student look at different proposals.

    What is charged is a share of the backbone's MACs (`.backbone.body`), as in the paper's tables:
    pyramid and heads cost the same in every variant, and what the box head costs depends on how
    many proposals survive.

    Args:
        model: torchvision's detector, as `build_dense` and `convert` make it of `architecture`.
        architecture: as for `SampledTask`.
        val_data: the images that the validation batches are of; has the annotations and numbers the
            classes.
        optimizer: "sgd" as published: momentum 0.9, 500 steps of warm-up from a third (at most a
            twentieth of the run), a tenth less after 8/12 and 11/12 of it. "adamw", that of the
            other tasks, for short runs from random weights.
        lr: peak learning rate; default 0.01 as published for 8 images a step.
        weight_decay: default 1e-4 as published.
        scalar_lr_factor: as for `SampledTask`; default 1 as published, which 176,000 steps are
            enough for.
        options: the other arguments of `SampledTask`.

    Logs the four losses by torchvision's names, `val_ap`, `val_ap50`, `val_ap75` beside what
    `SampledTask` logs.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: DetectorArchitecture,
        *,
        val_data: Coco,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.01,
        weight_decay: float = 1e-4,
        scalar_lr_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            architecture,
            lr=lr,
            weight_decay=weight_decay,
            scalar_lr_factor=scalar_lr_factor,
            **options,
        )
        self.optimizer_name = optimizer
        self.val_data = val_data
        self._detections: list[dict[str, Any]] = []
        self._seen: list[int] = []

    def inputs_of(self, batch: DetectionBatch) -> list[Tensor]:
        """Return the images."""
        return batch[0]

    def task_loss(self, batch: DetectionBatch) -> Tensor:
        """Return the sum of the detector's losses."""
        images, targets = batch
        # An image without an object teaches what background is; torchvision takes empty boxes.
        wanted = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
        shown: list[Tensor] = []
        detector: Any = self.model
        handle = detector.backbone.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
        try:
            with self.recording() as features:
                losses: dict[str, Tensor] = self.model(images, wanted)
        finally:
            handle.remove()
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        loss = torch.stack(list(losses.values())).sum()
        if self.distiller is None:
            return loss
        # Resized, normalised and padded once: the teacher sees what the student's backbone saw.
        return self.distiller.loss(shown[0], None, features=features, hard_loss=loss)

    def dense_macs(self, batch: DetectionBatch) -> int:
        """Return the dense backbone's MACs of the batch, at the size that it is padded to."""
        tensors = self.backbone_input(batch[0])
        size = tensors.shape[-2], tensors.shape[-1]
        if size not in self._macs_per_image:
            self._macs_per_image[size] = count_published_macs(self.model, size=size).dense
        return self._macs_per_image[size] * len(tensors)

    def counted_macs(self, batch: DetectionBatch) -> MacCount:
        """Return what the backbone computes for a validation batch."""
        detector: Any = self.model
        return count_macs(detector.backbone.body, self.backbone_input(batch[0]))

    @torch.no_grad()
    def backbone_input(self, images: list[Tensor]) -> Tensor:
        """Return images as the backbone sees them: resized, normalised, padded to one size."""
        return backbone_input(self.model, images)

    def update_metric(self, batch: DetectionBatch) -> None:
        """Collect what is found."""
        images, targets = batch
        # In float32 whatever the training's precision: torchvision's suppression of overlapping
        # boxes wants boxes and scores of one dtype.
        with torch.autocast(images[0].device.type, enabled=False):
            detections = self.model(images)
        for found, target in zip(detections, targets, strict=True):
            self._seen.append(int(target["image_id"]))
            self._detections += to_coco(
                found,
                image_id=int(target["image_id"]),
                category_of=self.val_data.category_of,
            )

    def compute_metric(self) -> dict[str, Any]:
        """Return COCO's average precision over the images seen, of all processes together."""
        seen, detections = self._seen, self._detections
        self._seen, self._detections = [], []
        seen, detections = gather_lists(seen), gather_lists(detections)
        score = average_precision(self.val_data.ground_truth(seen), detections)
        values = {"val_ap": score.ap, "val_ap50": score.ap50, "val_ap75": score.ap75}
        return {name: value for name, value in values.items() if value is not None}

    def configure_optimizers(self) -> Any:
        """Return the published SGD with its steps, or the other tasks' AdamW."""
        if self.optimizer_name == "adamw":
            return super().configure_optimizers()
        optimizer = torch.optim.SGD(self.trained_groups(), lr=self.lr, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        warmup_steps = min(500, int(self.warmup * total))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_steps_down(step, total_steps=total, warmup_steps=warmup_steps),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def backbone_input(detector: Any, images: list[Tensor]) -> Tensor:
    """Return images as a detector's backbone sees them.

    Args:
        detector: one of torchvision's.
        images: (3, H, W) each, float in [0, 1], any sizes.

    Returns:
        (B, 3, Hp, Wp) channels-last, resized, normalised and padded to multiples of 32.
    """
    batch, _ = detector.transform(images)
    return batch.tensors.contiguous(memory_format=torch.channels_last)
