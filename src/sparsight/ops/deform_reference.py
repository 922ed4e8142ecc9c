"""Deformable convolution in plain aten: the truth for tests, the path for other devices and dtypes.

Shapes: B batch, C channels, H W input size, O output channels, Ho Wo output size, T taps kh * kw,
G offset groups, L positions of the output. Differentiable by autograd, in any float dtype.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Corner(NamedTuple):
    """One of the four pixels around each point that a deformable convolution reads.

    All are (..., G, T, L). `row` counts rows of C/G channels, G of them a pixel.
    """

    row: Tensor  # 0 outside of the map
    inside: Tensor
    weight: Tensor  # bilinear
    slope_y: Tensor  # d weight / d y
    slope_x: Tensor


def _corners(
    offset: Tensor,
    positions: Tensor,
    out_width: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> list[_Corner]:
    """Corners of the points of `positions` (L), moved by `offset` (..., G, T, y and x, L)."""
    (height, width), (kernel_h, kernel_w), groups = size, kernel, offset.shape[-4]
    tap = torch.arange(kernel_h * kernel_w, device=offset.device)[:, None]
    y = positions // out_width * stride[0] - padding[0] + tap // kernel_w * dilation[0]
    x = positions % out_width * stride[1] - padding[1] + tap % kernel_w * dilation[1]
    # A half-precision sum of a position and an offset would have no fraction left.
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    # Points further out read nothing; clamped, infinite ones do too. NaN stays NaN.
    y = (y + offset[..., 0, :]).clamp(-2, height + 1)
    x = (x + offset[..., 1, :]).clamp(-2, width + 1)
    top, left = y.detach().floor(), x.detach().floor()
    vertical, horizontal = (1 - (y - top), y - top), (1 - (x - left), x - left)
    group = torch.arange(groups, device=offset.device)[:, None, None]
    corners = []
    for down in (0, 1):
        for right in (0, 1):
            row, column = top + down, left + right
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = torch.where(inside, row.long() * width + column.long(), 0)
            corners.append(
                _Corner(
                    pixel * groups + group,
                    inside,
                    vertical[down] * horizontal[right],
                    horizontal[right] if down else -horizontal[right],
                    vertical[down] if right else -vertical[down],
                )
            )
    return corners


def _values(rows: Tensor, corner: _Corner, weight: Tensor) -> Tensor:
    """Values (..., G, T, L, C/G) at a corner of an image's (or images') rows; zero outside.

    NaN and infinity under a weight of exactly zero count as zero: the kernels do not read there.
    """
    index = corner.row
    if rows.ndim == 3:
        first = torch.arange(rows.shape[0], device=rows.device) * rows.shape[1]
        index, rows = index + first[:, None, None, None], rows.flatten(0, 1)
    values = rows.index_select(0, index.flatten()).unflatten(0, index.shape)
    is_read = (weight != 0)[..., None] | values.detach().isfinite()
    return torch.where(corner.inside[..., None] & is_read, values, 0.0)


def _rows(x: Tensor, groups: int) -> Tensor:
    """(..., C, H, W) as (..., H*W*G, C/G)."""
    return x.flatten(-2).transpose(-1, -2).unflatten(-1, (groups, -1)).flatten(-3, -2)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    modulation: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Deformable convolution v1, with a modulation v2, as `torchvision.ops.deform_conv2d`.

    Tap t of output p reads x at p * stride - padding + t * dilation + offset, bilinear between
    pixels and zero outside of the map, times its modulation.

    Args:
        x: (B, C, H, W) float.
        offset: (B, 2 * G * kh * kw, Ho, Wo); y before x for each tap.
        weight: (O, C/groups, kh, kw).
        bias: (O,) or None.
        modulation: (B, G * kh * kw, Ho, Wo) or None.
        mask: (B, 1, Ho, Wo) bool; elsewhere neither offset, modulation nor x is read, and the
            output is the bias. None is all true.
        stride: vertical and horizontal step.
        padding: zero padding, vertical and horizontal.
        dilation: distance of the taps.

    Returns:
        (B, O, Ho, Wo), the dtype of `x`.
    """
    out_channels, per_group, kernel_h, kernel_w = weight.shape
    taps, out_size = kernel_h * kernel_w, offset.shape[-2:]
    offset_groups = offset.shape[1] // (2 * taps)
    if mask is not None:
        offset = torch.where(mask, offset, 0.0)
        modulation = None if modulation is None else torch.where(mask, modulation, 0.0)
    corners = _corners(
        offset.flatten(2).unflatten(1, (offset_groups, taps, 2)),
        torch.arange(out_size[0] * out_size[1], device=x.device),
        out_size[1],
        (x.shape[2], x.shape[3]),
        (kernel_h, kernel_w),
        stride,
        padding,
        dilation,
    )
    strength = 1.0 if modulation is None else modulation.flatten(2).unflatten(1, (-1, taps))
    rows = _rows(x, offset_groups)
    mixed = torch.zeros((), dtype=corners[0].weight.dtype, device=x.device)
    for corner in corners:
        share = corner.weight * strength
        mixed = mixed + share[..., None] * _values(rows, corner, share)
    if mask is not None:
        mixed = torch.where(mask.flatten(2)[:, :, None, :, None], mixed, 0.0)
    # (B, G, T, L, C/G) -> (B, T, L, groups, C/groups)
    mixed = mixed.to(x.dtype).permute(0, 2, 3, 1, 4).flatten(3).unflatten(3, (-1, per_group))
    by_group = weight.flatten(2).unflatten(0, (mixed.shape[3], -1))
    y = torch.einsum("btlgc,goct->bgol", mixed, by_group).reshape(-1, out_channels, *out_size)
    return y if bias is None else y + bias[:, None, None]


