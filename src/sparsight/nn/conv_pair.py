"""Two convolutions with a ReLU between them: the unit that dense-prediction networks repeat."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ConvPair"]


class ConvPair(nn.Module):
    """Two 3x3 convolutions, with or without norms, shortcut and the ReLUs before and after.

    With x' the input, or its ReLU where `is_preactivated`::

        branch = bn2(conv2(relu(bn1(conv1(x')))))
        out    = branch + shortcut(x)           # has_shortcut
        out    = relu(out)                      # is_activated

    A basic residual block of torchvision is `is_activated` with a shortcut; the residual unit of
    FRRN has a shortcut and nothing after the sum; that of RefineNet is preactivated and has no
    norms; the two convolutions of FRRN's two-stream unit have no shortcut. `sparsight.sparsify`
    samples all of them as it does a basic block.

    Attributes:
        conv1, bn1, relu, conv2, bn2: in the order in which they run; norms are `nn.Identity` where
            there are none, so that the state has no keys of them.
        downsample: the shortcut: None where it is the input itself, or absent; else a 1x1
            convolution without bias or norm.
        stride: 1.

    Args:
        in_channels: channels C.
        out_channels: channels O of both convolutions. Where it is not `in_channels`, the shortcut
            is a 1x1 convolution.
        norm: called as ``norm(out_channels)`` for each norm; None for no norms. Default
            `nn.BatchNorm2d`.
        biases: whether conv1 and conv2 have biases. Default neither, as with norms.
        has_shortcut: see above.
        is_preactivated: see above.
        is_activated: see above.

    Example:
        >>> import torch
        >>> ConvPair(4, 6)(torch.zeros(1, 4, 5, 7)).shape
        torch.Size([1, 6, 5, 7])

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385 (the block); Pohlen et al., CVPR 2017,
    arXiv 1611.08323 and Lin et al., CVPR 2017, arXiv 1611.06612 (the variants).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        biases: tuple[bool, bool] = (False, False),
        has_shortcut: bool = True,
        is_preactivated: bool = False,
        is_activated: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=biases[0])
        self.bn1 = nn.Identity() if norm is None else norm(out_channels)
        self.relu = nn.ReLU()  # not in place: the shortcut reads the input too
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=biases[1])
        self.bn2 = nn.Identity() if norm is None else norm(out_channels)
        self.downsample: nn.Module | None = None
        if has_shortcut and in_channels != out_channels:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.stride = 1
        self.has_shortcut = has_shortcut
        self.is_preactivated = is_preactivated
        self.is_activated = is_activated

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O H W"]:
        """Compute the unit.

        Args:
            x: (B, C, H, W) float, any memory format.

        Returns:
            (B, O, H, W).
        """
        features = self.relu(x) if self.is_preactivated else x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(features)))))
        if self.has_shortcut:
            out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out) if self.is_activated else out

    def extra_repr(self) -> str:
        """The variant, for repr."""
        return (
            f"has_shortcut={self.has_shortcut}, is_preactivated={self.is_preactivated}, "
            f"is_activated={self.is_activated}"
        )
