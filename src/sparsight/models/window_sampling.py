"""Which sliding windows are positive, negative or neither, and which of them a step trains on.

Windows are squares of m x m cells on a map of stride s, centred at its cells.
Letters in shapes: N number of objects, M number of windows, h w height and width of the map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEGATIVE = -1
IGNORED = -2


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """When a window holds an object, and when it holds none; lengths are shares of its side.

    Defaults are DeepMask's, mapped from patches of 224 pixels to windows of any size.

    Attributes:
        object_side: longer side of an object that fills the window as it should: 128 / 224, which
            is 96 pixels in a window of 168.
        positive_shift: largest distance, down and across, from the window's centre to that of the
            object's box: 16 / 224, which is 12 pixels of 168.
        negative_shift: from this distance on a window is negative: 32 / 224.
        positive_octaves: largest distance in scale, as log2 of the longer side over `object_side`.
            0.3 here: DeepMask's 0.25 leaves gaps between image sizes that differ by 1.5.
        negative_octaves: from this distance in scale on a window is negative: a factor of 2.

    Source: Pinheiro, Collobert, Dollar, "Learning to Segment Object Candidates", NIPS 2015, arXiv
    1506.06204, section 3.2, to which InstanceFCN refers.
    """

    object_side: float = 128 / 224
    positive_shift: float = 16 / 224
    negative_shift: float = 32 / 224
    positive_octaves: float = 0.3
    negative_octaves: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.object_side <= 1:
            raise ValueError(
                f"WindowRule: object_side={self.object_side}; a share of the window's side in "
                "(0, 1] is required; leave it out for DeepMask's."
            )
        for least, most in (
            (self.positive_shift, self.negative_shift),
            (self.positive_octaves, self.negative_octaves),
        ):
            if not 0 <= least <= most:
                raise ValueError(
                    f"WindowRule: positive tolerance {least} and negative one {most}; 0 <= "
                    "positive <= negative is required, or windows would be both; widen the "
                    "negative one."
                )


@dataclass(frozen=True)
class WindowSample:
    """Windows of one image that a step trains on.

    Attributes:
        cells: (M, 2) int64, row and column of their centres.
        owner: (M,) int64, the object in each; negative ones have -1.
        weight: (M,) float32, how often each counts.
    """

    cells: Tensor
    owner: Tensor
    weight: Tensor

    @property
    def is_positive(self) -> Tensor:
        """(M,) bool."""
        return self.owner >= 0


def label_windows(
    boxes: Tensor,
    is_crowd: Tensor,
    *,
    map_size: tuple[int, int],
    size: int,
    stride: int = 8,
    rule: WindowRule | None = None,
) -> Tensor:
    """Return what the window at each position of a map holds.

    A window is positive for an object that is centred in it and fills it, within the tolerances of
    `rule`; of several the one centred best has it. It is negative if it is far from being positive
    for every object, in place or in scale. Windows centred in the box of a crowd are no negatives:
    an object may be there.

    Args:
        boxes: (N, 4) x0 y0 x1 y1 in pixels of the image that the map is of.
        is_crowd: (N,) bool; these are no objects.
        map_size: height and width of the map, in cells.
        size: m, cells a side of a window.
        stride: pixels a cell.
        rule: the tolerances; default: DeepMask's.

    Returns:
        (h, w) int64: the index of an object, -1 for negative, -2 for neither.
    """
    rule = rule or WindowRule()
    height, width = map_size
    side = float(size * stride)
    boxes = boxes.to(torch.float64)
    rows = (torch.arange(height, device=boxes.device, dtype=torch.float64) + 0.5) * stride
    columns = (torch.arange(width, device=boxes.device, dtype=torch.float64) + 0.5) * stride
    labels = torch.full((height, width), NEGATIVE, dtype=torch.int64, device=boxes.device)
    for x0, y0, x1, y1 in boxes[is_crowd]:
        inside = ((rows >= y0) & (rows <= y1))[:, None] & ((columns >= x0) & (columns <= x1))
        labels[inside] = IGNORED
    objects = (~is_crowd).nonzero().flatten()
    if not len(objects):
        return labels
    x0, y0, x1, y1 = boxes[objects].T
    down = (rows[None] - ((y0 + y1) / 2)[:, None]).abs() / side  # (N, h)
    across = (columns[None] - ((x0 + x1) / 2)[:, None]).abs() / side  # (N, w)
    shift = torch.maximum(down[:, :, None], across[:, None, :])  # (N, h, w)
    longer = torch.maximum(x1 - x0, y1 - y0)
    octaves = (longer / (rule.object_side * side)).log2().abs()[:, None, None]  # inf for a point
    is_near = (shift < rule.negative_shift) & (octaves < rule.negative_octaves)
    labels[is_near.any(0)] = IGNORED
    is_fitting = (shift <= rule.positive_shift) & (octaves <= rule.positive_octaves)
    best = torch.where(is_fitting, shift + octaves, torch.inf).argmin(0)
    is_positive = is_fitting.any(0)
    labels[is_positive] = objects[best[is_positive]]
    return labels


def draw_windows(labels: Tensor, num_windows: int = 256) -> WindowSample:
    """Draw windows of one image, positive and negative ones in equal parts.

    Half of `num_windows` of each kind are drawn without repetition, from torch's global generator.
    Of a kind that has fewer all are taken, each counting for several, so that the ratio of 1:1
    holds in the loss. An image without positive windows gives its half of negative ones.

    Args:
        labels: (h, w) int64 of `label_windows`.
        num_windows: of both kinds together; 256 as published.
    """
    flat = labels.flatten()
    half = max(1, num_windows // 2)
    chosen, weights = [], []
    for places in ((flat >= 0).nonzero().flatten(), (flat == NEGATIVE).nonzero().flatten()):
        # On the CPU: the same seed draws the same windows on any device.
        order = torch.randperm(len(places))[:half].to(places.device)
        chosen.append(places[order])
        weights.append(flat.new_full((len(order),), half / max(1, len(order)), dtype=torch.float32))
    index = torch.cat(chosen)
    cells = torch.stack([index // labels.shape[1], index % labels.shape[1]], dim=1)
    return WindowSample(cells, flat[index], torch.cat(weights))


def corner_windows(cells: Tensor, image: Tensor | int, *, size: int) -> Tensor:
    """Return windows as `sparsight.ops.assemble_windows` takes them.

    Args:
        cells: (M, 2) int64, row and column of their centres; m is odd.
        image: (M,) int64, or one number: which of the batch each is of.
        size: m.

    Returns:
        (M, 3) int64: image, top row, left column; those may lie outside of the map.
    """
    corners = cells - (size - 1) // 2
    if isinstance(image, int):
        image = cells.new_full((len(cells),), image)
    return torch.cat([image[:, None], corners], dim=1)
