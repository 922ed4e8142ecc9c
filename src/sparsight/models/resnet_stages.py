"""The stage outputs of a backbone, as the dense-prediction models take them.

Letters in shapes: B batch, C channels, H W height and width in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3", "layer4")
_NAMES = ("conv1", "bn1", "relu", "maxpool", *STAGES)


class ResNetStages(nn.Module):
    """The four stage outputs of a ResNet, without its pooling and classifier.

    Children keep the names they have in torchvision, so a classification state_dict loads with
    `strict=False` (only `fc.*` is left over) and `sparsight.sparsify` finds the residual blocks.

    Args:
        resnet: module with torchvision's attributes `conv1`, `bn1`, `relu`, `maxpool`, `layer1` to
            `layer4`. They are used as they are, not copied.
        caller: name of the function that was given it, for messages.

    Raises:
        ValueError: if one of those attributes is missing.
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    left_out = ("fc.",)  # of torchvision's keys

    def __init__(self, resnet: nn.Module, *, caller: str = "ResNetStages") -> None:
        super().__init__()
        missing = [name for name in _NAMES if not _has_child(resnet, name)]
        if missing:
            raise ValueError(
                f"{caller}: backbone {type(resnet).__name__} has no {', '.join(missing)}; a "
                f"ResNet with torchvision's attribute names ({', '.join(_NAMES)}) is required; "
                "rename the attributes or wrap the backbone in a module that has them."
            )
        for name in _NAMES:
            self.add_module(name, getattr(resnet, name))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the outputs of layer1 to layer4, finest first.

        Args:
            image: (B, 3, H, W), floating point.

        Returns:
            Four maps (B, C_i, H_i, W_i).
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        maps = []
        for name in STAGES:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps


def is_resnet(module: nn.Module) -> bool:
    """Whether a module has a ResNet's parts under torchvision's names."""
    return all(_has_child(module, name) for name in _NAMES)


def _has_child(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def probe_stages(stages: nn.Module) -> tuple[list[int], list[int]]:
    """Return channels and strides of the maps, from one pass of a small image without a trace.

    Args:
        stages: maps (B, 3, H, W) to a list of maps; its mode is as before afterwards.
    """
    was_training = {module: module.training for module in stages.modules()}
    weight: Any = next(stages.parameters())  # of the first convolution
    stages.eval()  # so that the running statistics stay as they are
    size = 64
    try:
        with torch.no_grad():
            maps = stages(torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device))
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return [x.shape[1] for x in maps], [size // x.shape[-1] for x in maps]
