"""What mask proposals score and what they cost, on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.train.average_recall import AverageRecall, average_recall, to_coco_masks
from sparsight.train.data.boxes import DetectionBatch
from sparsight.train.proposal_task import count_over_scales
from sparsight.train.tally import ComputeTally


@dataclass(frozen=True)
class ProposalScore:
    """A score of mask proposals beside its cost.

    Attributes:
        metrics: average recall.
        num_images: images scored.
        num_proposals: mean proposals of an image.
        macs_dense: MACs per image of the dense network, at all scales together.
        macs_total: mean MACs per image that ran, sampler heads and interpolation included.
        share: `macs_total / macs_dense`.
        density: share of positions computed, per sampler; empty for a dense model.
    """

    metrics: AverageRecall
    num_images: int
    num_proposals: float
    macs_dense: float
    macs_total: float
    share: float
    density: dict[str, float]

    @property
    def figures(self) -> dict[str, float | None]:
        """The metrics by name, the one that models are compared by first."""
        values = dict(vars(self.metrics))
        return {"ar100": values.pop("ar100"), **values}

    def __str__(self) -> str:
        found = ", ".join(
            f"AR@{most} {'none' if value is None else f'{100 * value:.2f}'}"
            for most, value in (
                (10, self.metrics.ar10),
                (100, self.metrics.ar100),
                (1000, self.metrics.ar1000),
            )
        )
        text = f"{found} on {self.num_images} images, {self.num_proposals:.0f} proposals each"
        text += f"; {self.macs_total / 1e9:.3f} GMACs per image"
        if self.density:
            mean = sum(self.density.values()) / len(self.density)
            text += f", {self.share:.3f} of the dense {self.macs_dense / 1e9:.3f}"
            text += f"; mean density {mean:.3f}"
        return text


@torch.no_grad()
def score_proposals(
    model: nn.Module, batches: Iterable[DetectionBatch], *, data: Any
) -> ProposalScore:
    """Return average recall, MACs and densities of a dense, sparsified or frozen model.

    Images are looked at one by one, whatever the batches: a thousand masks of each take hundreds of
    megabytes. So the noise does not depend on the batch size.

    Args:
        model: in eval mode; a list of images -> a list of {"masks", "boxes", "scores"}.
        batches: (images, targets) of `data`, unaugmented; only these images are scored.
        data: has the annotations, with masks.

    Cost: two passes over the images, one of them inside `count_macs`.

    Raises:
        ValueError: no batch arrived.
    """
    tally = ComputeTally(model)
    seen: list[int] = []
    found: list[dict[str, Any]] = []
    for images, targets in batches:
        for image, target in zip(images, targets, strict=True):
            (proposals,), _, _ = tally.run([image])
            seen.append(int(target["image_id"]))
            found += to_coco_masks(proposals, image_id=seen[-1])
    tally.check("score_proposals")
    return ProposalScore(
        metrics=average_recall(data.ground_truth(seen), found),
        num_images=len(seen),
        num_proposals=len(found) / len(seen),
        macs_dense=tally.macs_dense,
        macs_total=tally.macs_total,
        share=tally.share,
        density=tally.density,
    )


def measured_network_share(model: nn.Module, batches: Iterable[list[Tensor]]) -> float:
    """Return the share of the dense MACs that a model computes for lists of images.

    Cost: one pass of the network at each scale; nothing is assembled.
    """
    dense = total = 0
    for images in batches:
        counted = count_over_scales(model, images)
        dense, total = dense + counted.dense, total + counted.total
    return total / dense
