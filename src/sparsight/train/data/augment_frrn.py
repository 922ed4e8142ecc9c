"""FRRN's augmentation: translation and gamma, nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparsight.train.data.augment import MEAN, STD, Transform

_MAX_GAMMA = 0.5


def frrn_transform(
    size: tuple[int, int],
    *,
    ignore_index: int,
    max_offset: int = 30,
    max_gamma: float = 0.05,
    crop: tuple[int, int] | None = None,
) -> Transform:
    """Return resizing, random translation, random gamma, normalisation.

    Args:
        size: (height, width) in pixels that the image is resized to.
        ignore_index: class of the pixels that a translation uncovers. The image is reflected there.
        max_offset: largest offset along each axis, in pixels of the resized image; 30 as published
            for FRRN-A at 256x512, 40 for FRRN-B at 512x1024.
        max_gamma: largest |Z|, in [0, 0.5]: Z is uniform, and the image in [0, 1] is raised to
            log(1/2 + Z/sqrt2) / log(1/2 - Z/sqrt2), which is 1 for 0 and spreads evenly round it.
        crop: (height, width) that is cut out at random, as for images whose training does not fit
            into memory; the authors have it, with crops that they choose by class. None: all.

    Returns:
        A callable (image, class map) -> (float32 (3, *size), int64 size); it draws from torch's
        global generator.

    Raises:
        ValueError: a negative offset, or a gamma outside [0, 0.5].

    Source: Pohlen et al., CVPR 2017, arXiv 1611.08323, section 4, and the authors' scripts for the
    figures. We depart in three things: class maps are subsampled to the nearest pixel, not to the
    mode of each cell; images are subsampled bilinearly with antialiasing, not by Lanczos; and what
    comes out is normalised as for torchvision's weights, not in [0, 1].
    """
    if max_offset < 0 or not 0 <= max_gamma <= _MAX_GAMMA:
        raise ValueError(
            f"frrn_transform: max_offset={max_offset}, max_gamma={max_gamma}; an offset of at "
            f"least 0 and a gamma in [0, {_MAX_GAMMA}] are required; leave them out for the "
            "published ones."
        )
    finish = v2.Compose([*([v2.RandomCrop(crop)] if crop else []), v2.Normalize(MEAN, STD)])

    def transform(image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[Tensor, Tensor]:
        small = v2.functional.resize(image, list(size)).as_subclass(Tensor)
        classes = v2.functional.resize(labels, list(size)).as_subclass(Tensor)
        down, right = torch.randint(-max_offset, max_offset + 1, (2,)).tolist()
        z = float(torch.empty(()).uniform_(-max_gamma, max_gamma))
        pixels = translate(small.float() / 255, down, right, void=None)
        shown = translate(classes, down, right, void=ignore_index)
        return finish(tv_tensors.Image(pixels ** gamma_of(z)), tv_tensors.Mask(shown))

    return transform


def gamma_of(z: float) -> float:
    """Return the exponent that a draw z stands for: 1 for 0, and the inverse for -z."""
    return math.log(0.5 + z / math.sqrt(2)) / math.log(0.5 - z / math.sqrt(2))


def translate(x: Tensor, down: int, right: int, *, void: int | None) -> Tensor:
    """Move a picture (..., H, W) by whole pixels.

    Args:
        x: floating point (C, H, W), or int64 (H, W).
        down: pixels downwards; negative upwards.
        right: pixels to the right; negative to the left.
        void: what is uncovered; None reflects the picture.

    Returns:
        The same shape.
    """
    height, width = x.shape[-2:]
    rows = torch.arange(height) - down
    columns = torch.arange(width) - right
    if void is None:
        return x[..., _reflected(rows, height), :][..., _reflected(columns, width)]
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    moved = x[..., rows.clamp(0, height - 1), :][..., columns.clamp(0, width - 1)]
    return torch.where(inside, moved, torch.full_like(moved, void))


def _reflected(index: Tensor, length: int) -> Tensor:
    """Indices beyond either end, walked back from it; the end itself is not repeated."""
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index.remainder(period)
    return torch.where(index < length, index, period - index)
