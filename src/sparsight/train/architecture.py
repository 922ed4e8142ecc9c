"""What a trained model is, in plain values: enough to build it before loading its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import nn

from sparsight.models import (
    resnet_cifar,
    semantic_fpn,
    torchvision_resnet,
    torchvision_segmentation,
)
from sparsight.train.sampling import Sampling, apply_sampling

ModelName = Literal["semantic_fpn", "fcn_resnet50", "deeplabv3_resnet50", "resnet", "resnet_cifar"]
Backbone = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model for segmentation or classification.

    Attributes:
        model: "semantic_fpn", or torchvision's "fcn_resnet50" or "deeplabv3_resnet50"; for
            classes of whole images "resnet", torchvision's, or "resnet_cifar".
        num_classes: classes without the ignored one.
        backbone: ResNet of the semantic FPN, or which ResNet classifies: "resnet20" to "resnet110"
            are those for CIFAR. None for torchvision's segmentation models.
        is_dilated: semantic FPN with dilation 2 and 4 in the last stages (bottlenecks only).
        is_deformable: semantic FPN with deformable 3x3 convolutions in stages 2 to 4 (resnet50
            only).
        fpn_channels: width of the pyramid; None for torchvision's models.
        head_channels: width of the segmentation branch; None for torchvision's models.
        size: (height, width) in pixels that the images were resized to.
        sampling: None for a dense model.
    """

    model: ModelName = "semantic_fpn"
    num_classes: int = 11
    backbone: Backbone | None = "resnet18"
    is_dilated: bool = False
    is_deformable: bool = False
    fpn_channels: int | None = 48
    head_channels: int | None = 48
    size: tuple[int, int] = (240, 320)
    sampling: Sampling | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Architecture:
        """Return what `to_json` described; ValueError for unknown or missing fields.

        What was added later than the first release of the format may be missing: it has its
        default.
        """
        known = {field.name for field in fields(Architecture)}
        if not known - {"is_deformable"} <= set(values) <= known:
            raise ValueError(
                f"Architecture.from_json: fields {sorted(values)} arrived; {sorted(known)} are "
                "required; the checkpoint was written by another version of sparsight: evaluate "
                "it with that version."
            )
        sampling = values["sampling"]
        return Architecture(
            **{
                **values,
                "size": tuple(values["size"]),
                "sampling": None if sampling is None else Sampling(**sampling),
            }
        )

    def differences(self, other: Architecture) -> list[str]:
        """Return what keeps weights of `other` from fitting; the image size does not."""
        found = [
            f"{field.name} is {getattr(other, field.name)!r}, not {getattr(self, field.name)!r}"
            for field in fields(Architecture)
            if field.name not in ("size", "sampling")
            and getattr(self, field.name) != getattr(other, field.name)
        ]
        if other.sampling is not None and self.sampling is None:
            found.append("it is sampled, not dense")
        elif other.sampling is not None and self.sampling is not None:
            found += [
                f"{name} is {getattr(other.sampling, name)!r}, not {getattr(self.sampling, name)!r}"
                for name in ("layout", "sampler", "interpolation")
                if getattr(other.sampling, name) != getattr(self.sampling, name)
            ]
        return found


def build_dense(architecture: Architecture) -> nn.Module:
    """Return the dense model of `architecture`, with random weights.

    Returns:
        A module (B, 3, H, W) -> {"out": (B, num_classes, H, W)}; one that classifies whole images
        -> (B, num_classes).
    """
    if architecture.model == "resnet_cifar":
        depth = int((architecture.backbone or "").removeprefix("resnet"))
        return resnet_cifar(depth, num_classes=architecture.num_classes)
    if architecture.model == "resnet":
        assert architecture.backbone in ("resnet18", "resnet34", "resnet50")
        return torchvision_resnet(architecture.backbone, num_classes=architecture.num_classes)
    if architecture.model == "semantic_fpn":
        backbone = architecture.backbone
        assert backbone in ("resnet18", "resnet34", "resnet50", "resnext50_32x4d")
        return semantic_fpn(
            backbone,
            num_classes=architecture.num_classes,
            is_dilated=architecture.is_dilated,
            is_deformable=architecture.is_deformable,
            fpn_channels=architecture.fpn_channels or 256,
            head_channels=architecture.head_channels or 128,
        )
    return torchvision_segmentation(architecture.model, num_classes=architecture.num_classes)


def convert(dense: nn.Module, architecture: Architecture) -> nn.Module:
    """Return `dense` itself, or a sparsified copy of it if the architecture is sampled.

    Args:
        dense: what `build_dense` returned, with or without trained weights.
        architecture: its `sampling` says how to convert.
    """
    return apply_sampling(dense, architecture.sampling)
