"""A dense residual block whose second convolution is deformable and guided by the block's input."""

from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from sparsight.nn.deform_conv import DeformableConv2d

__all__ = ["DeformableBlock", "make_stage_deformable"]


class DeformableBlock(nn.Module):
    """A basic or bottleneck residual block whose conv2 moves its taps as the block's input says.

    The dense form of the published detector's blocks: offsets made of the block's input are there
    before anything is sampled. `sparsify` takes it like the block it was made from.

    Attributes:
        conv2: a :class:`DeformableConv2d`. The other children (conv1, bn1, bn2, conv3, bn3, relu,
            downsample) and `stride` are the source's, under its names, so that the state of the
            source loads but for "conv2.offset.*".

    Args:
        block: residual block with the children and the forward of torchvision's `BasicBlock` or
            `Bottleneck`. Its children move here, they are not copied.
        offset_groups: channel groups of conv2's input that move on their own. Default 1, as
            published.
        is_modulated: deformable convolution v2. Default False, as published.

    Raises:
        ValueError: conv1 has a stride, so that conv2's offsets would have another size than its
            output; or conv2 pads with anything but zeros, or by a word.

    Source: Dai et al., ICCV 2017 (arXiv 1703.06211); in sampled blocks Xie et al., ECCV 2020
    (arXiv 2003.08866). The published detector has them in its last three stages.
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    bn2: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module
    relu: nn.Module
    downsample: nn.Module | None

    def __init__(
        self, block: nn.Module, *, offset_groups: int = 1, is_modulated: bool = False
    ) -> None:
        super().__init__()
        num_convs = 3 if hasattr(block, "conv3") else 2
        for i in range(1, num_convs + 1):
            setattr(self, f"conv{i}", getattr(block, f"conv{i}"))
            setattr(self, f"bn{i}", getattr(block, f"bn{i}"))
        self.relu = cast(nn.Module, block.relu)
        self.downsample = cast("nn.Module | None", block.downsample)
        self.stride = block.stride
        if tuple(self.conv1.stride) != (1, 1):
            raise ValueError(
                f"DeformableBlock: conv1 has stride {tuple(self.conv1.stride)}, but the block's "
                "input and conv2's must have one size; keep the block, and replace its conv2 by "
                "DeformableConv2d.from_conv without guide_channels."
            )
        self.conv2 = DeformableConv2d.from_conv(
            cast(nn.Conv2d, block.conv2),
            guide_channels=self.conv1.in_channels,
            offset_groups=offset_groups,
            is_modulated=is_modulated,
        )
        self.training = block.training

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O Ho Wo"]:
        """Compute the block.

        Args:
            x: (B, C, H, W) float, any memory format.

        Returns:
            (B, O, Ho, Wo), as the source block.
        """
        features = self.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(features, x))
        if hasattr(self, "conv3"):
            branch = self.bn3(self.conv3(self.relu(branch)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(branch + shortcut)


def make_stage_deformable(stage: nn.Sequential) -> None:
    """Make the 3x3 convolutions of a stage's residual blocks deformable, as published, in place.

    Args:
        stage: of basic or bottleneck blocks, as `DeformableBlock` takes them; each is replaced by
            one, which has its children. A block with a stride in conv1 (a basic block that halves
            the resolution; the published code has none) stays, and its conv2 moves as its own
            input says: the block's input is larger than what conv2 reads.

    Raises:
        ValueError: conv2 pads with anything but zeros, or by a word.
    """
    for i, block in enumerate(stage):
        if tuple(cast(Any, block).conv1.stride) == (1, 1):
            stage[i] = DeformableBlock(block)
        else:
            block.conv2 = DeformableConv2d.from_conv(cast(nn.Conv2d, block.conv2))
