"""`soft_pool1d`, `soft_pool2d`, `soft_pool3d`: pooling by a softmax-weighted mean."""

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsight.ops import cpu
from sparsight.ops import pool_reference as reference
from sparsight.ops.operators import LIBRARY
from sparsight.ops.triton import missing_for

__all__ = ["Gradient", "Weights", "check_choice", "soft_pool1d", "soft_pool2d", "soft_pool3d"]

Weights = Literal["channel", "shared"]
Gradient = Literal["exact", "detached"]

_NUMBERS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
# `detached` is an argument of the forward operator for its backward's sake.
LIBRARY.define(f"soft_pool(Tensor x, {_NUMBERS}, bool detached) -> Tensor")
LIBRARY.define(f"soft_pool_backward(Tensor grad, Tensor x, {_NUMBERS}, bool detached) -> Tensor")


def _memory_format(x: Tensor) -> torch.memory_format:
    """The format that max_pool gives its output: x's, where its strides are channels-last."""
    if x.ndim < 4:
        return torch.contiguous_format
    spatial = list(range(x.ndim - 1, 1, -1))
    least = 0
    for axis in (1, *spatial, 0):
        size, stride = x.shape[axis], x.stride(axis)
        if size == 0 or stride < least or (axis == 1 and stride == 0):
            return torch.contiguous_format
        # Of one channel, one position: what is strided as both counts as contiguous.
        if axis == 0 and least == x.stride(1):
            return torch.contiguous_format
        least = stride * max(size, 1)
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def _out_shape(x: Tensor, numbers: Sequence) -> tuple[int, ...]:
    return (x.shape[0], x.shape[1], *reference.output_size(x.shape[2:], *numbers))


def _has_kernel(x: Tensor) -> bool:
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and cpu.has_bfloat16())


_warned: set[str] = set()


def _triton_kernels(x: Tensor) -> ModuleType | None:
    """The kernels for a CUDA tensor; where there are none, None and, once, a warning why."""
    reason = missing_for(x)
    if reason is None:
        from sparsight.ops.triton import pool

        return pool
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"soft_pool: {reason}; plain torch operators run in the place of its GPU kernels, with "
            "the memory of all windows.",
            stacklevel=2,
        )
    return None


def _widened(x: Tensor) -> Tensor:
    """Half precision overflows at an exponent of 11: at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.impl(LIBRARY, "soft_pool", "CompositeExplicitAutograd")
def _pool_any(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    y = reference.soft_pool(_widened(x), kernel_size, stride, padding, dilation, ceil_mode)
    return y.to(x.dtype).contiguous(memory_format=_memory_format(x))


@torch.library.impl(LIBRARY, "soft_pool", "CPU")
def _pool_cpu(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    if not _has_kernel(x):
        return _pool_any(x, kernel_size, stride, padding, dilation, ceil_mode, detached)
    size = reference.output_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    return cpu.soft_pool(x, size, kernel_size, stride, padding, dilation, _memory_format(x))


@torch.library.impl(LIBRARY, "soft_pool", "CUDA")
def _pool_cuda(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    kernels = _triton_kernels(x)
    if kernels is None:
        return _pool_any(x, kernel_size, stride, padding, dilation, ceil_mode, detached)
    size = reference.output_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    return kernels.soft_pool(x, size, kernel_size, stride, padding, dilation, _memory_format(x))


@torch.library.register_fake("sparsight::soft_pool", lib=LIBRARY)
def _pool_fake(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    shape = _out_shape(x, (kernel_size, stride, padding, dilation, ceil_mode))
    return x.new_empty(shape).contiguous(memory_format=_memory_format(x))


@torch.library.impl(LIBRARY, "soft_pool_backward", "CompositeExplicitAutograd")
def _backward_any(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    sent = reference.soft_pool_backward(
        _widened(grad), _widened(x), kernel_size, stride, padding, dilation, ceil_mode, detached
    )
    return sent.to(x.dtype).contiguous(memory_format=_memory_format(x))


@torch.library.impl(LIBRARY, "soft_pool_backward", "CPU")
def _backward_cpu(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    if not _has_kernel(x):
        return _backward_any(grad, x, kernel_size, stride, padding, dilation, ceil_mode, detached)
    return cpu.soft_pool_backward(
        grad, x, kernel_size, stride, padding, dilation, _memory_format(x), detached=detached
    )


@torch.library.impl(LIBRARY, "soft_pool_backward", "CUDA")
def _backward_cuda(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    kernels = _triton_kernels(x)
    if kernels is None:
        return _backward_any(grad, x, kernel_size, stride, padding, dilation, ceil_mode, detached)
    return kernels.soft_pool_backward(
        grad, x, kernel_size, stride, padding, dilation, _memory_format(x), detached=detached
    )


@torch.library.register_fake("sparsight::soft_pool_backward", lib=LIBRARY)
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    return x.new_empty(x.shape).contiguous(memory_format=_memory_format(x))


def _setup(ctx, inputs, output) -> None:
    x, *ctx.numbers = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad: Tensor):
    (x,) = ctx.saved_tensors
    sent = torch.ops.sparsight.soft_pool_backward(grad, x, *ctx.numbers)
    return sent, None, None, None, None, None, None


torch.library.register_autograd(
    "sparsight::soft_pool", _backward, setup_context=_setup, lib=LIBRARY
)


def check_choice(caller: str, name: str, value: str, choices: object, default: str) -> None:
    """Raise unless a string argument is one of a Literal's."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(
            f"{caller}: {name} is {value!r}; {' or '.join(map(repr, known))} is needed: pass "
            f"{default!r} for the default."
        )


