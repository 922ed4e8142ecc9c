"""The assembling module of InstanceFCN in plain aten: the truth for tests, and the general path.

Shapes: N images of H x W cells, k * k score maps, M windows of m x m cells (m is `size`). A window
is (image, row, column), the last two of its top-left cell, which may lie anywhere.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["assemble_windows", "assemble_windows_backward", "bins_of", "windows_inside"]


def bins_of(size: int, k: int, centred: bool, device: torch.device | None = None) -> Tensor:
    """Which of the k bins of an axis each of `size` cells belongs to: (m,) int64, ascending.

    floor((i + 0.5) k / m) where `centred`, else floor(i k / m), both exact.
    """
    i = torch.arange(size, device=device)
    if centred:
        return (2 * i + 1) * k // (2 * size)
    return i * k // size


def _cells(windows: Tensor, size: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows (M, m, 1) and columns (M, 1, m) of the windows' cells."""
    steps = torch.arange(size, device=windows.device)
    # Wholly outside stays so; and no sum of a place and a step overflows.
    y = windows[:, 1].clamp(-size, height)[:, None] + steps
    x = windows[:, 2].clamp(-size, width)[:, None] + steps
    return y[:, :, None], x[:, None, :]


def windows_inside(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Which cells of each window lie in a map of height x width.

    Args:
        windows: (M, 3) int64; the image is not looked at.
        size: cells along each side of a window.
        height: of the map, in cells.
        width: of the map, in cells.

    Returns:
        (M, m, m) bool.
    """
    y, x = _cells(windows, size, height, width)
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


def _places(
    windows: Tensor, size: int, centred: bool, shape: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Image, channel, row and column that each cell is copied from; and (M, m, m), whether it is.

    What is not copied has a place, too: some cell of the maps, which must not be empty.
    """
    images, channels, height, width = shape
    y, x = _cells(windows, size, height, width)
    b = windows[:, 0, None, None]
    inside = windows_inside(windows, size, height, width) & (b >= 0) & (b < images)
    k = math.isqrt(channels)
    g = bins_of(size, k, centred, windows.device)
    place = (
        b.clamp(0, images - 1),
        g[:, None] * k + g,
        y.clamp(0, height - 1),
        x.clamp(0, width - 1),
    )
    return place, inside


def assemble_windows(score_maps: Tensor, windows: Tensor, size: int, centred: bool) -> Tensor:
    """Copy each window's cells from the score maps of their bins: what the kernels must equal.

    Args:
        score_maps: (N, k * k, H, W).
        windows: (M, 3) int64.
        size: cells along each side of a window.
        centred: see `bins_of`.

    Returns:
        (M, m, m): F[image, g(i) k + g(j), row + i, column + j]; 0 outside of the map, and of a
        window that names no image.
    """
    if score_maps.numel() == 0:
        return score_maps.new_zeros((windows.shape[0], size, size))
    place, inside = _places(windows, size, centred, score_maps.shape)
    return torch.where(inside, score_maps[place], 0)


def assemble_windows_backward(
    grad: Tensor, windows: Tensor, shape: Sequence[int], centred: bool
) -> Tensor:
    """Gradient of `assemble_windows`.

    Args:
        grad: (M, m, m).
        windows: as given to `assemble_windows`.
        shape: of its score maps.
        centred: see `bins_of`.

    Returns:
        (N, k * k, H, W): for each cell of the maps, the sum of `grad` where it was copied to.
    """
    total = grad.new_zeros(shape)
    if total.numel() == 0 or grad.numel() == 0:
        return total
    place, inside = _places(windows, grad.shape[1], centred, shape)
    return total.index_put_(place, torch.where(inside, grad, 0), accumulate=True)
