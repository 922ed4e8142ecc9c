"""The list of positions that are computed, with counts that stay inside fixed-size tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsight.ops import reference


@dataclass(frozen=True)
class Sites:
    """Active positions of each image of a batch, in a tensor of static shape.

    Attributes:
        index: (B, Ho*Wo) int32; flat positions y*Wo + x, the active ones first, ascending, then the
            holes, ascending.
        count: (B,) int32; how many of `index` are active.
        height: Ho.
        width: Wo.
    """

    index: Tensor
    count: Tensor
    height: int
    width: int

    def to_mask(self) -> Tensor:
        """The (B, 1, Ho, Wo) bool mask that these sites came from."""
        return reference.mask_from_sites(self.index, self.count, self.height, self.width)


def sites_from_mask(mask: Tensor) -> Sites:
    """List the active sites of a sampling mask.

    Args:
        mask: (B, 1, Ho, Wo) bool on any device.

    Returns:
        Sites on the same device; nothing is copied to the host.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask is not (B, 1, Ho, Wo).
    """
    check_mask("sites_from_mask", mask)
    index, count = torch.ops.sparsight.sites_from_mask(mask)
    return Sites(index, count, mask.shape[2], mask.shape[3])


def check_mask(caller: str, mask: Tensor) -> None:
    """Raise unless `mask` is a (B, 1, H, W) bool tensor."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{caller}: mask has dtype {mask.dtype}; a bool tensor is needed: threshold it, e.g. mask >= 0.5."
        )
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"{caller}: mask has shape {tuple(mask.shape)}; (B, 1, height, width) is needed: "
            "one channel, at the resolution of the convolution's output."
        )
