"""The cross-entropy of the pixels that a network does worst at."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_PUBLISHED_SHARE = 1 / 16


def bootstrapped_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    share: float = _PUBLISHED_SHARE,
    num_pixels: int | None = None,
) -> Tensor:
    """Return the mean over the images of the mean cross-entropy of each image's K worst pixels.

    Args:
        logits: (B, C, H, W) before softmax, floating point.
        labels: (B, H, W) int64 class maps.
        ignore_index: label of the pixels that do not count: they are taken out before the worst are
            looked for.
        share: K over H * W, in (0, 1]; default 1/16, the published K of both networks at the sizes
            they were trained at (8,192 at 256x512 and 512 * 64 = 32,768 at 512x1024), so that other
            sizes get what is in proportion. 1 is the cross-entropy, averaged by image.
        num_pixels: K itself instead of a share. An image with fewer pixels that count is averaged
            over those; one with none gives 0.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: a share outside (0, 1], fewer than one pixel, or shapes that do not fit.

    Gradient: to the logits of the chosen pixels.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
        >>> logits[0, 1, 0, 0] = 20.0  # one pixel is wrong
        >>> bootstrapped_cross_entropy(logits, labels, ignore_index=255).item()
        20.0

    Source: Pohlen, Hermans, Mathias, Leibe, CVPR 2017, arXiv 1611.08323, section 4; K and the void
    pixels as in the authors' code of the paper's time (github.com/TobyPDE/FRRN, of whose text
    nothing is used). The later version of that code divides by K whatever counts.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if logits.ndim != 4 or tuple(labels.shape) != expected:
        raise ValueError(
            f"bootstrapped_cross_entropy: logits have shape {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}; (B, C, H, W) and (B, H, W) are required; resize the logits to "
            "the class maps first."
        )
    if not 0.0 < share <= 1.0:
        raise ValueError(
            f"bootstrapped_cross_entropy: share={share}; a share of the pixels in (0, 1] is "
            "required; leave it out for the published sixteenth."
        )
    if num_pixels is not None and num_pixels < 1:
        raise ValueError(
            f"bootstrapped_cross_entropy: num_pixels={num_pixels}; at least 1 is required; leave "
            "it out for a share of the image."
        )
    height, width = labels.shape[1:]
    k = max(1, round(share * height * width)) if num_pixels is None else num_pixels
    k = min(k, height * width)
    logits = logits if logits.dtype.itemsize > 4 else logits.float()
    # Pixels that do not count have loss 0, the least there is: sorted, they come last.
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    worst = losses.flatten(1).topk(k, dim=1).values.sum(1)
    counted = (labels != ignore_index).flatten(1).sum(1).clamp(min=1, max=k)
    return (worst / counted).mean()
