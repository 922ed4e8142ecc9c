"""Torchvision's own classification ResNets, without weights."""

from __future__ import annotations

from typing import Literal

from torch import nn


def torchvision_resnet(
    name: Literal["resnet18", "resnet34", "resnet50"], *, num_classes: int = 1000
) -> nn.Module:
    """Return one of torchvision's ResNets with random weights.

    Args:
        name: torchvision's name of it.
        num_classes: number of classes K.

    Returns:
        A module that maps (B, 3, H, W) to logits (B, K). Torchvision's ImageNet weights load into
        it: ``model.load_state_dict(read_state_dict("resnet34-b627a593.pth"))``.

    Raises:
        ValueError: another name.

    Example:
        >>> import torch
        >>> torchvision_resnet("resnet18", num_classes=2).eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 2])

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
    1512.03385; strides at the 3x3 convolutions, as torchvision has them.
    """
    from torchvision.models import resnet as zoo  # heavy: only for those who ask for its models

    if name not in ("resnet18", "resnet34", "resnet50"):
        raise ValueError(
            f"torchvision_resnet: name={name!r}; one of resnet18, resnet34, resnet50 is required; "
            "build any other model yourself and pass it to sparsight.sparsify."
        )
    return getattr(zoo, name)(weights=None, num_classes=num_classes)
