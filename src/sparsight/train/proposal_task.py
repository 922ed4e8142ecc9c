"""Mask proposals as a Lightning task: InstanceFCN's losses, recall, the published optimiser."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsight.measure import MacCount, count_macs
from sparsight.nn.evaluating import evaluating
from sparsight.train.annealing import warmup_steps_down
from sparsight.train.architecture import ProposalArchitecture
from sparsight.train.average_recall import average_recall, to_coco_masks
from sparsight.train.data.boxes import DetectionBatch
from sparsight.train.data.coco import Coco
from sparsight.train.data.voc import Voc
from sparsight.train.processes import gather_lists
from sparsight.train.sampled_task import SampledTask

_FALL = 0.8  # of the run, after which the published learning rate is a tenth: 32,000 of 40,000
_VALIDATED = 100  # proposals of an image that are scored while training


class ProposalTask(SampledTask):
    """Trains InstanceFCN, dense or sampled, on lists of images and targets with masks.

    What is charged is a share of the MACs of all its convolutions. Each image is trained at one
    scale and looked at, at inference, at all of them: measured shares are those of inference.

    Args:
        model: `sparsight.models.InstanceFCN`, as `build_dense` and `convert` make it.
        architecture: as for `SampledTask`.
        val_data: the images that the validation batches are of, with masks.
        optimizer: "sgd" as published: momentum 0.9, a tenth less after four fifths of the run.
            "adamw", that of the other tasks, for short runs from random weights.
        lr: peak learning rate; default 1e-3 as published for 8 images a step.
        weight_decay: default 5e-4 as published.
        mask_weight: of the masks' loss beside that of objectness, which counts 1.
        scalar_lr_factor: as for `SampledTask`.
        options: the other arguments of `SampledTask`.

    Logs `loss_objectness`, `loss_mask`, `val_ar10`, `val_ar100` beside what `SampledTask` logs.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: ProposalArchitecture,
        *,
        val_data: Coco | Voc,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        mask_weight: float = 1.0,
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
        self.mask_weight = mask_weight
        self.val_data = val_data
        self._found: list[dict[str, Any]] = []
        self._seen: list[int] = []

    def inputs_of(self, batch: DetectionBatch) -> list[Tensor]:
        """Return the images."""
        return batch[0]

    def task_loss(self, batch: DetectionBatch) -> Tensor:
        """Return the sum of both losses."""
        images, targets = batch
        losses: dict[str, Tensor] = self.model(images, targets)
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return losses["loss_objectness"] + self.mask_weight * losses["loss_mask"]

    def dense_macs(self, batch: DetectionBatch) -> int:
        """Return the dense network's MACs of the batch, at the scales that its targets name."""
        model: Any = self.model
        images, targets = batch
        with torch.no_grad():
            tensors, _ = model.prepare(images, [target["scale"] for target in targets])
        size = tuple(tensors.shape[1:])
        if size not in self._macs_per_image:
            with torch.no_grad(), evaluating(model):
                zeros = torch.zeros(1, *size, device=tensors.device)
                self._macs_per_image[size] = count_macs(model.network, zeros).dense
        return self._macs_per_image[size] * len(images)

    def counted_macs(self, batch: DetectionBatch) -> MacCount:
        """Return what the network computes for a validation batch, over all scales."""
        return count_over_scales(self.model, batch[0])

    def update_metric(self, batch: DetectionBatch) -> None:
        """Collect the best proposals."""
        images, targets = batch
        model: Any = self.model
        most, model.max_proposals = model.max_proposals, min(_VALIDATED, model.max_proposals)
        try:
            found = model(images)
        finally:
            model.max_proposals = most
        for one, target in zip(found, targets, strict=True):
            self._seen.append(int(target["image_id"]))
            self._found += to_coco_masks(one, image_id=int(target["image_id"]))

    def compute_metric(self) -> dict[str, Any]:
        """Return the average recall over the images seen, of all processes together."""
        seen, found = self._seen, self._found
        self._seen, self._found = [], []
        seen, found = gather_lists(seen), gather_lists(found)
        score = average_recall(self.val_data.ground_truth(seen), found)
        values = {"val_ar10": score.ar10, "val_ar100": score.ar100}
        return {name: value for name, value in values.items() if value is not None}

    def configure_optimizers(self) -> Any:
        """Return the published SGD with its step, or the other tasks' AdamW."""
        if self.optimizer_name == "adamw":
            return super().configure_optimizers()
        optimizer = torch.optim.SGD(self.trained_groups(), lr=self.lr, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_steps_down(
                step, total_steps=total, warmup_steps=0, milestones=(_FALL,)
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def count_over_scales(model: Any, images: list[Tensor]) -> MacCount:
    """Count what InstanceFCN, in eval mode, computes for images at all of its scales.

    Assembling and pasting multiply nothing that is counted.

    Args:
        model: dense, converted or frozen.
        images: (3, H, W) each.
    """
    counts = [
        count_macs(model.network, model.prepare(images, [scale] * len(images))[0])
        for scale in model.scales
    ]
    rows = {}
    for count in counts:
        for row in count.layers:
            key = row.name, row.kind
            rows[key] = rows[key] + row if key in rows else row
    return MacCount(
        sum(count.total for count in counts),
        sum(count.dense for count in counts),
        list(rows.values()),
    )
