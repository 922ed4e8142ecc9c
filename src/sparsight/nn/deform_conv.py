"""A deformable convolution that makes its own offsets."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight import ops

__all__ = ["DeformableConv2d"]


class DeformableConv2d(nn.Conv2d):
    """A drop-in for a 2-D convolution whose taps move: deformable convolution v1 or v2.

    The offsets are a convolution with the kernel, stride, padding and dilation of this one, of its
    input or of another map of that size (`guide`). It starts at zero, so that v1 starts as the
    convolution it replaces and v2 as half of it: the sigmoid of zero, as published.

    Attributes:
        offset: the convolution that makes the offsets, 2 * offset_groups * kh * kw channels, y
            before x for each tap; in v2 offset_groups * kh * kw further ones, the logits of the
            factors of the taps.
        offset_groups: see below.
        is_modulated: see below.
        is_guided: whether forward is to be given a `guide`.

    The other attributes and the keys "weight" and "bias" of the state are those of
    :class:`torch.nn.Conv2d`, so that the state of the replaced layer loads but for "offset.*".

    Args:
        in_channels: as for :class:`torch.nn.Conv2d`, like all further arguments not named here.
        out_channels: see there.
        kernel_size: see there.
        stride: see there.
        padding: see there, but in numbers.
        dilation: see there.
        groups: see there.
        bias: see there.
        device: see there.
        dtype: see there.
        guide_channels: channels of the map that the offsets are made of. Default: `in_channels`.
            The published detector makes them of the input of the residual block, because the
            input of its second convolution is sampled.
        offset_groups: channel groups that move on their own. Default 1, as published.
        is_modulated: v2: each tap has a factor, the sigmoid of a logit of its own. Default False.

    Source: Dai et al., ICCV 2017 (arXiv 1703.06211); v2 Zhu et al., CVPR 2019 (arXiv 1811.11168);
    in sampled blocks Xie et al., ECCV 2020 (arXiv 2003.08866).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        guide_channels: int | None = None,
        offset_groups: int = 1,
        is_modulated: bool = False,
    ) -> None:
        if isinstance(padding, str):
            raise ValueError(
                f"DeformableConv2d: padding is {padding!r}, but numbers are needed; "
                "pass dilation * (kernel_size - 1) // 2 for the size of the input."
            )
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
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(
                f"DeformableConv2d: offset_groups is {offset_groups}, but must divide the "
                f"{in_channels} input channels; pass 1 for the published setting."
            )
        self.offset_groups = offset_groups
        self.is_modulated = is_modulated
        self.is_guided = guide_channels is not None
        kernel = cast(tuple[int, int], self.kernel_size)
        self.offset = nn.Conv2d(
            in_channels if guide_channels is None else guide_channels,
            (3 if is_modulated else 2) * offset_groups * kernel[0] * kernel[1],
            kernel,
            stride,
            padding,
            dilation,
            device=device,
            dtype=dtype,
        )
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        guide_channels: int | None = None,
        offset_groups: int = 1,
        is_modulated: bool = False,
    ) -> "DeformableConv2d":
        """Let the taps of an existing convolution move.

        Args:
            conv: a plain convolution with zero padding. Its parameters are shared, not copied.
            guide_channels: see the class.
            offset_groups: see the class.
            is_modulated: see the class.

        Returns:
            The deformable convolution, in the mode (training or eval) of `conv`.

        Raises:
            ValueError: if `conv` pads with anything but zeros, or by a word.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"DeformableConv2d.from_conv: the convolution has padding_mode="
                f"{conv.padding_mode!r}, but only 'zeros' can be deformed; keep this layer."
            )
        deformable = cls(
            conv.in_channels,
            conv.out_channels,
            cast(tuple[int, int], conv.kernel_size),
            cast(tuple[int, int], conv.stride),
            cast(tuple[int, int], conv.padding),
            cast(tuple[int, int], conv.dilation),
            conv.groups,
            conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            guide_channels=guide_channels,
            offset_groups=offset_groups,
            is_modulated=is_modulated,
        )
        deformable.weight = conv.weight
        deformable.bias = conv.bias
        return deformable.train(conv.training)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        guide: Float[Tensor, "B G H W"] | None = None,
        *,
        sites: ops.Sites | None = None,
    ) -> Float[Tensor, "B O Ho Wo"]:
        """Convolve at moved taps.

        Args:
            x: (B, C, H, W) float.
            guide: (B, guide_channels, H, W), what the offsets are made of; needed where the layer
                was made with `guide_channels`. Default: `x`.
            sites: compute offsets and outputs here only, at output resolution, and zero elsewhere.
                Default: everywhere.

        Returns:
            (B, O, Ho, Wo) channels-last.

        Raises:
            TypeError: as :func:`sparsight.ops.sampled_deform_conv2d`.
            ValueError: there is no `guide` but one is needed, or as
                :func:`sparsight.ops.sampled_deform_conv2d`.

        Gradient: to `x`, `guide` and all parameters.
        """
        if guide is None and self.is_guided:
            raise ValueError(
                "DeformableConv2d: guide is None, but the layer was made with guide_channels="
                f"{self.offset.in_channels}; pass the map that the offsets are made of, or put the "
                "residual block around it into a DeformableBlock."
            )
        guide = x if guide is None else guide
        numbers = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if sites is None or not isinstance(self.offset, nn.Conv2d):
            # A frozen convolution has one kernel, for everywhere; off the sites nobody reads it.
            offset = self.offset(guide)
        else:
            offset = ops.sampled_conv2d(
                guide, self.offset.weight, self.offset.bias, sites=sites, **numbers
            )
        if sites is None:
            sites = ops.sites_from_mask(torch.ones_like(offset[:, :1], dtype=torch.bool))
        modulation = None
        if self.is_modulated:
            kernel_height, kernel_width = self.kernel_size
            moves = 2 * self.offset_groups * kernel_height * kernel_width
            offset, logits = offset[:, :moves], offset[:, moves:]
            modulation = torch.sigmoid(logits)
        return ops.sampled_deform_conv2d(
            x, offset, self.weight, self.bias, sites=sites, modulation=modulation, **numbers
        )

    def extra_repr(self) -> str:
        """The convolution's numbers, and what makes it move, for repr."""
        guide = f", guide_channels={self.offset.in_channels}" if self.is_guided else ""
        groups = f", offset_groups={self.offset_groups}" if self.offset_groups > 1 else ""
        return super().extra_repr() + guide + groups + ", is_modulated=True" * self.is_modulated
