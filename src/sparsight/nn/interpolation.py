"""How the holes of a sampled map are filled from the sites around them.

Every module here maps (features, mask) to features: sites are kept, a hole becomes a weighted mean
of the sites in the window around it, and a hole that sees no site becomes zero. They differ in the
kernel.
"""

import math
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparsight import ops

__all__ = [
    "AveragePoolInterpolation",
    "ConvInterpolation",
    "NearestInterpolation",
    "RBFInterpolation",
    "ZeroFill",
]

Features = Float[Tensor, "B C H W"]
Mask = Bool[Tensor, "B 1 H W"] | Float[Tensor, "B 1 H W"]


class RBFInterpolation(nn.Module):
    """Fill holes with a Gaussian-weighted mean of the sites, of learned width.

    The kernel is K(d) = (w^2 / 2 pi) exp(-w^2 d^2 / 2) for a site at distance d pixels.

    Attributes:
        width: scalar parameter w, the *inverse* width in 1/px; its sign does not matter.

    Args:
        window: side of the square of sites that a hole sees, in px, odd. Default 7, the paper's.
        width: initial w. Default 3.0, the published initial value: nearly the nearest site.
        eps: None (default) makes the weights sum to one exactly, at any width. A number is added to
            the denominator, as in the published code with 1e-5, which shrinks values whose sites
            are far: at w = 3, to 0.2 % at distance 2.
        device: of `width`.
        dtype: of `width`.

    Example:
        >>> mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
        >>> mask[..., 1, 1] = True
        >>> RBFInterpolation()(torch.arange(9.0).view(1, 1, 3, 3), mask).unique().tolist()
        [4.0]

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, section 3.3. We normalise in log space by
    default; the prefactor, which then cancels, is only applied with `eps`.
    """

    def __init__(
        self,
        *,
        window: int = 7,
        width: float = 3.0,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_window("RBFInterpolation", window)
        _check_eps("RBFInterpolation", eps)
        if not (math.isfinite(width) and width != 0):
            raise ValueError(
                f"RBFInterpolation: width is {width}, but must be finite and not 0, where its "
                "gradient vanishes; pass the inverse width in 1/px, for example 3.0."
            )
        self.window = window
        self.eps = eps
        self.width = nn.Parameter(torch.full((), float(width), device=device, dtype=dtype))
        self.register_buffer("squared_distance", _squared_distance(window), persistent=False)

    @property
    def preserves_constants(self) -> bool:
        """Whether the weights sum to one at every hole that sees a site."""
        return self.eps is None

    def log_kernel(self) -> Float[Tensor, "K K"]:
        """Logarithm of the kernel over the window, (K, K), at least float32."""
        squared_width = _at_least_float32(self.width) ** 2
        log_kernel = -0.5 * squared_width * cast(Tensor, self.squared_distance)
        if self.eps is not None:
            log_kernel = log_kernel + torch.log(squared_width / (2 * math.pi))
        return log_kernel

    def forward(self, features: Features, mask: Mask) -> Features:
        """Fill the holes.

        Args:
            features: (B, C, H, W) float.
            mask: (B, 1, H, W) bool, or float in [0, 1] in training.

        Returns:
            (B, C, H, W), mask * features + (1 - mask) * weighted mean.

        Gradient: to features, a float mask, and `width`.
        """
        return ops.interpolate(features, mask, self.log_kernel(), eps=self.eps)

    def extra_repr(self) -> str:
        """The settings, for repr."""
        return _repr(self.window, self.eps)


class ConvInterpolation(nn.Module):
    """Fill holes with a mean of the sites, weighted by a learned kernel.

    Attributes:
        weight: (K, K) parameter; its absolute value is the kernel. Starts as a Gaussian of width 1
            px.

    Args:
        window: side K of the kernel, in px, odd. Default 7, the paper's.
        eps: as for :class:`RBFInterpolation`.
        device: of `weight`.
        dtype: of `weight`.

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, section 3.3, "convolution". The initial kernel
    is ours: theirs is not stated.
    """

    def __init__(
        self,
        *,
        window: int = 7,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_window("ConvInterpolation", window)
        _check_eps("ConvInterpolation", eps)
        self.window = window
        self.eps = eps
        initial = torch.exp(-0.5 * _squared_distance(window))
        self.weight = nn.Parameter(initial.to(device=device, dtype=dtype))

    @property
    def preserves_constants(self) -> bool:
        """Whether the weights sum to one at every hole that sees a site."""
        return self.eps is None

    def log_kernel(self) -> Float[Tensor, "K K"]:
        """Logarithm of the kernel over the window, (K, K), at least float32."""
        # The floor keeps a weight of exactly zero from turning into NaN gradients.
        return torch.log(_at_least_float32(self.weight).abs().clamp_min(1e-20))

    def forward(self, features: Features, mask: Mask) -> Features:
        """Fill the holes, as :meth:`RBFInterpolation.forward`.

        Gradient: to features, a float mask, and `weight`.
        """
        return ops.interpolate(features, mask, self.log_kernel(), eps=self.eps)

    def extra_repr(self) -> str:
        """The settings, for repr."""
        return _repr(self.window, self.eps)


class AveragePoolInterpolation(nn.Module):
    """Fill holes with the plain mean of the sites in the window; no parameters.

    Args:
        window: side of the window, in px, odd. Default 7, the paper's.

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, section 3.3, "average pooling".
    """

    eps: None = None
    preserves_constants: bool = True

    def __init__(self, *, window: int = 7) -> None:
        super().__init__()
        _check_window("AveragePoolInterpolation", window)
        self.window = window
        zeros = torch.zeros(window, window, dtype=torch.int64)
        self.register_buffer("exponent", zeros, persistent=False)

    def log_kernel(self) -> Float[Tensor, "K K"]:
        """Logarithm of the kernel over the window: (K, K) zeros, float32."""
        return cast(Tensor, self.exponent).float()

    def forward(self, features: Features, mask: Mask) -> Features:
        """Fill the holes, as :meth:`RBFInterpolation.forward`.

        Gradient: to features and a float mask.
        """
        return ops.interpolate(features, mask, self.log_kernel())

    def extra_repr(self) -> str:
        """The settings, for repr."""
        return _repr(self.window, None)


class NearestInterpolation(nn.Module):
    """Fill each hole with its nearest site; of equally near ones the first in raster order.

    A float mask is thresholded at one half to say what a site is. Otherwise every position would be
    its own nearest one and the mask would get no gradient.

    Args:
        window: side of the window that is searched, in px, odd. Default 7.

    Cost: a copy a hole; it counts as no multiply-add.

    Source: Figurnov et al., "PerforatedCNNs", NIPS 2016, arXiv 1504.08362, section 3.1; the
    sampling paper does not have it. There equally near sites are chosen from at random, once.
    """

    eps: None = None
    preserves_constants: bool = True
    multiplies: bool = False

    def __init__(self, *, window: int = 7) -> None:
        super().__init__()
        _check_window("NearestInterpolation", window)
        self.window = window
        # Steps of 100 in the exponent leave the runner-up a weight of exp(-100), zero beside the
        # nearest site in float32. Integers, as half precision could not hold them.
        step = 10 ** math.ceil(math.log10(100 * window * window + 1))
        order = torch.arange(window * window).view(window, window)
        exponent = -step * _squared_distance(window) - 100 * order
        self.register_buffer("exponent", exponent, persistent=False)

    def log_kernel(self) -> Float[Tensor, "K K"]:
        """Logarithm of the kernel over the window, (K, K) float32."""
        return cast(Tensor, self.exponent).float()

    def forward(self, features: Features, mask: Mask) -> Features:
        """Fill the holes, as :meth:`RBFInterpolation.forward`.

        Gradient: to features, and to a float mask where it is below one half.
        """
        if mask.dtype == torch.bool:
            return ops.interpolate(features, mask, self.log_kernel())
        filled = ops.interpolate(features, mask >= 0.5, self.log_kernel())
        return filled + mask.to(features.dtype) * (features - filled)

    def extra_repr(self) -> str:
        """The settings, for repr."""
        return _repr(self.window, None)


class ZeroFill(nn.Module):
    """Leave holes at zero: the baseline without interpolation.

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, ablation: harmless for classification, not for
    detection and segmentation.
    """

    eps: None = None
    preserves_constants: bool = False
    window: int = 0

    def forward(self, features: Features, mask: Mask) -> Features:
        """Zero the holes.

        Args:
            features: (B, C, H, W) float.
            mask: (B, 1, H, W) bool, or float in [0, 1] in training.

        Returns:
            (B, C, H, W), mask * features.

        Raises:
            ValueError: if the mask's shape is not the features' with one channel.
        """
        expected = (features.shape[0], 1, *features.shape[2:])
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"ZeroFill: mask has shape {tuple(mask.shape)}, but features of shape "
                f"{tuple(features.shape)} need {expected}; build the mask at output resolution."
            )
        if mask.dtype == torch.bool:
            return torch.where(mask, features, 0.0)
        return mask.to(features.dtype) * features


def _check_window(name: str, window: int) -> None:
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(
            f"{name}: window is {window!r}, but must be an odd integer of at least 1, so that it "
            "has a centre; pass 7 for the paper's."
        )


def _check_eps(name: str, eps: float | None) -> None:
    if eps is not None and not (math.isfinite(eps) and eps > 0):
        raise ValueError(
            f"{name}: eps is {eps}, but must be positive; pass None for the exact normalisation or "
            "1e-5 for the published one."
        )


def _squared_distance(window: int) -> Tensor:
    """Squared distance to the centre of the window, (K, K) int64."""
    squares = (torch.arange(window) - window // 2) ** 2
    return squares[:, None] + squares[None, :]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _repr(window: int, eps: float | None) -> str:
    return f"window={window}" if eps is None else f"window={window}, eps={eps}"
