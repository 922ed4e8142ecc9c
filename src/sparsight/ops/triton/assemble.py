"""Windows of score maps on the GPU: the copy, and a gradient summed in a fixed order.

    for w: (b, y0, x0) = windows[w]
        for i, j in SIZE x SIZE:
            out[w, i, j] = maps[b, g[i] * K + g[j], y0 + i, x0 + j], 0 outside of the map

where g[i] is the bin of cell i. Two kernels. `assemble_kernel` goes over the cells of `out` in the
order in which they lie in memory. `disassemble_kernel` goes over the maps: a program owns a tile of
positions and channels of one image, and visits the windows of that image in their order; a window
sends to a position one value, for one of its channels. Nobody else writes there, so there are no
atomics, and the sum is the same bits at every call.

    program: [ TILE_Y x TILE_X positions, BLOCK_CHANNELS channels ], sums in registers

The windows of an image are found by a stable sort of their first column, on the device: nothing is
read back. A window that names no image is 0, and sends nothing. Maps and gradients are read through
their strides, whatever these are. Sums are float32 (float64 stays).

Cost of the gradient: windows of an image times its tiles, of which those that do not meet cost the
two loads and the comparison that tell so.

Not run on any GPU yet: in Triton's interpreter, and compiled to machine code for sm_75 to sm_90.
"""

# A kernel is Triton's language, which is Python by its syntax only.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsight.ops.triton.launch import is_int64, launch

__all__ = ["assemble_windows", "assemble_windows_backward"]

# Cells that a program copies.
BLOCK = 512
# Positions that a program sums: 128, one for each of its threads.
TILE_Y, TILE_X = 8, 16
# Sums of each position at most: registers of a thread.
MANY_CHANNELS = 32


@triton.jit
def _bin(i, SIZE: tl.constexpr, K: tl.constexpr, CENTRED: tl.constexpr):
    """The bin that cell i of a window lies in."""
    if CENTRED:
        return (2 * i + 1) * K // (2 * SIZE)
    return i * K // SIZE


@triton.jit
def _corner(at, live, extent, SIZE: tl.constexpr):
    """Row or column of a window's corner, as int32: wholly outside stays so."""
    corner = tl.load(at, mask=live, other=0)
    corner = tl.minimum(tl.maximum(corner, -SIZE), extent)
    return corner.to(tl.int32)