def sampled_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    *,
    modulation: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`deform_conv2d` at the sites, zero elsewhere: what the kernels must equal.

    Args:
        x: as for `deform_conv2d`, like all that is not named here.
        offset: see there.
        weight: see there.
        bias: see there.
        mask: (B, 1, Ho, Wo) bool.
        modulation: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        residual: (B, O, Ho, Wo) added before the activation, or None.
        relu: clamp at zero from below.
    """
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    y = deform_conv2d(x, offset, weight, bias, modulation, mask=mask, **numbers)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    return torch.where(mask, y, torch.zeros((), dtype=y.dtype, device=y.device))


def sampled_deform_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    modulation: Tensor | None,
    index: Tensor,
    count: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `sampled_deform_conv2d`, written out, image by image and at the sites only.

    With rows v_k of the four corners, weights w_k and modulation m, a tap is m sum_k w_k v_k; with
    the gradient h of a tap, dv_k = m w_k h, dy = m sum_k (dw_k/dy) h . v_k, dm = sum_k w_k h . v_k.

    Args:
        grad: (B, O, Ho, Wo), the gradient before residual and activation; zero off the sites.
        x: as given to `sampled_deform_conv2d`, like all that follow.
        offset: see there.
        weight: see there.
        modulation: see there.
        index: of the sites.
        count: of the sites.
        stride: see there.
        padding: see there.
        dilation: see there.

    Returns:
        Gradients of x (channels-last), offset, weight and modulation (a scalar zero where that is
        None).
    """
    taps, per_group = weight.shape[2] * weight.shape[3], weight.shape[1]
    offset_groups = offset.shape[1] // (2 * taps)
    by_group = weight.flatten(2).unflatten(0, (x.shape[1] // per_group, -1))
    rows_of_all = (x.shape[0], x.shape[2] * x.shape[3] * offset_groups, x.shape[1] // offset_groups)
    grad_rows = x.new_zeros(rows_of_all)
    grad_offset = offset.new_zeros(offset.flatten(2).shape)
    grad_modulation = x.new_zeros(() if modulation is None else modulation.flatten(2).shape)
    grad_weight = torch.zeros_like(by_group)
    # On the host a count may be looked at; elsewhere all positions are computed, to wait for none.
    counts = count.tolist() if count.device.type == "cpu" else [None] * len(count)
    for image, sites in enumerate(counts):
        positions = index[image].long()[:sites]
        is_site = torch.arange(len(positions), device=x.device) < count[image]
        moved = torch.where(is_site, offset[image].flatten(1)[:, positions], 0.0)
        corners = _corners(
            moved.unflatten(0, (offset_groups, taps, 2)),
            positions,
            offset.shape[3],
            (x.shape[2], x.shape[3]),
            (weight.shape[2], weight.shape[3]),
            stride,
            padding,
            dilation,
        )
        strength = torch.ones_like(corners[0].weight)
        if modulation is not None:
            strength = modulation[image].flatten(1)[:, positions].view(strength.shape)
        shares = [torch.where(is_site, corner.weight * strength, 0.0) for corner in corners]
        rows = _rows(x[image], offset_groups)
        values = [_values(rows, c, share) for c, share in zip(corners, shares, strict=True)]
        mixed = torch.zeros_like(shares[0])[..., None]
        for share, value in zip(shares, values, strict=True):
            mixed = mixed + share[..., None] * value
        # (G, T, L, C/G) -> (T, L, groups, C/groups), and back for the gradient
        by_tap = mixed.to(x.dtype).permute(1, 2, 0, 3).flatten(2).unflatten(2, (-1, per_group))
        grad_sites = grad[image].flatten(1)[:, positions].unflatten(0, (by_group.shape[0], -1))
        grad_weight += torch.einsum("gol,tlgc->goct", grad_sites, by_tap)
        grad_taps = torch.einsum("gol,goct->tlgc", grad_sites, by_group)
        grad_taps = grad_taps.flatten(2).unflatten(2, (offset_groups, -1)).permute(2, 0, 1, 3)
        along = [(grad_taps * value).sum(-1) for value in values]
        slopes_y, slopes_x = [c.slope_y for c in corners], [c.slope_x for c in corners]
        grad_y, grad_x, grad_strength = (
            sum((f * a for f, a in zip(factors, along, strict=True)), torch.zeros_like(along[0]))
            for factors in (slopes_y, slopes_x, [c.weight for c in corners])
        )
        for corner, share in zip(corners, shares, strict=True):
            given = torch.where(corner.inside, share, 0.0)[..., None] * grad_taps
            given = given.to(x.dtype).flatten(0, 2)
            grad_rows[image].index_add_(0, corner.row.flatten(), given)
        both = torch.stack([grad_y, grad_x], 2) * strength[:, :, None]
        both = torch.where(is_site, both, 0.0).flatten(0, 2).to(offset.dtype)
        grad_offset[image].index_copy_(1, positions, both)
        if modulation is not None:
            kept = torch.where(is_site, grad_strength, 0.0).flatten(0, 1).to(modulation.dtype)
            grad_modulation[image].index_copy_(1, positions, kept)
    grad_map = grad_rows.view(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
    return (
        grad_map.contiguous(memory_format=torch.channels_last),
        grad_offset.view(offset.shape),
        grad_weight.reshape(weight.shape),
        grad_modulation if modulation is None else grad_modulation.view(modulation.shape),
    )
