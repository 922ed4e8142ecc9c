"""The images that a method looks at, as a list of what the model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["read_batches"]


def read_batches(images: Any, batch_size: int | None) -> list[Any]:
    """Return a tensor in parts, or the batches of an iterable, without labels.

    Args:
        images: see `prune_channels`.
        batch_size: of a tensor's parts; None: as many images as have 2**18 pixels, at most 128.

    Raises:
        ValueError: no images, of a wrong shape or dtype, or with values that are not finite.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"prune_channels: images have shape {tuple(images.shape)} and dtype "
                f"{images.dtype}; floating point (N, C, H, W) is required; add the missing "
                "dimension or convert."
            )
        pixels = max(1, images.shape[2] * images.shape[3])
        size = batch_size or max(1, min(128, (1 << 18) // pixels))
        batches = list(images.split(size)) if len(images) else []
    else:
        batches = [_without_labels(batch) for batch in images]
    if not batches or any(len(batch) == 0 for batch in batches):
        raise ValueError(
            "prune_channels: images hold no image, or a batch without one; some hundred are "
            "required; pass a sample of the training images."
        )
    for i, batch in enumerate(batches):
        for image in [batch] if isinstance(batch, Tensor) else batch:
            if not torch.isfinite(image).all():
                raise ValueError(
                    f"prune_channels: images: batch {i} holds NaN or infinite values; finite ones "
                    "are required; look for a division by zero in the preprocessing."
                )
    return batches


def _without_labels(batch: Any) -> Any:
    first = batch[0] if isinstance(batch, list | tuple) and len(batch) > 0 else None
    if isinstance(first, Tensor) and first.ndim == 4:
        return first
    if isinstance(batch, tuple) and isinstance(first, list | tuple):
        return list(first)
    return batch
