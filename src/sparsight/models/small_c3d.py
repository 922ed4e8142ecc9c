"""A small network of 3-D convolutions and poolings, for short clips.

Letters in shapes: B batch, C channels, T frames, H W height and width in pixels, K number of
classes.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

_WIDTHS = (16, 32, 64, 64)
# The first pooling keeps all frames: motion is to be seen before it is averaged away.
_WINDOWS = ((1, 2, 2), (2, 2, 2), (2, 2, 2))


class SmallC3D(nn.Module):
    """Class logits of clips. Build it with `small_c3d`.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of a frame.
    """

    def __init__(self, num_classes: int, *, in_channels: int) -> None:
        super().__init__()
        for i, (before, after) in enumerate(pairwise((in_channels, *_WIDTHS)), start=1):
            conv = nn.Conv3d(before, after, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm3d(after))
            self.add_module(f"relu{i}", nn.ReLU(inplace=True))
            if i <= len(_WINDOWS):
                self.add_module(f"pool{i}", nn.MaxPool3d(_WINDOWS[i - 1]))
        self.linear = nn.Linear(_WIDTHS[-1], num_classes)

    def forward(self, clip: Tensor) -> Tensor:
        """Return the logits (B, K).

        Args:
            clip: (B, C, T, H, W), floating point, normalised; T at least 4, H and W at least 8.
        """
        x = clip
        for name, module in self.named_children():
            if name != "linear":
                x = module(x)
        return self.linear(x.mean((2, 3, 4)))


def small_c3d(*, num_classes: int, in_channels: int = 1) -> SmallC3D:
    """Return a network for short clips with random weights.

    Four 3x3x3 convolutions of 16, 32, 64 and 64 channels, each with norm and ReLU, a max pooling
    after each of the first three (1x2x2, then twice 2x2x2), and the mean over what is left.

    Args:
        num_classes: number of classes K, at least 1.
        in_channels: channels C of a frame, at least 1; 1 is grey.

    Returns:
        A module that maps (B, C, T, H, W) to logits (B, K).

    Raises:
        ValueError: no class or no channel.

    Cost: 49.5 million multiply-adds for a grey clip of 8 frames of 32x32.

    Example:
        >>> import torch
        >>> small_c3d(num_classes=8).eval()(torch.zeros(1, 1, 8, 32, 32)).shape
        torch.Size([1, 8])

    Source: Tran, Bourdev, Fergus, Torresani, Paluri, "Learning Spatiotemporal Features with 3D
    Convolutional Networks", ICCV 2015, arXiv 1412.0767, section 3: kernels of 3x3x3, poolings of
    2x2x2 but for the first. Theirs is deeper and wider, without norms, and has three linear layers.
    """
    if num_classes < 1 or in_channels < 1:
        raise ValueError(
            f"small_c3d: num_classes={num_classes} and in_channels={in_channels}; at least 1 of "
            "each is required; a grey clip has one channel."
        )
    return SmallC3D(num_classes, in_channels=in_channels)
