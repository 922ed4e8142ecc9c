"""A convolution that is computed where a sampler says so, and interpolated elsewhere."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.nn.deform_conv import DeformableConv2d
from sparsight.nn.interpolation import ZeroFill
from sparsight.nn.sampler import SamplingDecision

__all__ = ["SampledConv2d"]


class SampledConv2d(nn.Conv2d):
    """A drop-in for a 2-D convolution whose output is sampled and interpolated.

    This module computes densely and applies the mask afterwards: it is for training, and it defines
    the result. `sparsight.freeze` makes the version that skips the holes.

    Attributes:
        sampler: module from features to :class:`SamplingDecision`, or None if decisions are passed
            to forward.
        interpolation: module that fills the holes.

    The other attributes and the keys "weight" and "bias" of the state are those of
    :class:`torch.nn.Conv2d`, so that the state of the replaced layer loads.

    Args:
        in_channels: as for :class:`torch.nn.Conv2d`, like all further arguments not named here.
        out_channels: see there.
        kernel_size: see there.
        stride: see there.
        padding: see there; "same" and "valid" included.
        dilation: see there.
        groups: see there.
        bias: see there.
        device: see there.
        dtype: see there.
        sampler: built for `in_channels` and `stride`. Its head is aligned to this convolution here
            (:meth:`Sampler.align_to`).
        interpolation: one of the interpolation modules; :class:`ZeroFill` where the sampler is a
            :class:`ReLUGate`.

    Raises:
        ValueError: a gate is paired with another interpolation.

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sampler: nn.Module | None,
        interpolation: nn.Module,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        check_gate("SampledConv2d", sampler, interpolation)
        align_to = getattr(sampler, "align_to", None)
        if align_to is not None:
            align_to(self)
        self.sampler = sampler
        self.interpolation = interpolation

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, sampler: nn.Module | None, interpolation: nn.Module
    ) -> "SampledConv2d":
        """Sample the output of an existing convolution.

        Args:
            conv: a plain convolution with zero padding. Its parameters are shared, not copied.
            sampler: see the class.
            interpolation: see the class.

        Returns:
            The sampled convolution, in the mode (training or eval) of `conv`.

        Raises:
            ValueError: if `conv` is deformable or pads with anything but zeros.
        """
        if isinstance(conv, DeformableConv2d):
            raise ValueError(
                "SampledConv2d.from_conv: the convolution is a DeformableConv2d, but only a plain "
                "one can be sampled alone; sample the residual block around it, with SampledBlock."
            )
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"SampledConv2d.from_conv: the convolution has padding_mode={conv.padding_mode!r}, "
                "but only 'zeros' can be sampled; keep this layer dense."
            )
        sampled = cls(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
            (conv.dilation[0], conv.dilation[1]),
            conv.groups,
            conv.bias is not None,
            device="meta",  # replaced below: nothing is allocated, no random number is drawn
            sampler=sampler,
            interpolation=interpolation,
        )
        sampled.weight = conv.weight
        sampled.bias = conv.bias
        return sampled.train(conv.training)

    def forward(
        self, x: Float[Tensor, "B C H W"], decision: SamplingDecision | None = None
    ) -> Float[Tensor, "B O Ho Wo"]:
        """Convolve, and replace the holes by what their surroundings suggest.

        Args:
            x: (B, C, H, W) float.
            decision: a decision at output resolution made elsewhere, to be shared. Default: the
                sampler decides from `x`.

        Returns:
            (B, O, Ho, Wo); equal to the plain convolution where the mask is True.

        Raises:
            ValueError: if there is neither a decision nor a sampler, or the mask's size is not the
                output's.

        Gradient: to `x`, weight, bias, the interpolation's parameters, and through the relaxed mask
        to the sampler.
        """
        if decision is None:
            if self.sampler is None:
                raise ValueError(
                    "SampledConv2d: decision is None and the layer has no sampler, but one of the "
                    "two must say what to compute; pass decision=sampler(features)."
                )
            decision = self.sampler(x)
        assert decision is not None
        features = self._conv_forward(x, self.weight, self.bias)
        mask = decision.weights
        expected = (features.shape[0], 1, *features.shape[2:])
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"SampledConv2d: the decision's mask has shape {tuple(mask.shape)}, but the output "
                f"of shape {tuple(features.shape)} needs {expected}; "
                "build the mask at output resolution, with the stride of the convolution."
            )
        return self.interpolation(features, mask)

    def samplers_named(self) -> list[tuple[str, nn.Module]]:
        """The samplers owned here, by relative name; the index in this list is the decision's."""
        return [] if self.sampler is None else [("sampler", self.sampler)]

    def gated_macs(self, i: int, height: int, width: int) -> int:
        """Dense multiply-adds per image that decision `i` gates.

        Args:
            i: index of the decision, 0.
            height: of the decision's mask.
            width: of the decision's mask.

        Returns:
            Output size times multiply-adds per position, without the bias.
        """
        if i != 0:
            raise IndexError(
                f"SampledConv2d.gated_macs: i is {i}, but a convolution has one decision; pass 0."
            )
        return height * width * macs_per_position(self)


def check_gate(caller: str, sampler: nn.Module | None, interpolation: nn.Module) -> None:
    """Raise ValueError if a gate that scales is paired with anything but zeros in the holes."""
    if getattr(sampler, "scales", False) and not isinstance(interpolation, ZeroFill):
        raise ValueError(
            f"{caller}: the sampler is a {type(sampler).__name__}, which multiplies what is "
            f"computed, and the interpolation a {type(interpolation).__name__}, which takes the "
            "factor for a mask in [0, 1]; a gate needs holes of zero: pass "
            "interpolation=ZeroFill()."
        )


def macs_per_position(conv: nn.Conv2d) -> int:
    """Multiply-adds of one output position of a convolution, all channels, without the bias.

    Those of the convolution that makes the offsets of a deformable one are its own.
    """
    kernel_height, kernel_width = conv.kernel_size
    macs = conv.out_channels * (conv.in_channels // conv.groups) * kernel_height * kernel_width
    return macs + (macs_per_position(conv.offset) if isinstance(conv, DeformableConv2d) else 0)
