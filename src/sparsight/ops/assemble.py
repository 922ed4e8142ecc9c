"""`assemble_windows`: instance masks from position-sensitive score maps, without parameters."""

import math
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsight.ops import assemble_reference as reference
from sparsight.ops import cpu
from sparsight.ops.operators import LIBRARY
from sparsight.ops.triton import missing_for

__all__ = ["Bins", "assemble_windows", "windows_inside"]

Bins = Literal["centred", "floor"]

LIBRARY.define(
    "assemble_windows(Tensor score_maps, Tensor windows, int size, bool centred) -> Tensor"
)
LIBRARY.define(
    "assemble_windows_backward(Tensor grad, Tensor windows, SymInt[] shape, bool is_channels_last, "
    "bool centred) -> Tensor"
)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _memory_format(is_channels_last: bool) -> torch.memory_format:
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _new_maps(grad: Tensor, shape: Sequence[int], is_channels_last: bool) -> Tensor:
    """Uninitialised; `contiguous` would leave the strides of an axis of one alone."""
    memory_format = _memory_format(is_channels_last)
    return torch.empty(
        tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=memory_format
    )


_warned: set[str] = set()


def _triton_kernels(x: Tensor) -> ModuleType | None:
    """The kernels for a CUDA tensor; where there are none, None and, once, a warning why."""
    reason = missing_for(x)
    if reason is None:
        from sparsight.ops.triton import assemble

        return assemble
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"assemble_windows: {reason}; plain torch operators run in the place of its GPU "
            "kernels, with an index of every cell.",
            stacklevel=2,
        )
    return None


@torch.library.impl(LIBRARY, "assemble_windows", "CompositeExplicitAutograd")
def _assemble_any(score_maps: Tensor, windows: Tensor, size: int, centred: bool) -> Tensor:
    return reference.assemble_windows(score_maps, windows, size, centred)


@torch.library.impl(LIBRARY, "assemble_windows", "CPU")
def _assemble_cpu(score_maps: Tensor, windows: Tensor, size: int, centred: bool) -> Tensor:
    return cpu.assemble_windows(score_maps, windows, size, centred)


@torch.library.impl(LIBRARY, "assemble_windows", "CUDA")
def _assemble_cuda(score_maps: Tensor, windows: Tensor, size: int, centred: bool) -> Tensor:
    kernels = _triton_kernels(score_maps)
    if kernels is None:
        return _assemble_any(score_maps, windows, size, centred)
    return kernels.assemble_windows(score_maps, windows, size, centred)


@torch.library.register_fake("sparsight::assemble_windows", lib=LIBRARY)
def _assemble_fake(score_maps: Tensor, windows: Tensor, size: int, centred: bool) -> Tensor:
    return score_maps.new_empty((windows.shape[0], size, size))


@torch.library.impl(LIBRARY, "assemble_windows_backward", "CompositeExplicitAutograd")
def _backward_any(
    grad: Tensor, windows: Tensor, shape: Sequence[int], is_channels_last: bool, centred: bool
) -> Tensor:
    # Many windows share a cell: sums of half precision are float32 until the end.
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    sent = reference.assemble_windows_backward(wide, windows, shape, centred)
    return _new_maps(grad, shape, is_channels_last).copy_(sent)


@torch.library.impl(LIBRARY, "assemble_windows_backward", "CPU")
def _backward_cpu(
    grad: Tensor, windows: Tensor, shape: Sequence[int], is_channels_last: bool, centred: bool
) -> Tensor:
    memory_format = _memory_format(is_channels_last)
    return cpu.assemble_windows_backward(grad, windows, shape, memory_format, centred)


@torch.library.impl(LIBRARY, "assemble_windows_backward", "CUDA")
def _backward_cuda(
    grad: Tensor, windows: Tensor, shape: Sequence[int], is_channels_last: bool, centred: bool
) -> Tensor:
    kernels = _triton_kernels(grad)
    if kernels is None:
        return _backward_any(grad, windows, shape, is_channels_last, centred)
    memory_format = _memory_format(is_channels_last)
    return kernels.assemble_windows_backward(grad, windows, shape, memory_format, centred)


@torch.library.register_fake("sparsight::assemble_windows_backward", lib=LIBRARY)
def _backward_fake(
    grad: Tensor, windows: Tensor, shape: Sequence[int], is_channels_last: bool, centred: bool
) -> Tensor:
    return _new_maps(grad, shape, is_channels_last)


