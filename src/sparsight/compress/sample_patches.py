"""Positions in a convolution's output map, and the windows of its input that they see.

Letters in shapes: B images, P positions of each, C channels, H W height and width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["draw_positions", "gather_positions", "gather_windows"]


def draw_positions(num_images: Sequence[int], num_positions: int, *, seed: int) -> list[Tensor]:
    """Return positions for every image of every batch, the same for every layer of the network.

    They are drawn independently for every image, where the published code draws them once for a
    batch: neighbouring pictures then show different places.

    Args:
        num_images: B of each batch.
        num_positions: P, positions of an image.
        seed: any integer; the same seed gives the same positions.

    Returns:
        One (B, P, 2) per batch, in [0, 1): shares of height and width. A map of H rows is read in
        row floor(share * H), so that two maps of one size are read at the same places.
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(b, num_positions, 2, generator=generator).double() for b in num_images]


def _rows_and_columns(shares: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    size = torch.tensor([height, width], dtype=torch.float64, device=shares.device)
    # A share just below one may be rounded up to the size itself.
    index = torch.minimum((shares * size).floor(), size - 1).long()
    return index[..., 0], index[..., 1]


def gather_positions(features: Tensor, shares: Tensor) -> Tensor:
    """Return the features at the positions: (B * P, C).

    Args:
        features: (B, C, H, W).
        shares: (B, P, 2) as from `draw_positions`.
    """
    shares = shares.to(features.device)
    row, column = _rows_and_columns(shares, *features.shape[2:])
    image = torch.arange(len(features), device=features.device)[:, None]
    return features.permute(0, 2, 3, 1)[image, row, column].flatten(0, 1)


def gather_windows(x: Tensor, conv: nn.Conv2d, shares: Tensor, size: tuple[int, int]) -> Tensor:
    """Return what a convolution reads at positions of its output: (B * P, C * kh * kw).

    Padding (of any mode), stride and dilation are the convolution's. Columns are ordered as in
    ``conv.weight.flatten(1)`` of an ungrouped convolution: of a grouped one, each group of outputs
    reads its own share of the channels.

    Args:
        x: (B, C, H, W), the convolution's input.
        conv: the convolution; only its geometry is read.
        shares: (B, P, 2) as from `draw_positions`.
        size: (height, width) of the convolution's output.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padding = conv._reversed_padding_repeated_twice
    padded = F.pad(x, padding, mode=mode) if any(padding) else x
    shares = shares.to(x.device)
    row, column = _rows_and_columns(shares, *size)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    rows = (row * sh)[..., None] + torch.arange(kh, device=x.device) * dh
    columns = (column * sw)[..., None] + torch.arange(kw, device=x.device) * dw
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    windows = padded.permute(0, 2, 3, 1)[image, rows[..., :, None], columns[..., None, :]]
    return windows.permute(0, 1, 4, 2, 3).flatten(0, 1).flatten(1)
