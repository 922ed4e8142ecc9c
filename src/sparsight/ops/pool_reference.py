"""SoftPool in plain aten, in one to three dimensions: the truth for tests, and the general path.

Shapes: B batch, C channels, S the spatial axes (one to three), So those of the output, K taps of a
window. Nothing here is fast; `soft_pool` and `shared_soft_pool` are differentiable by autograd, in
any float dtype, except where a window holds an infinity.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["output_size", "shared_soft_pool", "soft_pool", "soft_pool_backward"]


def output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Spatial size of what max_pool returns, and this; below 1 where no window fits.

    With `ceil_mode` a window may hang over the end, but must start inside the input or its left
    padding.
    """
    sizes = []
    for size, k, s, p, d in zip(input_size, kernel_size, stride, padding, dilation, strict=True):
        room = size + 2 * p - d * (k - 1) - 1
        out = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode:
            # No branch on a size: an exported program serves them all.
            out = torch.sym_min(out, (size + p - 1) // s + 1)
        sizes.append(out)
    return sizes


def _pads(
    input_size: Sequence[int],
    out: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """What F.pad takes so that exactly the windows fit; negative where the end is not read."""
    pads: list[int] = []
    axes = zip(input_size, out, kernel_size, stride, padding, dilation, strict=True)
    for size, o, k, s, p, d in axes:
        pads = [p, (o - 1) * s + d * (k - 1) + 1 - size - p, *pads]
    return pads


def _windows(
    x: Tensor,
    fill: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """The window of each output: (B, C, *So, K), `fill` where it lies outside the input."""
    rank = len(kernel_size)
    size = x.shape[2:]
    out = output_size(size, kernel_size, stride, padding, dilation, ceil_mode)
    u = F.pad(x, _pads(size, out, kernel_size, stride, padding, dilation), value=fill)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        # Each unfold appends its taps behind all axes.
        u = u.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return u.flatten(2 + rank)


def _softmax(u: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest value (..., 1), distances to it and weights (..., K) of windows (..., K).

    What equals the maximum is at distance 0 also where both are infinite, so that infinities share
    the weight; a distance whose weight is 0 is 0, so that their product is.
    """
    # Its gradient cancels: softmax does not depend on what is subtracted.
    top = torch.where(inside, u, -torch.inf).amax(-1, keepdim=True).detach()
    distance = torch.where(top.isinf() & (u == top), torch.zeros_like(u), u - top)
    weight = torch.where(inside, distance.exp(), 0.0)
    distance = torch.where(weight == 0, torch.zeros_like(u), distance)
    # At least 1, unless a window lies in the padding altogether.
    total = weight.sum(-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    return top, distance, weight / total


def _geometry(x: Tensor, numbers: tuple) -> tuple[Tensor, Tensor]:
    """Windows of x, padded with zeros, and which of their taps lie inside the input."""
    ones = x.new_ones((1, 1, *x.shape[2:]))
    return _windows(x, 0.0, *numbers), _windows(ones, 0.0, *numbers) != 0


def soft_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Softmax-weighted mean of each window, channel by channel: what the kernels must equal.

    Args:
        x: (B, C, *S) float.
        kernel_size: one number per spatial axis, as all that follow.
        stride: step.
        padding: positions on each side that never win weight.
        dilation: distance of the taps.
        ceil_mode: whether windows may hang over the end.

    Returns:
        (B, C, *So): sum_i w_i x_i, w = softmax of the window. NaN where the window holds one, +inf
        where it holds one, -inf where it holds nothing else or lies in the padding altogether.
    """
    u, inside = _geometry(x, (kernel_size, stride, padding, dilation, ceil_mode))
    top, distance, weight = _softmax(u, inside)
    # Relative to the maximum: as exact for features of 1e4 +- 1 as for +- 1.
    return (top + (weight * distance).sum(-1, keepdim=True)).squeeze(-1)


def soft_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    """Gradient of `soft_pool`.

    Args:
        grad: (B, C, *So).
        x: as given to `soft_pool`, like all that follow.
        kernel_size: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        ceil_mode: see there.
        detached: take the weights for constants: g w_i, the published gradient, in the place of
            g w_i (1 + x_i - y).

    Returns:
        (B, C, *S), the gradient of x. Equal infinities share what a window sends back.
    """
    numbers = (kernel_size, stride, padding, dilation, ceil_mode)
    u, inside = _geometry(x, numbers)
    _, distance, weight = _softmax(u, inside)
    sent = grad.unsqueeze(-1) * weight
    if not detached:
        mean = (weight * distance).sum(-1, keepdim=True)
        sent = sent * (1 + distance - mean)
    size, out = x.shape[2:], grad.shape[2:]
    pads = _pads(size, out, kernel_size, stride, padding, dilation)
    lengths = [n + a + b for n, a, b in zip(size, pads[-2::-2], pads[::-2], strict=True)]
    padded = sent.new_zeros((*x.shape[:2], *lengths))
    for tap, place in enumerate(_places(out, kernel_size, stride, dilation)):
        padded[(..., *place)] += sent[..., tap]
    # Cut the padding off; where the end was not read, its gradient is zero.
    return F.pad(padded, [-p for p in pads])


def _places(
    out: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Where each tap of all windows lies in the padded input, in the order of `_windows`."""
    axes = zip(out, kernel_size, stride, dilation, strict=True)
    return itertools.product(
        *([slice(d * t, d * t + (o - 1) * s + 1, s) for t in range(k)] for o, k, s, d in axes)
    )


def shared_soft_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    detached: bool,
) -> Tensor:
    """The listing's variant: one weight for all channels, from the sum of their exponentials.

    Args:
        x: as given to `soft_pool`, like all that follow.
        kernel_size: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        ceil_mode: see there.
        detached: no gradient through the weights.

    Returns:
        (B, C, *So): sum_i w_i x_i with w = softmax over the window of log sum_c exp(x_c).
    """
    numbers = (kernel_size, stride, padding, dilation, ceil_mode)
    u, inside = _geometry(x, numbers)
    logits = _windows(x.logsumexp(1, keepdim=True), 0.0, *numbers)
    _, _, weight = _softmax(logits, inside)
    if detached:
        weight = weight.detach()
    pooled = torch.where(weight == 0, torch.zeros_like(u), weight * u).sum(-1)
    # A window of padding only: as max_pool, and `soft_pool`.
    return torch.where(inside.any(-1), pooled, -torch.inf)
