"""SoftPool on the GPU: forward, and a backward that adds in a fixed order, without atomics.

The loop, for window o with taps i, over three spatial axes (missing ones come first, of extent 1):

    top = max_i x[i]                                  e_i = exp(x[i] - top), 0 outside the map
    total = sum_i e_i                                 mean = sum_i e_i (x[i] - top) / total
    y[o] = top + mean
    dx[i] += dy[o] / total * e_i * (1 + x[i] - top - mean)        without the bracket where detached

Three kernels. `soft_pool_kernel` makes y or, for `unpool_kernel`, (top, dy / total, 1 - mean).
Where no windows overlap, `unpool_apart_kernel` goes over the windows, makes the same three, and
writes dx of each tap: no two write one place. Where they overlap, `unpool_kernel` goes over the
inputs, and each adds up what the windows that cover it send, last window first. `WINDOW` is the
kernel size, stride, padding and dilation, three numbers each.

Memory: y, dx and the three numbers are dense, contiguous or channels-last, and a program makes a
run of them in the order in which they lie there:

    contiguous      b | c | z y x          program: [ BLOCK_WINDOWS consecutive (c z y x) ]
    channels-last   b | z y x | c          program: [ BLOCK_WINDOWS consecutive (z y x c) ]

so that stores are coalesced in either, and loads are too where x lies alike; x and dy are read
through their strides, whatever these are. Values are widened to float32 (float64 stays) as they
are loaded.

Tile: (BLOCK_WINDOWS, BLOCK_TAPS). Windows of up to UNROLLED_TAPS have BLOCK_TAPS 1 and are held in
registers, up to MANY_TAPS they are read again in each pass; larger ones, of which there are few,
are reduced several taps at a time.

Not timed on any GPU yet. As compiled for sm_90 by Triton 3.5 and 3.9, windows of 2x2 and 3x3 take
30 to 64 registers a thread and spill none; channels-last maps are read 8 or 16 bytes at a time.
"""

# A kernel is Triton's language, which is Python by its syntax only.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsight.ops.triton.launch import is_int64, launch

__all__ = ["soft_pool", "soft_pool_backward"]

# Windows of up to so many taps are read once, in a loop without jumps.
UNROLLED_TAPS = 9
# Windows of more than so many are reduced several taps at a time.
MANY_TAPS = 32
THREADS = 128  # of a program: four warps, Triton's default
TILE = 512  # values of a tile
MANY = 2**19  # results that fill a GPU with tiles of this size


@triton.jit
def _split(index, channels, size, IS_ROWS: tl.constexpr):
    """Image, channel and position of what lies at `index` in dense memory."""
    if IS_ROWS:
        c = index % channels
        index = index // channels
    x = index % size[2]
    index = index // size[2]
    y = index % size[1]
    index = index // size[1]
    z = index % size[0]
    index = index // size[0]
    if not IS_ROWS:
        c = index % channels
        index = index // channels
    return index, c, z, y, x


@triton.jit
def _join(b, c, z, y, x, channels, size, IS_ROWS: tl.constexpr):
    """The reverse of `_split`."""
    if IS_ROWS:
        return (((b * size[0] + z) * size[1] + y) * size[2] + x) * channels + c
    return (((b * channels + c) * size[0] + z) * size[1] + y) * size[2] + x


@triton.jit
def _tile_index(BLOCK: tl.constexpr, IS_INT64: tl.constexpr):
    """The indices of this program's tile."""
    start = tl.program_id(0)
    if IS_INT64:
        start = start.to(tl.int64)
    return start * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _taps(
    start,
    z,
    y,
    x,
    size,
    WINDOW: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    IS_INSIDE: tl.constexpr,
):
    """Input positions of taps [start, start + BLOCK_TAPS) of windows, and which lie in the map."""
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    DILATION: tl.constexpr = WINDOW[3]
    tap = start + tl.arange(0, BLOCK_TAPS)[None, :]
    z = z * STRIDE[0] - PADDING[0] + tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
    y = y * STRIDE[1] - PADDING[1] + tap // KERNEL[2] % KERNEL[1] * DILATION[1]
    x = x * STRIDE[2] - PADDING[2] + tap % KERNEL[2] * DILATION[2]
    inside = tap < KERNEL[0] * KERNEL[1] * KERNEL[2]
    if not IS_INSIDE:
        inside = inside & (z >= 0) & (z < size[0])
        inside = inside & (y >= 0) & (y < size[1])
        inside = inside & (x >= 0) & (x < size[2])
    return z, y, x, inside


