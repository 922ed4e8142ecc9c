"""Semantic FPN: a feature pyramid merged at stride 4 and classified per pixel.

Letters in shapes: B batch, C channels, H W height and width in pixels, K number of classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from sparsight.models.resnet_stages import ResNetStages, probe_stages
from sparsight.nn.deform_block import make_stage_deformable
from sparsight.nn.merge_maps import MergeMaps

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnext50_32x4d"]


class _ConvNormReLU(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.GroupNorm(min(32, out_channels // 4), out_channels),
            nn.ReLU(inplace=True),
        )


class SemanticFPN(nn.Module):
    """Per-pixel class logits from a feature pyramid. Build it with `semantic_fpn`.

    Args:
        backbone: maps (B, 3, H, W) to a list of feature maps, finest first.
        channels: channels of each of those maps.
        strides: output stride of each of those maps, in pixels; non-decreasing.
        num_classes: number of classes K, at least 1.
        fpn_channels: width of the pyramid; 256 in the source.
        head_channels: width of the segmentation branch; 128 in the source.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        channels: list[int],
        strides: list[int],
        num_classes: int,
        fpn_channels: int = 256,
        head_channels: int = 128,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.laterals = nn.ModuleList(nn.Conv2d(c, fpn_channels, 1) for c in channels)
        self.outputs = nn.ModuleList(
            nn.Conv2d(fpn_channels, fpn_channels, 3, padding=1) for _ in channels
        )
        self.branches = nn.ModuleList()
        for stride in strides:
            # One convolution per doubling of the resolution; the finest level gets one without
            # upsampling.
            num_doublings = (stride // strides[0]).bit_length() - 1
            widths = [fpn_channels] + [head_channels] * max(1, num_doublings)
            self.branches.append(nn.ModuleList(_ConvNormReLU(a, b) for a, b in pairwise(widths)))
        self.add = MergeMaps("sum", resizing="nearest")
        self.resize = MergeMaps("sum")
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)
        self.num_classes = num_classes

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return `{"out": logits}`, the contract of torchvision's segmentation models.

        Args:
            image: (B, 3, H, W), floating point, normalised; any H and W from 1.

        Returns:
            Logits (B, K, H, W), same dtype as the model computes in, before softmax.
        """
        maps = self.backbone(image)
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(laterals) - 2, -1, -1):
            laterals[i] = self.add(laterals[i], laterals[i + 1])
        finest = (laterals[0].shape[-2], laterals[0].shape[-1])
        branches: list[Tensor] = []
        for output, branch, lateral in zip(self.outputs, self.branches, laterals, strict=True):
            x = output(lateral)
            layers = list(branch.children())
            for step, layer in enumerate(layers):
                x = layer(x)
                if x.shape[-2:] == finest:
                    continue
                # After the last step the sum lands on the finest map, whatever odd sizes lie
                # between.
                if step < len(layers) - 1:
                    size = (min(2 * x.shape[-2], finest[0]), min(2 * x.shape[-1], finest[1]))
                    x = self.resize(x, size=size)
            branches.append(x)
        logits = self.classifier(self.resize(*branches))
        return {"out": self.resize(logits, size=(image.shape[-2], image.shape[-1]))}


def semantic_fpn(
    backbone: nn.Module | BackboneName = "resnet50",
    *,
    num_classes: int,
    is_dilated: bool = False,
    is_deformable: bool = False,
    fpn_channels: int = 256,
    head_channels: int = 128,
) -> SemanticFPN:
    """Return a semantic FPN with random weights, or with those of the backbone that was passed in.

    Args:
        backbone: "resnet18", "resnet34", "resnet50" or "resnext50_32x4d" (torchvision's, random
            weights), or a ResNet with torchvision's attribute names, whose modules are used as they
            are (not copied).
        num_classes: number of classes K, at least 1.
        is_dilated: stages 3 and 4 keep stride 8 and use dilation 2 and 4, as in the sampling
            paper's segmentation runs. Bottleneck ResNets only (torchvision's basic block has no
            dilation); applies to a backbone asked for by name.
        is_deformable: the 3x3 convolutions of stages 2 to 4 are deformable, with offsets made of
            the block's input, as in the source's detector; they start where plain ones are. Of a
            bottleneck backbone without groups asked for by name.
        fpn_channels: width of the pyramid, 256 in the source. Small backbones are better served by
            64.
        head_channels: width of the segmentation branch, 128 in the source; a multiple of 4.

    Returns:
        A module that maps (B, 3, H, W) to `{"out": (B, K, H, W)}`.

    Raises:
        ValueError: unknown backbone, a class count below 1, or dilation or deformation asked of a
            backbone that cannot have it.

    Example:
        >>> import torch
        >>> model = semantic_fpn("resnet18", num_classes=11, fpn_channels=64, head_channels=64)
        >>> model.eval()(torch.zeros(1, 3, 64, 96))["out"].shape
        torch.Size([1, 11, 64, 96])

    Source: Kirillov, Girshick, He, Dollar, "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv
    1901.02446, section 3.1. We depart in one thing: map sizes follow the input, so any size is
    accepted, not only multiples of 32.
    """
    if num_classes < 1:
        raise ValueError(
            f"semantic_fpn: num_classes={num_classes}; at least one class is required; pass the "
            "number of classes without the ignored one."
        )
    if isinstance(backbone, str):
        resnet = _named_resnet(backbone, is_dilated=is_dilated, is_deformable=is_deformable)
    elif is_dilated or is_deformable:
        raise ValueError(
            "semantic_fpn: is_dilated or is_deformable came with a backbone module, but they "
            "change a backbone asked for by name only; change the module, or pass its name."
        )
    else:
        resnet = backbone
    stages = ResNetStages(resnet, caller="semantic_fpn")
    channels, strides = probe_stages(stages)
    return SemanticFPN(
        stages,
        channels=channels,
        strides=strides,
        num_classes=num_classes,
        fpn_channels=fpn_channels,
        head_channels=head_channels,
    )


def _named_resnet(name: str, *, is_dilated: bool, is_deformable: bool) -> nn.Module:
    if name not in get_args(BackboneName):
        known = ", ".join(map(repr, get_args(BackboneName)))
        raise ValueError(
            f"semantic_fpn: backbone={name!r}; one of {known} or a module is required; build any "
            "other backbone yourself and pass it."
        )
    if is_dilated and name in ("resnet18", "resnet34"):
        raise ValueError(
            f"semantic_fpn: is_dilated=True with backbone={name!r}; torchvision's basic block has "
            "no dilation; use 'resnet50' or is_dilated=False."
        )
    if is_deformable and name != "resnet50":
        raise ValueError(
            f"semantic_fpn: is_deformable=True with backbone={name!r}; a bottleneck without groups "
            "is required, whose stride is at its 3x3 convolution; use 'resnet50' or "
            "is_deformable=False."
        )
    from torchvision.models import (
        resnet as zoo,
    )  # heavy: only for those who ask for a backbone by name

    keywords = {"replace_stride_with_dilation": [False, True, True]} if is_dilated else {}
    resnet = getattr(zoo, name)(weights=None, **keywords)
    if is_deformable:
        for stage in (resnet.layer2, resnet.layer3, resnet.layer4):
            make_stage_deformable(stage)
    return resnet
