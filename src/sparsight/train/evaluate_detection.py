"""What a detector scores on COCO and what it computes for that, on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsight.measure import count_macs
from sparsight.train.average_precision import AveragePrecision, average_precision, to_coco
from sparsight.train.data.boxes import DetectionBatch
from sparsight.train.data.coco import Coco
from sparsight.train.detection_task import backbone_input
from sparsight.train.tally import ComputeTally

_BACKBONE = "backbone.body."


@dataclass(frozen=True)
class DetectionScore:
    """A detection score beside its cost.

    Attributes:
        metrics: COCO's summary.
        num_images: images scored.
        macs_dense: MACs per image of the dense backbone (`.backbone.body`), at the size that the
            detector resizes and pads each image to.
        macs_total: mean MACs per image that ran in the backbone, sampler heads and interpolation
            included.
        share: `macs_total / macs_dense`, what a budget is about.
        detector_macs_dense: MACs per image of the whole detector with all masks full; pyramid and
            heads included.
        detector_macs_total: mean MACs per image that ran in the whole detector.
        density: share of positions computed, per sampler; empty for a dense model.
    """

    metrics: AveragePrecision
    num_images: int
    macs_dense: float
    macs_total: float
    share: float
    detector_macs_dense: float
    detector_macs_total: float
    density: dict[str, float]

    @property
    def figures(self) -> dict[str, float | None]:
        """The metrics by name, the one that models are compared by first."""
        return {name: value for name, value in vars(self.metrics).items() if name != "class_ap"}

    def __str__(self) -> str:
        ap, ap50 = (
            "none" if value is None else f"{100 * value:.2f}"
            for value in (self.metrics.ap, self.metrics.ap50)
        )
        text = f"AP {ap}, AP50 {ap50} on {self.num_images} images"
        text += f"; {self.macs_total / 1e9:.3f} GMACs per image in the backbone"
        if self.density:
            mean = sum(self.density.values()) / len(self.density)
            text += f", {self.share:.3f} of the dense {self.macs_dense / 1e9:.3f}"
            text += f"; mean density {mean:.3f}"
        return text + f"; {self.detector_macs_total / 1e9:.3f} in all"


@torch.no_grad()
def score_detector(
    model: nn.Module, batches: Iterable[DetectionBatch], *, data: Coco
) -> DetectionScore:
    """Return COCO's metrics, MACs and densities of a dense, sparsified or frozen detector.

    Args:
        model: in eval mode; a list of images -> a list of {"boxes", "labels", "scores"}.
        batches: (images, targets) of `data`, unaugmented; only these images are scored.
        data: has the annotations.

    Cost: two passes over the images, one of them inside `count_macs`.

    Raises:
        ValueError: no batch arrived.
    """
    tally = ComputeTally(model)
    seen: list[int] = []
    detections = []
    dense = total = 0
    for images, targets in batches:
        found, _, counted = tally.run(images)
        for one, target in zip(found, targets, strict=True):
            seen.append(target["image_id"])
            detections += to_coco(one, image_id=target["image_id"], category_of=data.category_of)
        rows = [row for row in counted.layers if row.name.startswith(_BACKBONE)]
        dense += sum(row.dense for row in rows)
        total += sum(row.total for row in rows)
    tally.check("score_detector")
    return DetectionScore(
        metrics=average_precision(data.ground_truth(seen), detections),
        num_images=len(seen),
        macs_dense=dense / len(seen),
        macs_total=total / len(seen),
        share=total / dense,
        detector_macs_dense=tally.macs_dense,
        detector_macs_total=tally.macs_total,
        density=tally.density,
    )


@torch.no_grad()
def measured_backbone_share(detector: nn.Module, batches: Iterable[list[Tensor]]) -> float:
    """Return the share of the dense backbone's MACs that a detector computes for lists of images.

    Cost: one pass of the backbone; pyramid and heads do not run.
    """
    dense = total = 0
    for images in batches:
        tensors = backbone_input(detector, images)
        counted = count_macs(detector.get_submodule("backbone.body"), tensors)
        dense, total = dense + counted.dense, total + counted.total
    return total / dense