@triton.jit
def _exponential(u, top, inside):
    """Of the distance to the top, and the distance: 0 where it has no weight.

    What equals the top is at distance 0 also where both are infinite. NaN stays NaN.
    """
    distance = tl.where(u == top, 0.0, u - top)
    e = tl.where(inside, tl.exp(distance), 0.0)
    return e, tl.where(e == 0.0, 0.0, distance)


@triton.jit
def _window(
    base,
    live,
    z,
    y,
    x,
    size,
    strides,
    WINDOW: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    IS_INSIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Top, total and mean, all (BLOCK_WINDOWS, 1), of the windows of outputs (z, y, x)."""
    TAPS: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    top = tl.full(live.shape, float("-inf"), WIDE)
    for start in tl.range(0, TAPS, BLOCK_TAPS, loop_unroll_factor=UNROLL):
        iz, iy, ix, inside = _taps(start, z, y, x, size, WINDOW, BLOCK_TAPS, IS_INSIDE)
        at = base + iz * strides[2] + iy * strides[3] + ix * strides[4]
        u = tl.load(at, mask=live & inside, other=float("-inf")).to(WIDE)
        if BLOCK_TAPS > 1:
            u = tl.max(u, axis=1, keep_dims=True)
        # Whether NaN wins here does not matter: it reaches the total.
        top = tl.maximum(top, u)
    total = tl.full(live.shape, 0.0, WIDE)
    moment = tl.full(live.shape, 0.0, WIDE)
    for start in tl.range(0, TAPS, BLOCK_TAPS, loop_unroll_factor=UNROLL):
        iz, iy, ix, inside = _taps(start, z, y, x, size, WINDOW, BLOCK_TAPS, IS_INSIDE)
        at = base + iz * strides[2] + iy * strides[3] + ix * strides[4]
        u = tl.load(at, mask=live & inside, other=float("-inf")).to(WIDE)
        e, distance = _exponential(u, top, live & inside)
        weighted = e * distance
        if BLOCK_TAPS > 1:
            e = tl.sum(e, axis=1, keep_dims=True)
            weighted = tl.sum(weighted, axis=1, keep_dims=True)
        total += e
        moment += weighted
    # At least 1, unless a window lies in the padding altogether.
    total = tl.where(total == 0.0, 1.0, total)
    return top, total, moment / total


@triton.jit
def soft_pool_kernel(
    x_ptr,
    out_ptr,
    grad_ptr,
    scale_ptr,
    slope_ptr,
    count,
    channels,
    size,
    out_size,
    strides,
    grad_strides,
    WINDOW: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
    IS_ROWS: tl.constexpr,
    IS_INSIDE: tl.constexpr,
    IS_INT64: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of a run of windows, y; for a backward top, dy / total and 1 - mean."""
    index = _tile_index(BLOCK_WINDOWS, IS_INT64)[:, None]
    live = index < count
    b, c, z, y, x = _split(index, channels, out_size, IS_ROWS)
    base = x_ptr + b * strides[0] + c * strides[1]
    top, total, mean = _window(
        base, live, z, y, x, size, strides, WINDOW, BLOCK_TAPS, UNROLL, IS_INSIDE, WIDE
    )
    if FOR_BACKWARD:
        at = grad_ptr + b * grad_strides[0] + c * grad_strides[1]
        at += z * grad_strides[2] + y * grad_strides[3] + x * grad_strides[4]
        grad = tl.load(at, mask=live, other=0.0).to(WIDE)
        tl.store(out_ptr + index, top, mask=live)
        tl.store(scale_ptr + index, grad / total, mask=live)
        tl.store(slope_ptr + index, 1.0 - mean, mask=live)
    else:
        tl.store(out_ptr + index, (top + mean).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def unpool_apart_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    count,
    channels,
    size,
    out_size,
    strides,
    grad_strides,
    WINDOW: tl.constexpr,
    DETACHED: tl.constexpr,
    IS_ROWS: tl.constexpr,
    IS_INSIDE: tl.constexpr,
    IS_INT64: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradient dx of all taps of a run of windows that overlap with none."""
    index = _tile_index(BLOCK_WINDOWS, IS_INT64)[:, None]
    live = index < count
    b, c, z, y, x = _split(index, channels, out_size, IS_ROWS)
    base = x_ptr + b * strides[0] + c * strides[1]
    top, total, mean = _window(
        base, live, z, y, x, size, strides, WINDOW, BLOCK_TAPS, UNROLL, IS_INSIDE, WIDE
    )
    sent_by = grad_ptr + b * grad_strides[0] + c * grad_strides[1]
    sent_by += z * grad_strides[2] + y * grad_strides[3] + x * grad_strides[4]
    scale = tl.load(sent_by, mask=live, other=0.0).to(WIDE) / total
    TAPS: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    for start in tl.range(0, TAPS, BLOCK_TAPS, loop_unroll_factor=UNROLL):
        iz, iy, ix, inside = _taps(start, z, y, x, size, WINDOW, BLOCK_TAPS, IS_INSIDE)
        inside = inside & live
        at = base + iz * strides[2] + iy * strides[3] + ix * strides[4]
        u = tl.load(at, mask=inside, other=float("-inf")).to(WIDE)
        e, distance = _exponential(u, top, inside)
        sent = scale * e
        if not DETACHED:
            sent = sent * (1.0 - mean + distance)
        to = out_ptr + _join(b, c, iz, iy, ix, channels, size, IS_ROWS)
        tl.store(to, sent.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _covering(place, back, out_size, AXIS: tl.constexpr, WINDOW: tl.constexpr):
    """The window `back` before the last that starts at or before `place`; if it has it as a tap."""
    KERNEL: tl.constexpr = WINDOW[0][AXIS]
    STRIDE: tl.constexpr = WINDOW[1][AXIS]
    PADDING: tl.constexpr = WINDOW[2][AXIS]
    DILATION: tl.constexpr = WINDOW[3][AXIS]
    o = (place + PADDING) // STRIDE - back
    distance = place + PADDING - o * STRIDE
    covers = (o >= 0) & (o < out_size[AXIS]) & (distance <= (KERNEL - 1) * DILATION)
    return o, covers & (distance % DILATION == 0)


@triton.jit
def unpool_kernel(
    top_ptr,
    scale_ptr,
    slope_ptr,
    x_ptr,
    out_ptr,
    count,
    channels,
    size,
    out_size,
    strides,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    DETACHED: tl.constexpr,
    IS_ROWS: tl.constexpr,
    IS_INT64: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """The gradient dx of a run of inputs, each from REACH windows along each axis, STEP apart."""
    index = _tile_index(BLOCK_INPUTS, IS_INT64)
    live = index < count
    b, c, z, y, x = _split(index, channels, size, IS_ROWS)
    at = x_ptr + b * strides[0] + c * strides[1]
    at += z * strides[2] + y * strides[3] + x * strides[4]
    u = tl.load(at, mask=live, other=0.0).to(WIDE)
    dx = tl.full(live.shape, 0.0, WIDE)
    for n in tl.range(0, REACH[0] * REACH[1] * REACH[2], loop_unroll_factor=UNROLL):
        back_z = n // (REACH[1] * REACH[2]) * STEP[0]
        back_y = n // REACH[2] % REACH[1] * STEP[1]
        back_x = n % REACH[2] * STEP[2]
        oz, is_z = _covering(z, back_z, out_size, 0, WINDOW)
        oy, is_y = _covering(y, back_y, out_size, 1, WINDOW)
        ox, is_x = _covering(x, back_x, out_size, 2, WINDOW)
        covers = live & is_z & is_y & is_x
        window = _join(b, c, oz, oy, ox, channels, out_size, IS_ROWS)
        top = tl.load(top_ptr + window, mask=covers, other=0.0)
        scale = tl.load(scale_ptr + window, mask=covers, other=0.0)
        e, distance = _exponential(u, top, covers)
        sent = scale * e
        if not DETACHED:
            slope = tl.load(slope_ptr + window, mask=covers, other=0.0)
            sent = sent * (slope + distance)
        dx += tl.where(covers, sent, 0.0)
    tl.store(out_ptr + index, dx.to(out_ptr.dtype.element_ty), mask=live)


def _three(numbers: Sequence[int], missing: int) -> tuple[int, int, int]:
    """Numbers of three axes, those that are missing first."""
    d, h, w = (*[missing] * (3 - len(numbers)), *numbers)
    return d, h, w


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, channels and three axes."""
    return (*x.stride()[:2], *_three(x.stride()[2:], 0))


def _blocks(taps: int, count: int, is_rows: bool) -> dict[str, int]:
    """Tile of a kernel that goes over `count` windows."""
    if taps > MANY_TAPS:
        # The neighbours in memory, channels or taps, are given the larger part.
        length = 16 if is_rows else min(triton.next_power_of_2(taps), 128)
        return {"BLOCK_WINDOWS": TILE // length, "BLOCK_TAPS": length, "UNROLL": 1}
    unroll = taps if taps <= UNROLLED_TAPS else 1
    # Unrolled, the values of a window stay in registers.
    tile = TILE // 2 if 4 < unroll else TILE
    return {"BLOCK_WINDOWS": _tile(tile, count), "BLOCK_TAPS": 1, "UNROLL": unroll}


def _tile(tile: int, count: int) -> int:
    """Of few results, one for each thread."""
    return tile if count >= MANY else THREADS


class _Numbers:
    """What the kernels are told of a pooling, from tensors and the numbers of one to three axes."""

    def __init__(
        self,
        size: Sequence[int],
        out_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self.size, self.out_size = _three(size, 1), _three(out_size, 1)
        kernel, step = _three(kernel_size, 1), _three(stride, 1)
        pad, dilate = _three(padding, 0), _three(dilation, 1)
        self.window = (kernel, step, pad, dilate)
        axes = list(zip(kernel, step, dilate, strict=True))
        spans = [d * (k - 1) + 1 for k, _, d in axes]
        starts = [(o - 1) * s for o, s in zip(self.out_size, step, strict=True)]
        ends = [start + span for start, span in zip(starts, spans, strict=True)]
        lengths = [n + p for n, p in zip(self.size, pad, strict=True)]
        self.taps = math.prod(kernel)
        self.is_inside = not any(pad) and all(
            end <= n for end, n in zip(ends, lengths, strict=True)
        )
        self.is_apart = all(span <= s for span, s in zip(spans, step, strict=True))
        # Apart, without gaps, and up to the end of the map.
        self.is_tiled = kernel == step and all(
            end >= n for end, n in zip(ends, lengths, strict=True)
        )
        # Of the windows that start at or before an input, which may have it as a tap: at stride 1
        # those a dilation apart.
        self.step = tuple(d if s == 1 else 1 for _, s, d in axes)
        self.reach = tuple(
            (span - 1) // (s * n) + 1 for span, s, n in zip(spans, step, self.step, strict=True)
        )


def soft_pool(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    memory_format: torch.memory_format,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `pool_reference.soft_pool`, in float16, bfloat16, float32 or float64.

    Args:
        x: (B, C, *S), with one to three spatial axes and any strides; not copied.
        output_size: of the spatial axes, as of `pool_reference.output_size`.
        kernel_size: one number per spatial axis, as all that follow.
        stride: step.
        padding: positions on each side that never win weight.
        dilation: distance of the taps.
        memory_format: contiguous or channels-last, of the output.
        out: where to write, in that format; None allocates.

    Returns:
        (B, C, *So) in the dtype of `x`; computed in float32, or float64 for float64.
    """
    if out is None:
        shape = (*x.shape[:2], *output_size)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    numbers = _Numbers(x.shape[2:], output_size, kernel_size, stride, padding, dilation)
    options = _options(x, numbers, memory_format, is_int64(x, out))
    _launch_windows(x, None, (out, out, out), numbers, options)
    return out


def _options(
    x: Tensor, numbers: _Numbers, memory_format: torch.memory_format, is_int64: bool
) -> dict[str, Any]:
    """What all kernels are compiled for."""
    return {
        "WINDOW": numbers.window,
        "IS_ROWS": memory_format != torch.contiguous_format,
        "IS_INT64": is_int64,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }


def _launch_windows(
    x: Tensor,
    grad: Tensor | None,
    outs: tuple[Tensor, Tensor, Tensor],
    numbers: _Numbers,
    options: dict[str, Any],
) -> None:
    """Run `soft_pool_kernel`: for the output alone or, with `grad`, what a backward gathers."""
    count = outs[0].numel()
    blocks = _blocks(numbers.taps, count, options["IS_ROWS"])
    launch(
        soft_pool_kernel,
        count,
        blocks["BLOCK_WINDOWS"],
        x,
        outs[0],
        outs[0] if grad is None else grad,
        *outs[1:],
        count,
        x.shape[1],
        numbers.size,
        numbers.out_size,
        _strides(x),
        (0, 0, 0, 0, 0) if grad is None else _strides(grad),
        FOR_BACKWARD=grad is not None,
        IS_INSIDE=numbers.is_inside,
        **blocks,
        **options,
    )


def soft_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    memory_format: torch.memory_format,
    *,
    detached: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `pool_reference.soft_pool_backward`; dtypes and formats as in `soft_pool`.

    Args:
        grad: (B, C, *So), any strides.
        x: as given to `soft_pool`, like all that follow.
        kernel_size: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        memory_format: contiguous or channels-last, of the result.
        detached: take the weights for constants.
        out: where to write, in that format; None allocates.

    Returns:
        (B, C, *S), the same bits at every call.

    Cost: where windows overlap, three float32 (or float64) numbers for each are kept in between.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    numbers = _Numbers(x.shape[2:], grad.shape[2:], kernel_size, stride, padding, dilation)
    options = _options(x, numbers, memory_format, is_int64(grad, x, out))
    sizes = (x.shape[1], numbers.size, numbers.out_size, _strides(x))
    count = grad.numel()
    if numbers.is_apart:
        if not numbers.is_tiled:
            out.zero_()
        blocks = _blocks(numbers.taps, count, options["IS_ROWS"])
        launch(
            unpool_apart_kernel,
            count,
            blocks["BLOCK_WINDOWS"],
            grad,
            x,
            out,
            count,
            *sizes,
            _strides(grad),
            DETACHED=detached,
            IS_INSIDE=numbers.is_inside,
            **blocks,
            **options,
        )
        return out
    dtype = torch.promote_types(x.dtype, torch.float32)
    kept = torch.empty((3, count), dtype=dtype, device=x.device)
    top, scale, slope = kept.unbind()
    _launch_windows(x, grad, (top, scale, slope), numbers, options)
    windows = math.prod(numbers.reach)
    block = _tile(TILE // 2, out.numel())
    launch(
        unpool_kernel,
        out.numel(),
        block,
        top,
        scale,
        slope,
        x,
        out,
        out.numel(),
        *sizes,
        REACH=numbers.reach,
        STEP=numbers.step,
        UNROLL=windows if windows <= UNROLLED_TAPS else 1,
        DETACHED=detached,
        BLOCK_INPUTS=block,
        **options,
    )
    return out