def _per_axis(
    caller: str, name: str, value: int | Sequence[int] | None, rank: int, minimum: int
) -> list[int]:
    if type(value) is int and value >= minimum:
        return [value] * rank
    given: list = list(value) if isinstance(value, tuple | list) else [value]
    numbers: list[int] = given * rank if len(given) == 1 else given
    if len(numbers) != rank or any(
        isinstance(n, bool) or not isinstance(n, int) or n < minimum for n in numbers
    ):
        raise ValueError(
            f"{caller}: {name} is {value!r}; an integer >= {minimum}, or {rank} of them, is "
            f"needed: pass what torch.nn.MaxPool{rank}d takes."
        )
    return numbers


def _soft_pool(
    rank: int,
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
    weights: Weights,
    gradient: Gradient,
) -> Tensor:
    caller = f"soft_pool{rank}d"
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{caller}: x is {kind}; a floating-point tensor is needed: call x.float()."
        )
    if x.ndim not in (rank + 1, rank + 2):
        axes = ", ".join("DHW"[3 - rank :]) if rank > 1 else "L"
        raise ValueError(
            f"{caller}: x has shape {tuple(x.shape)}; (B, C, {axes}) or (C, {axes}) is needed: "
            f"reshape it, or use the pooling of {x.ndim - 2} axes."
        )
    kernel = _per_axis(caller, "kernel_size", kernel_size, rank, 1)
    # An empty stride is what max_pool takes for none.
    is_given = stride is not None and not (isinstance(stride, tuple | list) and not stride)
    step = _per_axis(caller, "stride", stride, rank, 1) if is_given else kernel
    pad = _per_axis(caller, "padding", padding, rank, 0)
    dilate = _per_axis(caller, "dilation", dilation, rank, 1)
    check_choice(caller, "weights", weights, Weights, "channel")
    check_choice(caller, "gradient", gradient, Gradient, "exact")
    # What max_pool refuses at run time it refuses with RuntimeError; so does its replacement.
    if any(2 * p > k for p, k in zip(pad, kernel, strict=True)):
        raise RuntimeError(
            f"{caller}: padding is {padding} for a kernel_size of {kernel_size}; at most half the "
            "kernel is needed, as for max_pool: pad less, or use a larger kernel."
        )
    images = x.unsqueeze(0) if x.ndim == rank + 1 else x
    if any(size == 0 for size in images.shape[1:]):
        raise RuntimeError(
            f"{caller}: x has shape {tuple(x.shape)}; only the batch may be empty, as for "
            "max_pool: leave such maps out."
        )
    size = reference.output_size(images.shape[2:], kernel, step, pad, dilate, ceil_mode)
    if any(n < 1 for n in size):
        raise RuntimeError(
            f"{caller}: a kernel_size of {kernel_size} with padding {padding} and dilation "
            f"{dilation} does not fit an input of {tuple(images.shape[2:])}: the output would be "
            f"{tuple(size)}, but needs at least 1 along each axis; use a smaller kernel or a "
            "larger input."
        )
    detached = gradient == "detached"
    if weights == "shared":
        wide = _widened(images)
        y = reference.shared_soft_pool(wide, kernel, step, pad, dilate, ceil_mode, detached)
        y = y.contiguous(memory_format=_memory_format(images))
    else:
        # Narrow maps go as they are where the operator widens them as it reads.
        place = images.device.type
        is_narrow = place == "cuda" or (place == "cpu" and _has_kernel(images))
        taken = images if is_narrow else _widened(images)
        y = torch.ops.sparsight.soft_pool(taken, kernel, step, pad, dilate, ceil_mode, detached)
    y = y.to(x.dtype)
    return y.squeeze(0) if x.ndim == rank + 1 else y


