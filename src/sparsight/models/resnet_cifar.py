"""The small ResNets of the CIFAR-10 experiments, with parameter-free shortcuts.

Letters in shapes: B batch, C channels, H W height and width in pixels, K number of classes.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from sparsight.models.state_dict import read_state_dict

_WIDTHS = (16, 32, 64)


class PaddedShortcut(nn.Module):
    """A shortcut without parameters: every second pixel, and zeros for the new channels.

    Args:
        in_channels: channels C that arrive.
        out_channels: channels that leave, at least C; the zeros are put half before the others,
            half behind.
        stride: 1 or more.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
    1512.03385, section 3.3, option A. Zeros on both sides follow the published weights' code.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, ceil(H / stride), ceil(W / stride)) of x (B, C, H, W)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))

    def extra_repr(self) -> str:
        """The settings, for repr."""
        return f"padding={self.padding}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with the children and forward of torchvision's.

    Args:
        in_channels: channels C of the input.
        out_channels: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = PaddedShortcut(in_channels, out_channels, stride=stride)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, ceil(H / stride), ceil(W / stride)) of x (B, C, H, W)."""
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(branch + shortcut)


class ResNetCifar(nn.Module):
    """Class logits of small images. Build it with `resnet_cifar`.

    Args:
        num_blocks: residual blocks in each of the three stages.
        num_classes: number of classes K.
    """

    def __init__(self, num_blocks: int, *, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        channels = _WIDTHS[0]
        for i, width in enumerate(_WIDTHS):
            first = BasicBlock(channels, width, stride=1 if i == 0 else 2)
            rest = [BasicBlock(width, width) for _ in range(num_blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
            channels = width
        self.linear = nn.Linear(channels, num_classes)
        self.depth = 6 * num_blocks + 2
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits (B, K).

        Args:
            image: (B, 3, H, W), floating point, normalised; 32x32 in the source, any size from 1.
        """
        x = self.relu(self.bn1(self.conv1(image)))
        for i in range(len(_WIDTHS)):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.linear(x.mean((2, 3)))


def resnet_cifar(depth: int, *, num_classes: int = 10) -> ResNetCifar:
    """Return a ResNet for 32x32 images with random weights.

    Three stages of 16, 32 and 64 channels at 32x32, 16x16 and 8x8; shortcuts without parameters.
    Ready for :func:`sparsight.sparsify`, which samples every block.

    Args:
        depth: weighted layers, 6n + 2 for n blocks a stage: 20, 32, 44, 56, 110 in the source.
        num_classes: number of classes K, at least 1.

    Returns:
        A module that maps (B, 3, H, W) to logits (B, K).

    Raises:
        ValueError: another depth, or no class.

    Cost: 40.6, 68.9, 97.2 and 125.5 million multiply-adds for a 32x32 image at depth 20 to 56.

    Example:
        >>> import torch
        >>> resnet_cifar(20).eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
    1512.03385, section 4.2. Names of parameters are those of akamaster/pytorch_resnet_cifar10
    (BSD-2-Clause), whose weights `load_resnet_cifar` reads.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"resnet_cifar: depth={depth}; 6n + 2 with n >= 1 blocks a stage is required; pass 20, "
            "32, 44, 56 or 110."
        )
    if num_classes < 1:
        raise ValueError(
            f"resnet_cifar: num_classes={num_classes}; at least one class is required; CIFAR-10 "
            "has 10."
        )
    return ResNetCifar((depth - 2) // 6, num_classes=num_classes)


def load_resnet_cifar(path: str | Path) -> ResNetCifar:
    """Return the trained CIFAR ResNet whose weights a file holds; depth and classes are read off.

    Args:
        path: a state_dict as `read_state_dict` takes it; the published form of
            akamaster/pytorch_resnet_cifar10 has it under "state_dict", with "module." before the
            names. Only tensors are read, no code is unpickled.

    Returns:
        The model in eval mode on the CPU, float32. Its images are normalised with mean (0.485,
        0.456, 0.406) and standard deviation (0.229, 0.224, 0.225).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no state_dict of such a network; says what is missing, too much or
            of another shape.
    """
    advice = (
        "weights of a CIFAR ResNet (3 stages, no shortcut parameters, last layer `linear`) are "
        "required, as published with akamaster/pytorch_resnet_cifar10"
    )
    state = read_state_dict(path, name="load_resnet_cifar", advice=advice)
    blocks = {match[1] for name in state if (match := re.match(r"layer1\.(\d+)\.", name))}
    head = state.get("linear.weight")
    if not blocks or head is None or head.ndim != 2:
        raise ValueError(
            f"load_resnet_cifar: {str(path)!r} has {len(state)} tensors but no layer1.* or no "
            f"linear.weight of two dimensions among them; {advice}."
        )
    model = resnet_cifar(6 * len(blocks) + 2, num_classes=head.shape[0])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"load_resnet_cifar: the tensors of {str(path)!r} are not those of a ResNet-"
            f"{model.depth} ({error}); {advice}."
        ) from error
    return model.eval()
