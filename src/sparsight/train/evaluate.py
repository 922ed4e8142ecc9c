"""What a model scores and what it computes for that, on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from sparsight.measure import count_macs
from sparsight.train.dense_inference import Averaged, Windowed
from sparsight.train.tally import ComputeTally
from sparsight.train.tasks import intersection_over_union


@dataclass(frozen=True)
class Score:
    """A segmentation score beside its cost.

    Attributes:
        miou: mean IoU in [0, 1] over the classes that occur.
        class_iou: IoU per class; None where a class neither occurs nor is predicted.
        num_images: images scored.
        macs_dense: MACs per image of the dense model, convolutions and linear layers of the whole
            model.
        macs_total: mean MACs per image that ran, sampler heads and interpolation included.
        share: `macs_total / macs_dense`.
        density: share of positions computed, per sampler, in the order they run; empty for a dense
            model.
        class_density: share of the positions on a class that are computed, mean over the samplers:
            what attracts samples. Empty for a dense model, and where the model sees the image
            scaled, mirrored or in windows.
    """

    miou: float
    class_iou: dict[str, float | None]
    num_images: int
    macs_dense: float
    macs_total: float
    share: float
    density: dict[str, float]
    class_density: dict[str, float]

    @property
    def figures(self) -> dict[str, float | None]:
        """The metrics by name, the one that models are compared by first."""
        return {"miou": self.miou}

    def __str__(self) -> str:
        text = f"mIoU {100 * self.miou:.2f} on {self.num_images} images"
        text += f"; {self.macs_total / 1e9:.3f} GMACs per image"
        if self.density:
            mean = sum(self.density.values()) / len(self.density)
            text += f", {self.share:.3f} of the dense {self.macs_dense / 1e9:.3f}"
            text += f"; mean density {mean:.3f}"
        return text


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: Sequence[str],
    ignore_index: int,
) -> Score:
    """Return mIoU, MACs and densities of a dense, sparsified or frozen model.

    Args:
        model: in eval mode; (B, 3, H, W) -> {"out": (B, K, H, W)}; also one inside
            `sparsight.train.dense_inference`.
        batches: (images, class maps); class maps may have another size than the images: the logits
            are resized to them bilinearly, so scores at different image sizes can be compared.
        classes: names of the K classes.
        ignore_index: label of pixels that do not count.

    Cost: two passes over the images, one of them inside `count_macs`.

    Raises:
        ValueError: no batch arrived.
    """
    confusion = MulticlassConfusionMatrix(
        len(classes), ignore_index=ignore_index, validate_args=False
    )
    tally = ComputeTally(model)
    sees_image = not isinstance(model, Averaged | Windowed)
    computed_on = torch.zeros(len(classes), dtype=torch.float64)
    positions_on = torch.zeros(len(classes), dtype=torch.float64)
    for images, labels in batches:
        output, decisions, _ = tally.run(images.contiguous(memory_format=torch.channels_last))
        logits = output["out"].float()
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        confusion.update(logits.argmax(1), labels)
        for decision in decisions if sees_image else ():
            at = F.interpolate(
                labels[:, None].float(), size=decision.mask.shape[-2:], mode="nearest"
            ).long()
            counts = at.numel()
            for k in range(len(classes)):
                here = at == k
                computed_on[k] += float((decision.mask & here).sum()) / counts
                positions_on[k] += float(here.sum()) / counts
    tally.check("score")
    iou = intersection_over_union(confusion.compute())
    return Score(
        miou=float(iou.nanmean()),
        class_iou={
            name: None if v != v else v for name, v in zip(classes, iou.tolist(), strict=True)
        },
        num_images=tally.num_images,
        macs_dense=tally.macs_dense,
        macs_total=tally.macs_total,
        share=tally.share,
        density={_unwrapped(model, name): value for name, value in tally.density.items()},
        class_density={
            name: float(computed_on[k] / positions_on[k])
            for k, name in enumerate(classes)
            if positions_on[k] > 0
        },
    )


def _unwrapped(model: nn.Module, name: str) -> str:
    """The name of a sampler in the model that was wrapped, if it was."""
    while isinstance(model, Averaged | Windowed):
        model, name = model.model, name.removeprefix("model.")
    return name


@torch.inference_mode()
def measured_share(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Return the share of the dense MACs that `model`, in eval mode, computes for `batches`."""
    dense = total = 0.0
    for images in batches:
        counted = count_macs(model, images.contiguous(memory_format=torch.channels_last))
        dense, total = dense + counted.dense, total + counted.total
    return total / dense
