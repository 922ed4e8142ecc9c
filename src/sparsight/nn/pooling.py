"""Pooling by a softmax-weighted mean: modules in the place of torch's max and average pooling.

The functions they call, and what exactly is computed, are :func:`sparsight.ops.soft_pool2d` and its
kin. Shapes: B C H W input, Ho Wo output, L and D the axes of one and three dimensions.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight import ops
from sparsight.ops.pool import Gradient, Weights, check_choice

__all__ = ["AdaptiveSoftPool2d", "PooledConv2d", "SoftPool1d", "SoftPool2d", "SoftPool3d"]

Numbers = int | Sequence[int]


class _SoftPool(nn.Module):
    """The settings of a pooling; which axes it pools is the subclass's."""

    def __init__(
        self,
        kernel_size: Numbers,
        *,
        stride: Numbers | None = None,
        padding: Numbers = 0,
        dilation: Numbers = 1,
        ceil_mode: bool = False,
        weights: Weights = "channel",
        gradient: Gradient = "exact",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(name, "weights", weights, Weights, "channel")
        check_choice(name, "gradient", gradient, Gradient, "exact")
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode
        self.weights: Weights = weights
        self.gradient: Gradient = gradient

    def extra_repr(self) -> str:
        """The settings, for repr."""
        text = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        if self.dilation != 1:
            text += f", dilation={self.dilation}"
        if self.ceil_mode:
            text += ", ceil_mode=True"
        return text + _choices(self.weights, self.gradient)


class SoftPool1d(_SoftPool):
    """Pool (B, C, L) or (C, L); the arguments are those of :class:`SoftPool2d`.

    Example:
        >>> SoftPool1d(2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 4])
    """

    def forward(self, x: Float[Tensor, "*B C L"]) -> Float[Tensor, "*B C Lo"]:
        """Pool, as :func:`sparsight.ops.soft_pool1d`."""
        return ops.soft_pool1d(
            x,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            weights=self.weights,
            gradient=self.gradient,
        )


class SoftPool2d(_SoftPool):
    """A drop-in for `nn.MaxPool2d` whose result is the softmax-weighted mean of the window.

    Args:
        kernel_size: window, one integer or one per axis, as all that follow.
        stride: step; None (default) is `kernel_size`.
        padding: positions on each side that never win weight, at most half the kernel.
        dilation: distance of the taps. Default 1.
        ceil_mode: whether windows may hang over the end. Default False.
        weights: "channel" (default, the paper's) or "shared", the blog post's listing.
        gradient: "exact" (default) or "detached", the published one.

    Raises:
        ValueError: `weights` or `gradient` is unknown.

    Example:
        >>> SoftPool2d(3, stride=2, padding=1)(torch.zeros(1, 8, 7, 7)).shape
        torch.Size([1, 8, 4, 4])

    Source: Stergiou, Poppe, Kalliatakis, ICCV 2021 (arXiv 2101.00440). See
    :func:`sparsight.ops.soft_pool2d` for what is ours.
    """

    def forward(self, x: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C Ho Wo"]:
        """Pool, as :func:`sparsight.ops.soft_pool2d`."""
        return ops.soft_pool2d(
            x,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            weights=self.weights,
            gradient=self.gradient,
        )


class SoftPool3d(_SoftPool):
    """Pool (B, C, D, H, W) or (C, D, H, W); the arguments are those of :class:`SoftPool2d`.

    Example:
        >>> SoftPool3d((1, 2, 2))(torch.zeros(1, 3, 4, 8, 8)).shape
        torch.Size([1, 3, 4, 4, 4])
    """

    def forward(self, x: Float[Tensor, "*B C D H W"]) -> Float[Tensor, "*B C Do Ho Wo"]:
        """Pool, as :func:`sparsight.ops.soft_pool3d`."""
        return ops.soft_pool3d(
            x,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            weights=self.weights,
            gradient=self.gradient,
        )


class AdaptiveSoftPool2d(nn.Module):
    """Pool to a given size, over the windows of `nn.AdaptiveMaxPool2d`.

    Output i along an axis of n inputs and m outputs pools floor(i n / m) to ceil((i + 1) n / m).

    Args:
        output_size: height and width of the output, or one integer for both; None keeps that of the
            input.
        weights: as for :class:`SoftPool2d`.
        gradient: as for :class:`SoftPool2d`.

    Raises:
        ValueError: `output_size` is not such, or `weights` or `gradient` is unknown.

    Cost: where m does not divide n, windows differ in size and overlap; then the map is first
    copied, each window apart.

    Example:
        >>> AdaptiveSoftPool2d(1)(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[3.4927]]])
    """

    def __init__(
        self,
        output_size: int | Sequence[int | None] | None,
        *,
        weights: Weights = "channel",
        gradient: Gradient = "exact",
    ) -> None:
        super().__init__()
        check_choice("AdaptiveSoftPool2d", "weights", weights, Weights, "channel")
        check_choice("AdaptiveSoftPool2d", "gradient", gradient, Gradient, "exact")
        is_pair = isinstance(output_size, tuple | list)
        both: list[Any] = list(output_size) if is_pair else [output_size, output_size]
        if len(both) != 2 or any(n is not None and (not isinstance(n, int) or n < 1) for n in both):
            raise ValueError(
                f"AdaptiveSoftPool2d: output_size is {output_size!r}, but must be an integer of at "
                "least 1, None, or two of these; pass what nn.AdaptiveMaxPool2d takes."
            )
        self.output_size = output_size
        self._sizes = both
        self.weights: Weights = weights
        self.gradient: Gradient = gradient

    def forward(self, x: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C Ho Wo"]:
        """Pool to the output size.

        Args:
            x: (B, C, H, W) or (C, H, W) floating point.

        Returns:
            (B, C, Ho, Wo), or without the B that x did not have.

        Gradient: as :func:`sparsight.ops.soft_pool2d`.
        """
        if x.ndim not in (3, 4):
            raise ValueError(
                f"AdaptiveSoftPool2d: x has shape {tuple(x.shape)}, but (B, C, H, W) or (C, H, W) "
                "is needed; add or drop a dimension."
            )
        size = [x.shape[-2], x.shape[-1]]
        target = [n if m is None else m for n, m in zip(size, self._sizes, strict=True)]
        kernel = [n // m for n, m in zip(size, target, strict=True)]
        if any(n % m for n, m in zip(size, target, strict=True)):
            for axis in (-2, -1):
                x, kernel[axis] = _windows_apart(x, axis, target[axis])
        return ops.soft_pool2d(x, kernel, weights=self.weights, gradient=self.gradient)

    def extra_repr(self) -> str:
        """The settings, for repr."""
        return f"output_size={self.output_size}" + _choices(self.weights, self.gradient)


class PooledConv2d(nn.Conv2d):
    """A convolution at stride 1 and a pooling, in the place of a strided convolution.

    The pooled windows start where the strided convolution had its outputs and are as large as its
    stride, so that none overlap; the output has the same shape. Parameters, and the keys of the
    state, are those of the convolution.

    Attributes:
        pool: what follows the convolution.
        source_stride: of the convolution that this one replaces.

    Cost: as many times the multiply-adds of the strided convolution as its stride has positions.
    """

    pool: nn.Module
    source_stride: tuple[int, int]

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, kind: Literal["soft", "max", "average"]
    ) -> "PooledConv2d":
        """Pool in the place of the steps of an existing convolution.

        Args:
            conv: its parameters are shared, not copied.
            kind: of the pooling.

        Returns:
            The convolution, in the mode (training or eval) of `conv`.
        """
        stride = (conv.stride[0], conv.stride[1])
        pooled = cls(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            1,
            conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
            (conv.dilation[0], conv.dilation[1]),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",  # replaced below: nothing is allocated, no random number is drawn
        )
        pooled.weight = conv.weight
        pooled.bias = conv.bias
        pooled.source_stride = stride
        # Windows at the end are cut: as many outputs as the steps of the convolution had.
        if kind == "soft":
            pooled.pool = SoftPool2d(stride, ceil_mode=True)
        elif kind == "max":
            pooled.pool = nn.MaxPool2d(stride, ceil_mode=True)
        else:
            pooled.pool = nn.AvgPool2d(stride, ceil_mode=True)
        return pooled.train(conv.training)

    def forward(self, x: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B O Ho Wo"]:
        """Convolve everywhere, then pool."""
        return self.pool(super().forward(x))


def _windows_apart(x: Tensor, axis: int, outputs: int) -> tuple[Tensor, int]:
    """The adaptive windows along an axis one after another, and how long each is.

    Shorter ones are filled up with -inf, which has no weight.
    """
    inputs = x.shape[axis]
    starts = [i * inputs // outputs for i in range(outputs)]
    ends = [-(-(i + 1) * inputs // outputs) for i in range(outputs)]
    length = max(b - a for a, b in zip(starts, ends, strict=True))
    places, is_filled = [], []
    for a, b in zip(starts, ends, strict=True):
        places += [min(a + i, b - 1) for i in range(length)]
        is_filled += [a + i >= b for i in range(length)]
    index = torch.tensor(places, device=x.device)
    filled = torch.tensor(is_filled, device=x.device)
    if axis == -2:
        filled = filled[:, None]
    return x.index_select(axis, index).masked_fill(filled, -torch.inf), length


def _choices(weights: str, gradient: str) -> str:
    text = "" if weights == "channel" else f", weights={weights!r}"
    return text if gradient == "exact" else f"{text}, gradient={gradient!r}"