def _setup(ctx, inputs, output) -> None:
    score_maps, windows, _, centred = inputs
    ctx.save_for_backward(windows)
    # Of the values, which are copied, nothing is kept.
    ctx.shape, ctx.centred = score_maps.shape, centred
    ctx.is_channels_last = score_maps.shape[1] > 1 and score_maps.stride(1) == 1


def _backward(ctx, grad: Tensor):
    (windows,) = ctx.saved_tensors
    sent = torch.ops.sparsight.assemble_windows_backward(
        grad, windows, ctx.shape, ctx.is_channels_last, ctx.centred
    )
    return sent, None, None, None


def _setup_twice(ctx, inputs, output) -> None:
    grad, windows, _, _, centred = inputs
    ctx.save_for_backward(windows)
    ctx.size, ctx.centred = grad.shape[1], centred


def _backward_twice(ctx, grad: Tensor):
    # The gradient is linear: its own is the copy again.
    (windows,) = ctx.saved_tensors
    sent = torch.ops.sparsight.assemble_windows(grad, windows, ctx.size, ctx.centred)
    return sent, None, None, None, None


torch.library.register_autograd(
    "sparsight::assemble_windows", _backward, setup_context=_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "sparsight::assemble_windows_backward", _backward_twice, setup_context=_setup_twice, lib=LIBRARY
)


def _check_windows(caller: str, windows: Tensor) -> None:
    if not isinstance(windows, Tensor) or windows.dtype != torch.int64:
        kind = windows.dtype if isinstance(windows, Tensor) else type(windows).__name__
        raise TypeError(
            f"{caller}: windows is {kind}; a torch.int64 tensor is needed: call windows.long()."
        )
    if windows.ndim != 2 or windows.shape[1] != 3:
        raise ValueError(
            f"{caller}: windows has shape {tuple(windows.shape)}; (M, 3) is needed: the image, and "
            "the row and column of the top-left cell, of each window."
        )


def _check_count(caller: str, name: str, value: int, minimum: int) -> None:
    # Of a traced program, a size may be a symbol.
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < minimum:
        raise ValueError(
            f"{caller}: {name} is {value!r}; an integer >= {minimum} is needed: pass a number of "
            "cells of the score maps."
        )


