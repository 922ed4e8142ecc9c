"""ReLU gating: a cheap map whose zeros say what need not be computed."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.nn.sampler import SamplingDecision

__all__ = ["ReLUGate"]


class ReLUGate(nn.Module):
    """A convolution to one map, a batch norm and a ReLU: the result is multiplied by it.

    In the place of :class:`Sampler`, with :class:`ZeroFill`, it makes an activation-gated network::

        g = relu(norm(conv(x)))          (B, 1, Ho, Wo)
        out = g * F(x)                   and F(x) is computed where g > 0 only

    Unlike a sampler's decision, the map scales what is computed, at inference too: `relaxed` is g
    in both modes. There is no noise, no grid and no temperature.

    Attributes:
        conv: to one channel, without bias.
        norm: BatchNorm2d of that channel; with its bias at 0 about half of the positions are
            computed.
        scales: True: what is computed is multiplied by `relaxed`.

    Args:
        in_channels: channels C of the features.
        stride: of the convolution that the map gates, so that the map has its output's size.
        kernel_size: 3 (default) or 1.
        bias: of the norm. Default 0, the norm's own, which the source relies on; 1 starts at a
            density of 0.84 and a mean factor of 1.08, nearer to the network without gates.
        device: of conv and norm.
        dtype: of conv and norm.

    Cost: kernel_size^2 * C multiply-adds per position of the map; the product is not counted.

    Example:
        >>> gate = ReLUGate(8).eval()
        >>> decision = gate(torch.randn(2, 8, 5, 7))
        >>> bool((decision.mask == (decision.relaxed > 0)).all())
        True

    Source: Dong, Huang, Yang, Yan, "More is Less" (LCCL), CVPR 2017, arXiv 1703.08651, in the form
    that shares a one-channel map among all output channels. No code was published, and Xie et al.
    (ECCV 2020), who compare with it, did not publish their variant: this is our reading of both. We
    depart from LCCL thus: in a block every map is made of the block's input, as the sampling masks
    are; and the sampling loss may be charged on it, so that curves can be compared.
    """

    scales = True

    def __init__(
        self,
        in_channels: int,
        *,
        stride: int | tuple[int, int] = 1,
        kernel_size: Literal[1, 3] = 3,
        bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(
                f"ReLUGate: kernel_size is {kernel_size}, but must be 1 or 3, to cost little; "
                "pass 3 for the default."
            )
        self.conv = nn.Conv2d(
            in_channels,
            1,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.BatchNorm2d(1, device=device, dtype=dtype)
        nn.init.constant_(self.norm.bias, bias)

    @property
    def level(self) -> nn.Parameter:
        """What moves the density as a whole: the norm's bias."""
        return self.norm.bias

    def extra_repr(self) -> str:
        """Nothing: the children say it all."""
        return ""

    def align_to(self, conv: nn.Conv2d) -> None:
        """Refuse a convolution whose output the map would not fit.

        Raises:
            ValueError: the strides differ, or the padding is not half the kernel.
        """
        fits = tuple(conv.stride) == tuple(self.conv.stride) and (
            conv.padding == "same"
            or (
                not isinstance(conv.padding, str)
                and all(
                    2 * int(p) == d * (k - 1)
                    for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
                )
            )
        )
        if not fits:
            raise ValueError(
                f"ReLUGate.align_to: the convolution has stride {tuple(conv.stride)}, kernel "
                f"{tuple(conv.kernel_size)} and padding {conv.padding}, but the gate's stride "
                f"{tuple(self.conv.stride)} and a padding of half the kernel are needed; keep "
                "this layer dense, or gate it by another sampler."
            )

    def forward(self, x: Float[Tensor, "B C H W"]) -> SamplingDecision:
        """Decide what is computed, and by what it is multiplied.

        Args:
            x: (B, C, H, W) float, the input of the gated layer.

        Returns:
            The decision: `relaxed` is g, unbounded above; `mask` is g > 0 (NaN counts as computed);
            `probability` is 1 or 0, as the mask, with the gradient of g: its mean is the density,
            pulled down as an L1 norm of g pulls.

        Gradient: of `relaxed` and `probability` to `x`, conv and norm.
        """
        gate = F.relu(self.norm(self.conv(x))).float()
        mask = ~(gate <= 0)
        # The difference is exactly zero, so that the value is exactly 0 or 1.
        probability = mask.float() + (gate - gate.detach())
        return SamplingDecision(mask, probability, gate)
