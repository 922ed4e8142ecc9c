"""Images with masks on their way to a model that proposes some: flipped, in [0, 1], in lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsight.train.data.augment import Transform
from sparsight.train.data.boxes import DetectionBatch, collate_detection, detection_transform


def proposal_transform(
    *, is_training: bool = False, scales: Sequence[float] = (), is_flipped: bool = True
) -> Transform:
    """Return a transform of (image, target) for `sparsight.models.InstanceFCN`.

    Resizing and normalisation belong to the model. At what scale it is to see a training image is
    drawn here, where draws are a function of seed, epoch and image.

    Args:
        is_training: draw; False leaves image and target as they are, but for the range of pixels.
        scales: one of them becomes the target's "scale".
        is_flipped: also flip every other image from left to right, its boxes and masks too, as
            DeepMask does; the paper does not say.

    Returns:
        A callable (uint8 image (3, H, W), target) -> (float32 image in [0, 1], target).
    """
    flipped = detection_transform(is_training=is_training and is_flipped)
    if not is_training:
        return flipped

    def transform(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        image, target = flipped(image, target)
        return image, {**target, "scale": scales[int(torch.randint(len(scales), ()))]}

    return transform


def collate_proposals(items: list[tuple[torch.Tensor, dict[str, Any]]]) -> DetectionBatch:
    """Return (images, targets) as lists, all at the scale of the first.

    Next to an image of 900 pixels one of 120 would be padding, which costs as much.
    """
    images, targets = collate_detection(items)
    if "scale" in targets[0]:
        targets = [{**target, "scale": targets[0]["scale"]} for target in targets]
    return images, targets