def assemble_windows(
    score_maps: Tensor, windows: Tensor, *, size: int = 21, bins: Bins = "centred"
) -> Tensor:
    """Assemble the mask logits of windows from instance-sensitive score maps.

    A window is divided into k x k bins, and each of its cells is copied from the score map of its
    bin, at the place where it lies: nothing is pooled, resampled or moved,

        out[w, i, j] = score_maps[image, g(i) * k + g(j), row + i, column + j].

    A cell of the image is thus read from different maps in windows that see it in different bins,
    which tells instances apart; two windows that lie a cell apart differ only where a cell crosses
    the border of a bin.

    Args:
        score_maps: (N, k * k, H, W) float32, float64, bfloat16 or float16, in cells of the map;
            contiguous and channels-last, and any other strides, are read in place. Map g * k + h
            scores that a cell lies in the g-th of k parts from the top of its instance, and the
            h-th from the left. k is the root of the number of channels.
        windows: (M, 3) int64: index of the image in the batch, row and column of the window's
            top-left cell. A window centred at (y, x), as the paper's, has its corner at
            (y - (size - 1) / 2, x - (size - 1) / 2). It may lie partly or wholly outside of the
            map, at negative places too.
        size: cells along each side of a window, at least 1; the paper's 21 (default). Of a window
            smaller than k some of the maps are never read.
        bins: "centred" (default), g(i) = floor((i + 0.5) k / size), of 4, 4, 5, 4, 4 cells for 21
            and k = 5, the same from either side for all odd k; or "floor", g(i) =
            floor(i k / size), of 5, 4, 4, 4, 4 cells, which FCIS reads by. They are the same where
            k divides `size`.

    Returns:
        (M, size, size) in the dtype of `score_maps`, contiguous: the very numbers of the maps, 0
        for cells outside of the map, which is the logit of a half. :func:`windows_inside` says
        which these are, to leave them out of a loss.

    Raises:
        TypeError: score_maps are of another dtype, or windows not int64.
        ValueError: an argument has another shape, or is out of its range; the number of channels is
            no square; the two tensors lie on different devices; a window names no image of the
            batch. The last is not looked for on a GPU, which it would have to wait for: such a
            window is 0 there.

    Cost: no multiply-add; one read and one write per cell of the windows, by compiled kernels on
    the CPU and Triton kernels on CUDA devices; where Triton is not installed or does not support
    the GPU, a warning says so, once, and plain torch operators run, as on other devices. Nothing of
    the maps is kept for the gradient.

    Gradient: of `score_maps`, to any order: for each cell of the maps the sum of what the windows
    that copied it send back, in the order of the windows, the same bits at every call and for any
    number of threads; bfloat16 and float16 are summed in float32.

    Example:
        >>> import torch
        >>> from sparsight.ops import assemble_windows
        >>> maps = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 3, 3)
        >>> assemble_windows(maps, torch.tensor([[0, 0, 0], [0, 2, -1]]), size=2)
        tensor([[[0., 1.],
                 [2., 3.]],
        <BLANKLINE>
                [[0., 1.],
                 [0., 0.]]])

    Source: Dai, He, Li, Ren, Sun, Instance-sensitive Fully Convolutional Networks, ECCV 2016 (arXiv
        1603.08678), section 3.1. The paper says neither how bins are rounded where k does not
        divide the size nor what lies outside of the map: the centred bins and the zeros are ours;
        "floor" is that of its successor FCIS (Li et al., CVPR 2017, arXiv 1611.07709).
    """
    caller = "assemble_windows"
    if not isinstance(score_maps, Tensor) or score_maps.dtype not in _DTYPES:
        kind = score_maps.dtype if isinstance(score_maps, Tensor) else type(score_maps).__name__
        raise TypeError(
            f"{caller}: score_maps is {kind}; a tensor of float32, float64, bfloat16 or float16 is "
            "needed: call score_maps.float()."
        )
    if score_maps.ndim != 4:
        raise ValueError(
            f"{caller}: score_maps has shape {tuple(score_maps.shape)}; (N, k * k, H, W) is "
            "needed: add the axis of the batch with score_maps[None] where it lacks."
        )
    channels = score_maps.shape[1]
    if channels < 1 or math.isqrt(channels) ** 2 != channels:
        raise ValueError(
            f"{caller}: score_maps has {channels} channels; k * k of them, for k x k bins, are "
            "needed (25 in the paper): let the layer before make as many."
        )
    _check_windows(caller, windows)
    if windows.device != score_maps.device:
        raise ValueError(
            f"{caller}: windows lie on {windows.device}, score_maps on {score_maps.device}; one "
            "device is needed: call windows.to(score_maps.device)."
        )
    _check_count(caller, "size", size, 1)
    _check_bins(caller, bins)
    return torch.ops.sparsight.assemble_windows(score_maps, windows, size, bins == "centred")


def _check_bins(caller: str, bins: str) -> None:
    if bins not in get_args(Bins):
        known = " or ".join(map(repr, get_args(Bins)))
        raise ValueError(
            f"{caller}: bins is {bins!r}; {known} is needed: pass 'centred' for the default."
        )


def windows_inside(windows: Tensor, *, size: int, height: int, width: int) -> Tensor:
    """Tell which cells of windows lie in the map.

    Args:
        windows: (M, 3) int64, as :func:`assemble_windows` takes them; the image is not looked at.
        size: cells along each side of a window, at least 1.
        height: of the map, in cells, at least 0.
        width: of the map, in cells, at least 0.

    Returns:
        (M, size, size) bool on the device of `windows`.

    Raises:
        TypeError: windows are not int64.
        ValueError: windows have another shape, or a number is out of its range.

    Example:
        >>> import torch
        >>> from sparsight.ops import windows_inside
        >>> windows_inside(torch.tensor([[0, 2, -1]]), size=2, height=3, width=3)
        tensor([[[False,  True],
                 [False, False]]])
    """
    caller = "windows_inside"
    _check_windows(caller, windows)
    _check_count(caller, "size", size, 1)
    _check_count(caller, "height", height, 0)
    _check_count(caller, "width", width, 0)
    return reference.windows_inside(windows, size, height, width)
