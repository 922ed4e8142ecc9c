"""Torchvision's own segmentation models, without weights and without auxiliary heads."""

from __future__ import annotations

from typing import Literal

from torch import nn


def torchvision_segmentation(
    name: Literal["fcn_resnet50", "deeplabv3_resnet50"], *, num_classes: int
) -> nn.Module:
    """Return one of torchvision's segmentation models with random weights.

    Args:
        name: torchvision's name of it.
        num_classes: number of classes K, without the ignored one.

    Returns:
        A module that maps (B, 3, H, W) to `{"out": (B, K, H, W)}`; stages 3 and 4 of its ResNet are
        dilated by 2 and 4.

    Raises:
        ValueError: another name.

    Example:
        >>> import torch
        >>> model = torchvision_segmentation("fcn_resnet50", num_classes=2).eval()
        >>> model(torch.zeros(1, 3, 32, 32))["out"].shape
        torch.Size([1, 2, 32, 32])
    """
    from torchvision.models import segmentation  # heavy: only for those who ask for its models

    build = {
        "fcn_resnet50": segmentation.fcn_resnet50,
        "deeplabv3_resnet50": segmentation.deeplabv3_resnet50,
    }
    if name not in build:
        raise ValueError(
            f"torchvision_segmentation: name={name!r}; one of {', '.join(build)} is required; "
            "build any other model yourself and pass it to sparsight.sparsify."
        )
    return build[name](weights=None, weights_backbone=None, num_classes=num_classes)
