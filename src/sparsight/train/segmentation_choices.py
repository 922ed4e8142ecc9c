"""What the flags of a segmentation recipe stand for: its model, its loss, its augmentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor

from sparsight.train.architecture import Architecture, SegmentationModel
from sparsight.train.bootstrapping import bootstrapped_cross_entropy
from sparsight.train.data import Transform, frrn_transform, training_transform
from sparsight.train.pooling import PoolingKind

Loss = Literal["cross_entropy", "bootstrapped"]
Augmentation = Literal["default", "frrn", "refinenet"]
# (logits, class maps) -> scalar.
PixelLoss = Callable[[Tensor, Tensor], Tensor]

_REFINENET_SCALE = (0.7, 1.3)
_MAX_OFFSET = {"frrn_b": 40}  # pixels; 30 for FRRN-A and what follows it


def segmentation_architecture(
    *,
    model: SegmentationModel,
    num_classes: int,
    size: tuple[int, int],
    backbone: str,
    is_dilated: bool = False,
    is_deformable: bool = False,
    fpn_channels: int,
    head_channels: int,
    channels: int | None = None,
    pooling: PoolingKind = "own",
    pools_strides: bool = False,
) -> Architecture:
    """Return the dense architecture of a recipe's flags: of each only what its model has.

    Args:
        model: which.
        num_classes: without the ignored one.
        size: height and width of the input in pixels.
        backbone: of the semantic FPN and of both RefineNets.
        is_dilated: of the semantic FPN.
        is_deformable: of the semantic FPN.
        fpn_channels: of the semantic FPN.
        head_channels: of the semantic FPN.
        channels: width of FRRN's stem or of RefineNet's decoder; None for the published one.
        pooling: kind of the poolings, see `apply_pooling`.
        pools_strides: whether convolutions that step are followed by such a pooling instead.

    Raises:
        ValueError: `channels` of a model that has no such width.
    """
    is_fpn = model == "semantic_fpn"
    is_refinenet = model in ("refinenet", "light_weight_refinenet")
    has_width = is_refinenet or model in ("frrn_a", "frrn_b")
    if channels is not None and not has_width:
        raise ValueError(
            f"segmentation_architecture: channels={channels} with model={model!r}; only FRRN and "
            "RefineNet have this width; leave --channels out, or pass --fpn-channels for the "
            "semantic FPN."
        )
    return Architecture(
        model=model,
        num_classes=num_classes,
        backbone=backbone if is_fpn or is_refinenet else None,
        is_dilated=is_dilated and not has_width,
        is_deformable=is_deformable and not has_width,
        fpn_channels=fpn_channels if is_fpn else None,
        head_channels=head_channels if is_fpn else None,
        channels=channels,
        size=size,
        pooling=pooling,
        pools_strides=pools_strides,
    )


def pixel_loss(kind: Loss, *, ignore_index: int) -> PixelLoss | None:
    """Return a loss for `SegmentationTask`; None for its own, the cross-entropy."""
    if kind == "bootstrapped":
        return partial(bootstrapped_cross_entropy, ignore_index=ignore_index)
    return None


def segmentation_transform(
    kind: Augmentation,
    size: tuple[int, int],
    *,
    model: SegmentationModel,
    ignore_index: int,
    crop: tuple[int, int] | None = None,
) -> Transform:
    """Return the random transform of a training pair.

    Args:
        kind: "default" scales by .75 to 1.75, crops and flips; "refinenet" the same from .7 to
            1.3, as published for RefineNet (in steps of .1, with a bound on the shorter side, which
            we leave out); "frrn" translates and changes the gamma, as published for FRRN.
        size: (height, width) in pixels that the image is fitted into.
        model: that is trained; FRRN-B is translated by up to 40 pixels, all others by up to 30.
        ignore_index: class of the pixels that are added.
        crop: (height, width) of what is cut out; None: `size`.
    """
    if kind == "frrn":
        return frrn_transform(
            size,
            ignore_index=ignore_index,
            max_offset=_MAX_OFFSET.get(model, 30),
            crop=None if crop == size else crop,
        )
    scale = {"scale": _REFINENET_SCALE} if kind == "refinenet" else {}
    return training_transform(size, ignore_index=ignore_index, crop=crop, **scale)
