"""Masks of windows on their way to masks of an image: binarised, boxed, thinned out, pasted.

Letters in shapes: n number of windows or masks, m cells a side of a window, H W height and width of
the image in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowMasks:
    """What was found in windows of one image.

    Attributes:
        logits: (n, m, m), of a cell being part of the window's object.
        is_inside: (n, m, m) bool, cells that lie in the image: a rectangle of each window.
        boxes: (n, 4) float, x0 y0 x1 y1 of the windows in pixels of the image; may leave it.
        scores: (n,) logits of a window holding an object.
    """

    logits: Tensor
    is_inside: Tensor
    boxes: Tensor
    scores: Tensor

    @staticmethod
    def concatenate(parts: Sequence[WindowMasks]) -> WindowMasks:
        """Return all of several parts, in their order."""
        names = ("logits", "is_inside", "boxes", "scores")
        return WindowMasks(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def __getitem__(self, chosen: Tensor) -> WindowMasks:
        """Return some of them, by index or by a mask."""
        return WindowMasks(
            self.logits[chosen], self.is_inside[chosen], self.boxes[chosen], self.scores[chosen]
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def cells(self) -> Tensor:
        """(n, m, m) bool: the cells of the objects."""
        return (self.logits > 0) & self.is_inside

    def tight_boxes(self) -> Tensor:
        """Return (n, 4) x0 y0 x1 y1 around the objects' cells, in pixels; 0 where there is none."""
        cells = self.cells
        size = cells.shape[-1]
        x0, y0, x1, y1 = self.boxes.unbind(1)
        ends = []
        for along, start, stop in ((1, x0, x1), (2, y0, y1)):
            first, last = _ends(cells.any(along))
            step = (stop - start) / size
            ends.append((start + first * step, start + (last + 1) * step))
        (left, right), (top, bottom) = ends
        tight = torch.stack([left, top, right, bottom], dim=1)
        return torch.where(cells.flatten(1).any(1)[:, None], tight, 0)


def _ends(is_there: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index of what is there along the last axis, as float32."""
    counts = is_there.to(torch.int64)
    size = is_there.shape[-1]
    first = counts.argmax(-1)
    last = size - 1 - counts.flip(-1).argmax(-1)
    return first.float(), last.float()


def keep_distinct(
    found: WindowMasks, *, size: tuple[int, int], threshold: float, most: int
) -> WindowMasks:
    """Return the windows with the best scores whose masks' boxes differ.

    Args:
        found: of all scales together; windows without a positive cell are dropped.
        size: height and width of the image in pixels, which boxes are clipped to.
        threshold: largest IoU of two boxes that both stay.
        most: number of windows that stay.

    Returns:
        In the order of their scores, best first.

    Source: the paper's non-maximum suppression, on the tight boxes of the binary masks.
    """
    from torchvision.ops import nms  # heavy: only for those who ask for proposals

    found = found[found.cells.flatten(1).any(1)]
    boxes = found.tight_boxes()
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    kept = nms(boxes, found.scores.float(), threshold)
    return found[kept[:most]]


def paste_masks(found: WindowMasks, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks of windows at the resolution of the image.

    Probabilities are interpolated bilinearly between the centres of the cells that lie in the
    image, and cut at a half. Each window is computed where it lies only.

    Args:
        found: n windows.
        size: height H and width W of the image in pixels.

    Returns:
        (n', H, W) bool, (n', 4) float32 x0 y0 x1 y1 around them, and (n',) int64, which windows
        they are of: those of no pixel are left out.

    Cost: n * H * W bytes.
    """
    height, width = size
    masks = torch.zeros(len(found), height, width, dtype=torch.bool, device=found.logits.device)
    boxes: list[list[float]] = []
    kept: list[int] = []
    probability = found.logits.float().sigmoid()
    inside_rows, inside_columns = found.is_inside.any(2), found.is_inside.any(1)
    for i, corners in enumerate(found.boxes.tolist()):
        across = _taps(corners[0], corners[2], width, inside_columns[i])
        down = _taps(corners[1], corners[3], height, inside_rows[i])
        if across is None or down is None:
            continue
        rows = torch.lerp(
            probability[i][down.low], probability[i][down.high], down.fraction[:, None]
        )
        patch = torch.lerp(rows[:, across.low], rows[:, across.high], across.fraction[None]) > 0.5
        (left, right), (top, bottom) = (
            [int(end) for end in _ends(patch.any(axis))] for axis in (0, 1)
        )
        if not patch[top].any():
            continue
        region = (
            slice(down.start, down.start + len(down.low)),
            slice(across.start, across.start + len(across.low)),
        )
        masks[len(kept)][region] = patch
        boxes.append(
            [
                across.start + left,
                down.start + top,
                across.start + right + 1,
                down.start + bottom + 1,
            ]
        )
        kept.append(i)
    tight = torch.tensor(boxes, dtype=torch.float32, device=masks.device).reshape(-1, 4)
    return masks[: len(kept)], tight, torch.tensor(kept, dtype=torch.int64, device=masks.device)


@dataclass(frozen=True)
class _Taps:
    """The pixels of one axis that a window covers: `start` the first, and what each interpolates.

    Attributes:
        start: of the axis, in pixels.
        low: (p,) int64 cell before each pixel's centre.
        high: (p,) int64 cell behind it.
        fraction: (p,) float32 weight of `high`.
    """

    start: int
    low: Tensor
    high: Tensor
    fraction: Tensor


def _taps(first: float, last: float, length: int, is_inside: Tensor) -> _Taps | None:
    """Taps of a window from `first` to `last` pixels; None if it covers no pixel of the image."""
    start = max(0, math.ceil(first - 0.5))
    stop = min(length, math.floor(last - 0.5) + 1)  # pixels whose centres lie in the window
    if stop <= start or not is_inside.any():
        return None
    least, most = (int(end) for end in _ends(is_inside))
    centres = torch.arange(start, stop, device=is_inside.device, dtype=torch.float32) + 0.5
    place = (centres - first) / (last - first) * len(is_inside) - 0.5
    place = place.clamp(least, most)
    low = place.floor().long().clamp(max=most)
    high = (low + 1).clamp(max=most)
    return _Taps(start, low, high, place - low)
