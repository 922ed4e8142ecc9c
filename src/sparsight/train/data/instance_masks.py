"""Images with masks on their way to a model that proposes some: flipped, in [0, 1], in lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sparsight.train.data.augment import Transform
from sparsight.train.data.boxes import DetectionBatch, collate_detection, detection_transform


def proposal_transform(
    *,
    is_training: bool = False,
    scales: Sequence[float] = (),
    is_flipped: bool = True,
    crop_scale: float | None = None,
) -> Transform:
    """Return a transform of (image, target) for `sparsight.models.InstanceFCN`.

    Resizing and normalisation belong to the model. At what scale it is to see a training image is
    drawn here, where draws are a function of seed, epoch and image.

    Args:
        is_training: draw; False leaves image and target as they are, but for the range of pixels.
        scales: one of them becomes the target's "scale".
        is_flipped: also flip every other image from left to right, its boxes and masks too, as
            DeepMask does; the paper does not say.
        crop_scale: at scales above it, images are cropped so that they are no larger than at this
            one: a step at scale 4 costs 16 times one at scale 1 otherwise. See `crop_around`.

    Returns:
        A callable (uint8 image (3, H, W), target) -> (float32 image in [0, 1], target).

    Raises:
        ValueError: `crop_scale` is not above 0.
    """
    if crop_scale is not None and not crop_scale > 0:
        raise ValueError(
            f"proposal_transform: crop_scale={crop_scale}; a scale above 0 is required, as the "
            "factors in scales are; pass one of them, or leave it out to crop nothing."
        )
    flipped = detection_transform(is_training=is_training and is_flipped)
    if not is_training:
        return flipped

    def transform(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        image, target = flipped(image, target)
        scale = scales[int(torch.randint(len(scales), ()))]
        share = 1.0
        if crop_scale is not None and scale > crop_scale:
            share = crop_scale / scale
            image, target = crop_around(image, target, share)
        # The model measures scales by the image that it is given.
        return image, {**target, "scale": scale * share, "crop_share": share}

    return transform


def crop_around(
    image: torch.Tensor, target: dict[str, Any], share: float
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Cut out a part of an image, with an object in it if one fits.

    Args:
        image: (3, H, W).
        target: "boxes" (N, 4) x0 y0 x1 y1, "masks" (N, H, W), "iscrowd" (N,); "labels" (N,) if any.
        share: height and width of the part over those of the image.

    Returns:
        The part, and what is in it: objects that are cut become crowds, neither object nor
        background; those outside are left out. Draws are from torch's global generator.
    """
    sides = [max(1, round(side * share)) for side in image.shape[-2:]]
    boxes = target["boxes"].as_subclass(torch.Tensor)
    is_crowd = target["iscrowd"].bool()
    size = torch.tensor([sides[1], sides[0]], dtype=boxes.dtype)
    fits = ((boxes[:, 2:] - boxes[:, :2] <= size).all(1) & ~is_crowd).nonzero().flatten()
    chosen = boxes[fits[int(torch.randint(len(fits), ()))]] if len(fits) else None
    corner = []
    for axis, side in ((1, sides[0]), (0, sides[1])):  # rows, columns
        first, last = 0, image.shape[-2:][1 - axis] - side
        if chosen is not None:
            first = max(first, math.ceil(float(chosen[axis + 2])) - side)
            last = max(first, min(last, math.floor(float(chosen[axis]))))
        corner.append(first + int(torch.randint(last - first + 1, ())))
    top, left = corner
    rows, columns = slice(top, top + sides[0]), slice(left, left + sides[1])
    inner = torch.tensor([left, top, left + sides[1], top + sides[0]], dtype=boxes.dtype)
    clipped = torch.cat(
        [torch.maximum(boxes[:, :2], inner[:2]), torch.minimum(boxes[:, 2:], inner[2:])], dim=1
    )
    is_seen = (clipped[:, 2:] > clipped[:, :2]).all(1)
    is_cut = (clipped != boxes).any(1)
    new = {
        "boxes": (clipped - inner[[0, 1, 0, 1]])[is_seen],
        "masks": target["masks"].as_subclass(torch.Tensor)[is_seen, rows, columns],
        "iscrowd": (is_crowd | is_cut)[is_seen].to(target["iscrowd"].dtype),
    }
    if "labels" in target:
        new["labels"] = target["labels"][is_seen]
    return image.as_subclass(torch.Tensor)[:, rows, columns], {**target, **new}


def collate_proposals(items: list[tuple[torch.Tensor, dict[str, Any]]]) -> DetectionBatch:
    """Return (images, targets) as lists, all at the scale of the first.

    Next to an image of 900 pixels one of 120 would be padding, which costs as much.
    """
    images, targets = collate_detection(items)
    if "scale" in targets[0]:
        scale = targets[0]["scale"] / targets[0].get("crop_share", 1.0)
        targets = [{**t, "scale": scale * t.get("crop_share", 1.0)} for t in targets]
    return images, targets