def soft_pool1d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    weights: Weights = "channel",
    gradient: Gradient = "exact",
) -> Tensor:
    """Pool (B, C, L) or (C, L) as :func:`soft_pool2d` does (B, C, H, W).

    Example:
        >>> import torch
        >>> from sparsight.ops import soft_pool1d
        >>> soft_pool1d(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 4)
        tensor([[3.4927]])
    """
    return _soft_pool(1, x, kernel_size, stride, padding, dilation, ceil_mode, weights, gradient)


def soft_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    weights: Weights = "channel",
    gradient: Gradient = "exact",
) -> Tensor:
    """Pool by the mean of each window, weighted by the softmax of its values.

    y = sum_i w_i x_i, w_i = exp(x_i) / sum_j exp(x_j) over the window, channel by channel: between
    the mean and the maximum. The maximum of the window is subtracted first, so that no finite
    input overflows.

    Args:
        x: (B, C, H, W) or (C, H, W) floating point; contiguous and channels-last are read in place.
        kernel_size: window, one integer or one per axis, as all that follow.
        stride: step; None (default) is `kernel_size`.
        padding: positions on each side, at most half the kernel, that never win weight.
        dilation: distance of the taps. Default 1.
        ceil_mode: whether windows may hang over the end, as for max_pool. Default False.
        weights: "channel" (default, the paper's), or "shared": one weight for all channels, from
            the sum of their exponentials, which is what the blog post's listing computes; for
            checkpoints trained with it.
        gradient: "exact" (default) or "detached", the published one, which takes the weights for
            constants.

    Returns:
        (B, C, Ho, Wo), or without the B that x did not have, of the shape and memory format of
        max_pool2d, and the dtype of `x`; computed in float32 at least. A window that holds NaN is
        NaN; else one that holds +inf is +inf; -inf has no weight beside a larger value, and is the
        result where there is none.

    Raises:
        TypeError: x is not floating point.
        ValueError: an argument is of the wrong rank, or out of its range.
        RuntimeError: where max_pool2d raises it: the kernel does not fit, padding is more than half
            of it, or anything but the batch is empty.

    Cost: one exponential a tap. On the CPU a compiled kernel runs in float32, and in bfloat16 where
    the CPU has AVX-512 BF16; other half precision pays for a cast to float32 and back. On CUDA
    devices Triton kernels run in float16, bfloat16, float32 and float64; where Triton is not
    installed or does not support the GPU, a warning says so, once. That case, float64 on the CPU,
    shared weights and other devices run plain torch operators, with the memory of all windows.

    Gradient: g w_i (1 + x_i - y), or g w_i where detached; of equal infinities, each its share.
    Nothing but `x` is kept for it.

    Example:
        >>> import torch
        >>> from sparsight.ops import soft_pool2d
        >>> soft_pool2d(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 2)
        tensor([[[[3.4927]]]])

    Source: Stergiou, Poppe, Kalliatakis, ICCV 2021 (arXiv 2101.00440). Padding, dilation,
        ceil_mode and the exact gradient are ours.
    """
    return _soft_pool(2, x, kernel_size, stride, padding, dilation, ceil_mode, weights, gradient)


def soft_pool3d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    weights: Weights = "channel",
    gradient: Gradient = "exact",
) -> Tensor:
    """Pool (B, C, D, H, W) or (C, D, H, W) as :func:`soft_pool2d` does (B, C, H, W).

    Example:
        >>> import torch
        >>> from sparsight.ops import soft_pool3d
        >>> soft_pool3d(torch.zeros(2, 4, 6, 8, 8), (2, 3, 3), stride=2, padding=(0, 1, 1)).shape
        torch.Size([2, 4, 3, 4, 4])
    """
    return _soft_pool(3, x, kernel_size, stride, padding, dilation, ceil_mode, weights, gradient)
