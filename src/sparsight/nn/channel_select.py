"""Some channels of a map, for a layer that does not need all of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ChannelSelect"]


class ChannelSelect(nn.Module):
    """Passes on some of a map's channels: the sampler before a residual branch's first layer.

    The channels of a residual stream cannot be removed, for every block adds to them, but a branch
    need not read them all. Which ones it reads is a buffer, so that a state_dict records it. The
    selected channels are copied: that costs time where the multiply-adds behind it save some.

    Attributes:
        channels: (K,) int64, the channels to pass on.

    Args:
        channels: their indices, in the order in which they leave.

    Source: He, Zhang, Sun, ICCV 2017, arXiv 1707.06168, section 3.3 ("feature map sampler").
    """

    channels: Tensor

    def __init__(self, channels: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("channels", torch.as_tensor(channels, dtype=torch.int64).clone())

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
        """Return the selected channels of x (B, C, H, W) as (B, K, H, W), in its memory format."""
        if x.is_contiguous(memory_format=torch.channels_last):
            # index_select returns rows of the default format.
            return x.permute(0, 2, 3, 1).index_select(3, self.channels).permute(0, 3, 1, 2)
        return x.index_select(1, self.channels)

    def extra_repr(self) -> str:
        """How many channels are passed on, for repr."""
        return f"{len(self.channels)} channels"
