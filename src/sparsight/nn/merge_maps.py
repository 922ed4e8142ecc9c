"""Concatenation and sum of maps of any sizes, as models write it down."""

from jaxtyping import Float
from torch import Tensor, nn

from sparsight.ops.merge import Merging, Resizing, merge_maps, merge_maps_plain

__all__ = ["FrozenMergeMaps", "MergeMaps"]


class MergeMaps(nn.Module):
    """Resizes maps to one size and concatenates or sums them, with torch's operators.

    A module, so that :func:`sparsight.freeze` finds it: in the frozen model all of it is one pass
    over the memory. Between the layers of a network that computes a part of each, it would cost as
    much as the layers.

    Attributes:
        merging: "concatenate" or "sum".
        resizing: "nearest", "bilinear" or "bilinear_corners" (`align_corners`).

    Args:
        merging: see attributes.
        resizing: see attributes.

    Example:
        >>> import torch
        >>> merge = MergeMaps("sum", resizing="nearest")
        >>> merge(torch.ones(1, 2, 4, 6), torch.ones(1, 2, 2, 3)).mean()
        tensor(2.)
    """

    def __init__(self, merging: Merging, *, resizing: Resizing = "bilinear") -> None:
        super().__init__()
        self.merging: Merging = merging
        self.resizing: Resizing = resizing

    def forward(
        self, *maps: Float[Tensor, "B _ _ _"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Merge.

        Args:
            maps: one or more (B, C_i, H_i, W_i) float.
            size: (height, width) of the result; default the largest height and width.

        Returns:
            (B, sum of C_i, *size), or (B, C, *size) of a sum.
        """
        return merge_maps_plain(maps, merging=self.merging, resizing=self.resizing, size=size)

    def extra_repr(self) -> str:
        """What is done, for repr."""
        return f"{self.merging!r}, resizing={self.resizing!r}"


class FrozenMergeMaps(MergeMaps):
    """The same in one pass on the CPU, see :func:`sparsight.ops.merge_maps`."""

    def forward(
        self, *maps: Float[Tensor, "B _ _ _"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """As :meth:`MergeMaps.forward`."""
        return merge_maps(maps, merging=self.merging, resizing=self.resizing, size=size)
