"""Masks of objects, drawn over a picture."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sparsight.train.pictures import colour_of


def blend_masks(pixels: np.ndarray, masks: Tensor) -> np.ndarray:
    """Return a picture half covered by masks, a colour each, with their outlines.

    Args:
        pixels: uint8 (H, W, 3).
        masks: (n, H, W) bool, best first; better ones are drawn over others.

    Returns:
        uint8 (H, W, 3).
    """
    picture = pixels.copy()
    for number in range(len(masks) - 1, -1, -1):
        mask = masks[number].cpu().numpy().astype(bool)
        colour = np.array(colour_of(number), dtype=np.uint16)
        picture[mask] = ((pixels[mask].astype(np.uint16) + colour) // 2).astype(np.uint8)
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        picture[mask & ~inner] = colour.astype(np.uint8)
    return picture
