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

    Raises:
        TypeError: index or count is not int32.
        ValueError: their shapes do not fit. Their values are trusted: `sites_from_mask` makes them.
    """

    index: Tensor
    count: Tensor
    height: int
    width: int

    def __post_init__(self) -> None:
        for name, tensor in (("index", self.index), ("count", self.count)):
            if tensor.dtype != torch.int32:
                raise TypeError(
                    f"Sites: {name} has dtype {tensor.dtype}; torch.int32 is needed: build sites "
                    "with sites_from_mask."
                )
        needed = (*self.count.shape, self.height * self.width)
        if self.count.ndim != 1 or self.index.shape != needed:
            raise ValueError(
                f"Sites: index has shape {tuple(self.index.shape)} and count "
                f"{tuple(self.count.shape)}; (B, {self.height * self.width}) and (B,) are "
                "needed: build sites with sites_from_mask."
            )

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

    Example:
        >>> import torch
        >>> from sparsight.ops import sites_from_mask
        >>> sites = sites_from_mask(torch.eye(2, dtype=torch.bool).view(1, 1, 2, 2))
        >>> sites.index, sites.count  # the active positions, then the holes
        (tensor([[0, 3, 1, 2]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    check_mask("sites_from_mask", mask)
    index, count = torch.ops.sparsight.sites_from_mask(mask)
    return Sites(index, count, mask.shape[2], mask.shape[3])


def check_mask(caller: str, mask: Tensor) -> None:
    """Raise unless `mask` is a (B, 1, H, W) bool tensor."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{caller}: mask has dtype {mask.dtype}; a bool tensor is needed: "
            "threshold it, e.g. mask >= 0.5."
        )
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"{caller}: mask has shape {tuple(mask.shape)}; (B, 1, height, width) is needed: "
            "one channel, at the resolution of the convolution's output."
        )
