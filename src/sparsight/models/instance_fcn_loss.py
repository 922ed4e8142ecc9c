"""What InstanceFCN is told: objectness of windows, and masks of those that hold an object.

Letters in shapes: N number of objects, M number of windows, m cells a side of a window, h w height
and width of the map in cells, H W those of the image in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight.models.window_sampling import WindowSample, corner_windows
from sparsight.ops import assemble_windows, windows_inside

Normalize = Literal["pixels", "windows", "none"]
NORMALIZATIONS = get_args(Normalize)
MaskTarget = Literal["binary", "share"]
MASK_TARGETS = get_args(MaskTarget)


def mask_cells(
    masks: Tensor,
    *,
    size: tuple[int, int],
    map_size: tuple[int, int],
    stride: int = 8,
    target: MaskTarget = "binary",
) -> Tensor:
    """Return how much of each cell of a map belongs to each object.

    Args:
        masks: (N, H, W) bool or integer of 0 and 1, of the image as it is.
        size: height and width in pixels that the image was resized to.
        map_size: height and width of the map, in cells; what lies beyond the image is no object.
        stride: pixels a cell.
        target: "binary": 1 for cells that are covered by half or more, 0 for others. "share": the
            covered share.

    Returns:
        (N, h, w) float32 in [0, 1].
    """
    x = F.interpolate(
        masks[:, None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
    )
    height, width = (cells * stride for cells in map_size)
    x = F.pad(x, (0, width - size[1], 0, height - size[0]))
    share = F.avg_pool2d(x, stride)[:, 0]
    return (share >= 0.5).float() if target == "binary" else share


@dataclass
class LossSums:
    """Both losses, added up image by image.

    Attributes:
        objectness: sum over windows.
        windows: how many, as they count.
        mask: sum over the cells of positive windows.
        positives: how many positive windows, as they count.
        pixels: how many of their cells lie in the map, as they count.
    """

    objectness: Tensor
    windows: Tensor
    mask: Tensor
    positives: Tensor
    pixels: Tensor

    @staticmethod
    def nothing(like: Tensor) -> LossSums:
        """Return zeros on the device of a tensor."""
        zero = torch.zeros((), device=like.device)
        return LossSums(zero, zero, zero, zero, zero)

    def add(
        self,
        score_maps: Tensor,
        objectness: Tensor,
        sample: WindowSample,
        masks: Tensor,
        *,
        size: tuple[int, int],
        window: int,
        target: MaskTarget = "binary",
    ) -> None:
        """Add one image.

        Args:
            score_maps: (k * k, h, w) logits.
            objectness: (h, w) logits.
            sample: windows of the image.
            masks: (N, H, W), the objects that its `owner` counts.
            size: height and width in pixels that the image was resized to.
            window: m.
            target: see `mask_cells`.
        """
        logits = objectness[sample.cells[:, 0], sample.cells[:, 1]].float()
        each = F.binary_cross_entropy_with_logits(
            logits, sample.is_positive.float(), reduction="none"
        )
        self.objectness = self.objectness + (each * sample.weight).sum()
        self.windows = self.windows + sample.weight.sum()
        chosen = sample.is_positive
        if not chosen.any():
            return
        weight = sample.weight[chosen][:, None, None]
        owners, which = sample.owner[chosen].unique(return_inverse=True)
        map_size = objectness.shape[0], objectness.shape[1]
        cells = mask_cells(masks[owners], size=size, map_size=map_size, target=target)
        # One map for each object, and one bin: the target is cut out as the windows are.
        wanted = assemble_windows(
            cells[:, None], corner_windows(sample.cells[chosen], which, size=window), size=window
        )
        windows = corner_windows(sample.cells[chosen], 0, size=window)
        found = assemble_windows(score_maps[None].float(), windows, size=window)
        inside = windows_inside(windows, size=window, height=map_size[0], width=map_size[1])
        each = F.binary_cross_entropy_with_logits(found, wanted, reduction="none") * inside
        self.mask = self.mask + (each * weight).sum()
        self.positives = self.positives + weight.sum()
        self.pixels = self.pixels + (inside * weight).sum()

    def losses(self, normalize: Normalize) -> dict[str, Tensor]:
        """Return the losses of the batch.

        Args:
            normalize: "pixels": the mean over windows, and that over their cells. "windows": over
                windows both. "none": the sums, as the paper writes them.
        """
        if normalize == "none":
            return {"loss_objectness": self.objectness, "loss_mask": self.mask}
        over = self.pixels if normalize == "pixels" else self.positives
        return {
            "loss_objectness": self.objectness / self.windows.clamp(min=1),
            "loss_mask": self.mask / over.clamp(min=1),
        }
