"""Images with boxes on their way to a detector: flipped, in [0, 1], in lists."""

from __future__ import annotations

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparsight.train.data.augment import Transform

DetectionBatch = tuple[list[torch.Tensor], list[dict[str, Any]]]


def detection_transform(*, is_training: bool) -> Transform:
    """Return a transform of (image, target) for torchvision's detectors.

    Resizing to the shorter side and its upper bound, normalisation and padding belong to the
    detector (`min_size`, `max_size` of `sparsight.models.faster_rcnn`): so its detections come back
    in pixels of the image as it was, and a detector says itself what it was trained at.

    Args:
        is_training: flip every other image from left to right, its boxes too, as published.

    Returns:
        A callable (uint8 image (3, H, W), target) -> (float32 image in [0, 1], target).
    """
    steps: list[Any] = [v2.RandomHorizontalFlip(0.5)] if is_training else []
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([*steps, to_float])


def collate_detection(items: list[tuple[torch.Tensor, dict[str, Any]]]) -> DetectionBatch:
    """Return (images, targets) as lists: neither sizes nor numbers of boxes are equal."""
    return [image for image, _ in items], [target for _, target in items]