@triton.jit
def assemble_kernel(
    maps_ptr,
    windows_ptr,
    out_ptr,
    count,
    images,
    height,
    width,
    strides,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    CENTRED: tl.constexpr,
    IS_INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A run of cells of the windows."""
    start = tl.program_id(0)
    if IS_INT64:
        start = start.to(tl.int64)
    index = start * BLOCK + tl.arange(0, BLOCK)
    live = index < count
    j = (index % SIZE).to(tl.int32)
    i = (index // SIZE % SIZE).to(tl.int32)
    window = windows_ptr + index // (SIZE * SIZE) * 3
    b = tl.load(window, mask=live, other=-1)
    y = _corner(window + 1, live, height, SIZE) + i
    x = _corner(window + 2, live, width, SIZE) + j
    inside = live & (b >= 0) & (b < images)
    inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    c = _bin(i, SIZE, K, CENTRED) * K + _bin(j, SIZE, K, CENTRED)
    if IS_INT64:
        c = c.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    else:
        b = b.to(tl.int32)
    at = maps_ptr + b * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]
    tl.store(out_ptr + index, tl.load(at, mask=inside, other=0.0), mask=live)


@triton.jit
def disassemble_kernel(
    grad_ptr,
    windows_ptr,
    order_ptr,
    first_ptr,
    out_ptr,
    channels,
    height,
    width,
    grad_strides,
    strides,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    CENTRED: tl.constexpr,
    IS_INT64: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The gradient of a tile of one image: of TILE_Y x TILE_X positions, in some channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    tiles_x = tl.cdiv(width, TILE_X)
    tiles_y = tl.cdiv(height, TILE_Y)
    c = program % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    program = program // blocks
    left = program % tiles_x * TILE_X
    program = program // tiles_x
    top = program % tiles_y * TILE_Y
    b = program // tiles_y
    position = tl.arange(0, TILE_Y * TILE_X)
    y = top + position // TILE_X
    x = left + position % TILE_X
    total = tl.full((TILE_Y * TILE_X, BLOCK_CHANNELS), 0.0, WIDE)
    begin = tl.load(first_ptr + b)
    end = tl.load(first_ptr + b + 1)
    for n in range(begin, end):
        w = tl.load(order_ptr + n)
        corner_y = _corner(windows_ptr + w * 3 + 1, True, height, SIZE)
        corner_x = _corner(windows_ptr + w * 3 + 2, True, width, SIZE)
        is_met = (corner_y < top + TILE_Y) & (corner_y + SIZE > top)
        is_met = is_met & (corner_x < left + TILE_X) & (corner_x + SIZE > left)
        if is_met:
            i = y - corner_y
            j = x - corner_x
            inside = (i >= 0) & (i < SIZE) & (j >= 0) & (j < SIZE)
            at = grad_ptr + w * grad_strides[0] + i * grad_strides[1] + j * grad_strides[2]
            sent = tl.load(at, mask=inside, other=0.0).to(WIDE)
            of = _bin(i, SIZE, K, CENTRED) * K + _bin(j, SIZE, K, CENTRED)
            meant = inside[:, None] & (of[:, None] == c[None, :])
            total += tl.where(meant, sent[:, None], 0.0)
    if IS_INT64:
        b = b.to(tl.int64)
        c = c.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    at = out_ptr + b * strides[0] + (y * strides[2] + x * strides[3])[:, None]
    live = ((y < height) & (x < width))[:, None] & (c < channels)[None, :]
    tl.store(at + (c * strides[1])[None, :], total.to(out_ptr.dtype.element_ty), mask=live)


def assemble_windows(
    score_maps: Tensor, windows: Tensor, size: int, centred: bool, *, out: Tensor | None = None
) -> Tensor:
    """Kernel form of `assemble_reference.assemble_windows`.

    Args:
        score_maps: (N, k * k, H, W) float16, bfloat16, float32 or float64, any strides; not copied.
        windows: (M, 3) int64.
        size: cells along each side of a window.
        centred: see `assemble_reference.bins_of`.
        out: where to write, contiguous; None allocates.

    Returns:
        (M, size, size) in the dtype of `score_maps`.
    """
    images, channels, height, width = score_maps.shape
    windows = windows.contiguous()
    if out is None:
        shape = (windows.shape[0], size, size)
        out = torch.empty(shape, dtype=score_maps.dtype, device=score_maps.device)
    if score_maps.numel() == 0:
        return out.zero_()
    launch(
        assemble_kernel,
        out.numel(),
        BLOCK,
        score_maps,
        windows,
        out,
        out.numel(),
        images,
        height,
        width,
        score_maps.stride(),
        SIZE=size,
        K=math.isqrt(channels),
        CENTRED=centred,
        IS_INT64=is_int64(score_maps, out),
        BLOCK=BLOCK,
    )
    return out


def assemble_windows_backward(
    grad: Tensor,
    windows: Tensor,
    shape: Sequence[int],
    memory_format: torch.memory_format,
    centred: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `assemble_reference.assemble_windows_backward`; dtypes as forward.

    Args:
        grad: (M, size, size), any strides.
        windows: (M, 3) int64.
        shape: of the score maps.
        memory_format: contiguous or channels-last, of the result.
        centred: see `assemble_reference.bins_of`.
        out: where to write; None allocates.

    Returns:
        (N, k * k, H, W) in the dtype of `grad`, the same bits at every call.
    """
    images, channels, height, width = shape
    windows = windows.contiguous()
    if out is None:
        out = torch.empty(
            tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=memory_format
        )
    if out.numel() == 0:
        return out
    named, order = windows[:, 0].sort(stable=True)
    # Where the windows of each image begin, and those of the last one end.
    first = torch.searchsorted(named.contiguous(), torch.arange(images + 1, device=grad.device))
    block = min(triton.next_power_of_2(channels), MANY_CHANNELS)
    tiles = triton.cdiv(height, TILE_Y) * triton.cdiv(width, TILE_X)
    launch(
        disassemble_kernel,
        images * tiles * triton.cdiv(channels, block),
        1,
        grad,
        windows,
        order,
        first,
        out,
        channels,
        height,
        width,
        grad.stride(),
        out.stride(),
        SIZE=grad.shape[1],
        K=math.isqrt(channels),
        CENTRED=centred,
        IS_INT64=is_int64(grad, out),
        WIDE=tl.float64 if grad.dtype == torch.float64 else tl.float32,
        TILE_Y=TILE_Y,
        TILE_X=TILE_X,
        BLOCK_CHANNELS=block,
    )
    return out
