"""`merge_maps`: maps of any sizes resized to one size, then concatenated or summed."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight.ops import cpu
from sparsight.ops.operators import LIBRARY

__all__ = ["Merging", "Resizing", "merge_maps", "merge_maps_plain"]

Merging = Literal["concatenate", "sum"]
Resizing = Literal["nearest", "bilinear", "bilinear_corners"]

LIBRARY.define("merge_maps(Tensor[] maps, int[] size, str merging, str resizing) -> Tensor")


def _resized(x: Tensor, size: Sequence[int], resizing: str) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if resizing == "nearest":
        return F.interpolate(x, size=tuple(size), mode="nearest")
    corners = resizing == "bilinear_corners"
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=corners)


def _largest(maps: Sequence[Tensor]) -> tuple[int, int]:
    return max(x.shape[-2] for x in maps), max(x.shape[-1] for x in maps)


def merge_maps_plain(
    maps: Sequence[Tensor],
    *,
    merging: Merging,
    resizing: Resizing = "bilinear",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """As `merge_maps`, by torch's operators alone: for training, export and compilers."""
    resized = [_resized(x, size or _largest(maps), resizing) for x in maps]
    if merging == "concatenate":
        return resized[0] if len(resized) == 1 else torch.cat(resized, 1)
    total = resized[0]
    for x in resized[1:]:
        total = total + x
    return total


@torch.library.impl(LIBRARY, "merge_maps", "CPU")
def _merge_cpu(maps: Sequence[Tensor], size: Sequence[int], merging: str, resizing: str) -> Tensor:
    number = get_args(Resizing).index(resizing)
    return cpu.merge_maps(maps, (size[0], size[1]), merging == "sum", number)


@torch.library.register_fake("sparsight::merge_maps", lib=LIBRARY)
def _merge_fake(maps: Sequence[Tensor], size: Sequence[int], merging: str, resizing: str) -> Tensor:
    channels = maps[0].shape[1] if merging == "sum" else sum(x.shape[1] for x in maps)
    out = maps[0].new_empty((maps[0].shape[0], channels, size[0], size[1]))
    return out.contiguous(memory_format=torch.channels_last)


def _takes_kernel(maps: Sequence[Tensor], merging: str) -> bool:
    first = maps[0]
    if first.dtype == torch.bfloat16 and not cpu.has_bfloat16():
        return False
    if merging == "sum" and len(maps) > cpu.MAX_MERGED:
        return False
    return first.dtype in (torch.float32, torch.bfloat16) and all(
        x.device.type == "cpu"
        and x.dtype == first.dtype
        and not (x.requires_grad and torch.is_grad_enabled())
        for x in maps
    )


def merge_maps(
    maps: Sequence[Tensor],
    *,
    merging: Merging,
    resizing: Resizing = "bilinear",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Resize maps to one size and concatenate or sum them, in one pass on the CPU.

    The kernel takes float32 maps, or bfloat16 ones where the CPU has instructions for them, when no
    gradient is asked for; everything else is computed by torch's operators, one after another. Both
    choose the same positions and weights; sums differ in rounding.

    Args:
        maps: one or more (B, C_i, H_i, W_i) of one floating dtype and device; channels-last is read
            in place, other strides are copied.
        merging: "concatenate" along the channels, or "sum" of maps that all have the same.
        resizing: of the maps that are not of the size: "nearest", "bilinear" (half-pixel centres)
            or "bilinear_corners" (`align_corners`), as `torch.nn.functional.interpolate` has them.
        size: (height, width) of the result; default the largest height and the largest width.

    Returns:
        (B, sum of C_i, *size), or (B, C, *size) of a sum; of the maps' dtype, channels-last where
        the kernel made it.

    Raises:
        ValueError: no map, another rank, a different batch, an empty map or size, different
            channels in a sum, or an unknown word.
        TypeError: a map is not a floating tensor, or dtypes or devices differ.

    Example:
        >>> fine, coarse = torch.ones(1, 2, 4, 6), torch.zeros(1, 3, 2, 3)
        >>> merge_maps([fine, coarse], merging="concatenate").shape
        torch.Size([1, 5, 4, 6])
    """
    _check(maps, merging, resizing, size)
    if not _takes_kernel(maps, merging):
        return merge_maps_plain(maps, merging=merging, resizing=resizing, size=size)
    return torch.ops.sparsight.merge_maps(
        list(maps), list(size or _largest(maps)), merging, resizing
    )


def _check(
    maps: Sequence[Tensor], merging: str, resizing: str, size: tuple[int, int] | None
) -> None:
    if merging not in get_args(Merging) or resizing not in get_args(Resizing):
        raise ValueError(
            f"merge_maps: merging={merging!r}, resizing={resizing!r}; merging is one of "
            f"{get_args(Merging)}, resizing one of {get_args(Resizing)}."
        )
    if not maps:
        raise ValueError("merge_maps: maps is empty, but at least one is needed; pass one.")
    for i, x in enumerate(maps):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"merge_maps: maps[{i}] is {x.dtype if isinstance(x, Tensor) else type(x)}, but a "
                "floating tensor is needed; convert it with .float()."
            )
        if x.ndim != 4 or x.shape[0] != maps[0].shape[0] or min(x.shape[1:]) < 1:
            raise ValueError(
                f"merge_maps: maps[{i}] has shape {tuple(x.shape)}, but (B, C, H, W) with "
                f"B = {maps[0].shape[0] if maps[0].ndim == 4 else 'that of the first'} and at "
                "least one channel and position is needed; add the batch dimension with x[None]."
            )
        if x.dtype != maps[0].dtype or x.device != maps[0].device:
            raise TypeError(
                f"merge_maps: maps[{i}] is {x.dtype} on {x.device}, but maps[0] is "
                f"{maps[0].dtype} on {maps[0].device}; bring them together with .to()."
            )
        if merging == "sum" and x.shape[1] != maps[0].shape[1]:
            raise ValueError(
                f"merge_maps: maps[{i}] has {x.shape[1]} channels and maps[0] {maps[0].shape[1]}, "
                'but a sum needs the same; concatenate them with merging="concatenate".'
            )
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(
            f"merge_maps: size={size}, but (height, width) of at least 1 is needed; leave it out "
            "for the size of the largest map."
        )
