"""What a trained model is, in plain values: enough to build it before loading its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from sparsight.compress import narrow, shapes_of
from sparsight.compress.load_pruned import insert_select
from sparsight.models import (
    faster_rcnn,
    frrn_a,
    frrn_b,
    instance_fcn,
    light_weight_refinenet,
    refinenet,
    resnet_cifar,
    semantic_fpn,
    small_c3d,
    torchvision_resnet,
    torchvision_segmentation,
)
from sparsight.models.instance_fcn import SCALES
from sparsight.models.stride8_trunks import TrunkName
from sparsight.nn import ChannelSelect
from sparsight.train.pooling import PoolingKind, apply_pooling
from sparsight.train.sampling import Sampling, apply_sampling

SegmentationModel = Literal[
    "semantic_fpn",
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "frrn_a",
    "frrn_b",
    "refinenet",
    "light_weight_refinenet",
]
ModelName = SegmentationModel | Literal["resnet", "resnet_cifar", "small_c3d"]
Task = Literal["segmentation", "classification", "detection", "proposals", "video"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model for segmentation, or for classes of whole images or clips.

    Attributes:
        model: "semantic_fpn", "frrn_a", "frrn_b", "refinenet", "light_weight_refinenet", or
            torchvision's "fcn_resnet50" or "deeplabv3_resnet50"; for classes of whole images
            "resnet", torchvision's, or "resnet_cifar"; for those of grey clips "small_c3d".
        num_classes: classes without the ignored one.
        backbone: of the semantic FPN and of RefineNet, as they take it, or which ResNet
            classifies: "resnet20" to "resnet110" are those for CIFAR. None for the other
            segmentation models and for clips.
        is_dilated: semantic FPN with dilation 2 and 4 in the last stages (bottlenecks only).
        is_deformable: semantic FPN with deformable 3x3 convolutions in stages 2 to 4 (resnet50
            only).
        fpn_channels: width of the pyramid; None for other models.
        head_channels: width of the segmentation branch; None for other models.
        channels: width of FRRN's stem, or of RefineNet's decoder; None for the published one, and
            for other models.
        size: (height, width) in pixels that the images were resized to.
        pooling: kind of the poolings, but for the global one; "own" are those that the model was
            written with. See `apply_pooling`.
        pools_strides: convolutions that step are followed by such a pooling instead.
        sampling: None for a dense model.
        widths: of a pruned model, the shapes of the tensors that are smaller than those of the full
            model, by name in its dense state_dict; None for full width.
        selected: of a pruned model, how many input channels those layers read that have a
            `sparsight.nn.ChannelSelect` before them, by the layers' names in the full model; which
            ones they are is part of the weights. None for no such layer.
    """

    model: ModelName = "semantic_fpn"
    num_classes: int = 11
    backbone: str | None = "resnet18"
    is_dilated: bool = False
    is_deformable: bool = False
    fpn_channels: int | None = 48
    head_channels: int | None = 48
    channels: int | None = None
    size: tuple[int, int] = (240, 320)
    pooling: PoolingKind = "own"
    pools_strides: bool = False
    sampling: Sampling | None = None
    widths: dict[str, list[int]] | None = None
    selected: dict[str, int] | None = None

    @property
    def task(self) -> Task:
        """What the model is for; the ResNets classify."""
        if self.model == "small_c3d":
            return "video"
        return "classification" if self.model in ("resnet", "resnet_cifar") else "segmentation"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Architecture:
        """Return what `to_json` described; ValueError for unknown or missing fields.

        What was added later than the first release of the format may be missing: it has its
        default.
        """
        return Architecture(**_fields_from_json(Architecture, values))

    def differences(self, other: AnyArchitecture) -> list[str]:
        """Return what keeps weights of `other` from fitting; the image size does not."""
        return _differences(self, other, ignored=("size", "sampling", "widths", "selected"))


DetectorBackbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d"
]


@dataclass(frozen=True, kw_only=True)
class DetectorArchitecture:
    """A detector, as `sparsight.models.faster_rcnn` builds it.

    Attributes:
        model: "faster_rcnn".
        num_classes: classes, background included.
        backbone: torchvision's name of the ResNet.
        deformable: stages 2 to 4 are deformable.
        is_norm_frozen: norms are constants.
        trainable_layers: how many of the four stages and the stem learn, from the last.
        fpn_channels: width of the pyramid.
        head_channels: width of the box head.
        size: shorter side that images are resized to, and the bound on the longer side, in pixels.
        first_sampled_layer: 1 samples all residual blocks (layer1 to layer4), as published; 2 those
            of conv3_x to conv5_x (layer2 to layer4); up to 4.
        sampling: None for a dense model.
        widths: of a pruned model, as for `Architecture`.
        selected: of a pruned model, as for `Architecture`.
    """

    model: Literal["faster_rcnn"] = "faster_rcnn"
    num_classes: int = 81
    backbone: DetectorBackbone = "resnet50"
    deformable: bool = False
    is_norm_frozen: bool = False
    trainable_layers: int = 5
    fpn_channels: int = 256
    head_channels: int = 1024
    size: tuple[int, int] = (800, 1333)
    first_sampled_layer: int = 1
    sampling: Sampling | None = None
    widths: dict[str, list[int]] | None = None
    selected: dict[str, int] | None = None

    @property
    def task(self) -> Task:
        """What the model is for."""
        return "detection"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> DetectorArchitecture:
        """Return what `to_json` described; ValueError for unknown or missing fields."""
        return DetectorArchitecture(**_fields_from_json(DetectorArchitecture, values))

    def differences(self, other: AnyArchitecture) -> list[str]:
        """Return what keeps weights of `other` from fitting; size and what learns do not.

        Norms that were trained may be frozen, not the other way round.
        """
        ignored = ["size", "sampling", "widths", "selected", "trainable_layers"]
        if self.is_norm_frozen:
            ignored.append("is_norm_frozen")
        if self.sampling is None or other.sampling is None:
            ignored.append("first_sampled_layer")
        return _differences(self, other, ignored=ignored)

    def is_sampled_block(self, name: str, module: nn.Module) -> bool:
        """Whether `sparsify` is to select a module of this name; its argument `where`.

        Blocks that read a part of the stream only cannot be sampled, and stay dense.
        """
        layers = range(self.first_sampled_layer, 5)
        parts = name.split(".")
        return (
            len(parts) == 4
            and parts[:2] == ["backbone", "body"]
            and parts[2] in {f"layer{i}" for i in layers}
            and not any(isinstance(part, ChannelSelect) for part in module.modules())
        )


@dataclass(frozen=True, kw_only=True)
class ProposalArchitecture:
    """A model that proposes masks, as `sparsight.models.instance_fcn` builds it.

    Attributes:
        model: "instance_fcn".
        backbone: "vgg16", or torchvision's name of a ResNet.
        num_stages: of a ResNet, 2 to 4.
        is_norm_frozen: norms of a ResNet are constants.
        k: bins a side of a window.
        m: cells a side of a window.
        head_channels: width of both branches.
        size: shorter side that images are resized to at scale 1, and the bound on the longer side,
            in pixels.
        scales: factors on the size.
        sampling: None for a dense model.
        widths: of a pruned model, as for `Architecture`.
        selected: of a pruned model, as for `Architecture`.
    """

    model: Literal["instance_fcn"] = "instance_fcn"
    backbone: TrunkName = "vgg16"
    num_stages: int = 4
    is_norm_frozen: bool = False
    k: int = 5
    m: int = 21
    head_channels: int = 512
    size: tuple[int, int] = (600, 1200)
    scales: tuple[float, ...] = SCALES
    sampling: Sampling | None = None
    widths: dict[str, list[int]] | None = None
    selected: dict[str, int] | None = None

    @property
    def task(self) -> Task:
        """What the model is for."""
        return "proposals"

    @property
    def num_classes(self) -> int:
        """Background and object: what an object is makes no difference."""
        return 2

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ProposalArchitecture:
        """Return what `to_json` described; ValueError for unknown or missing fields."""
        known = _fields_from_json(ProposalArchitecture, values)
        return ProposalArchitecture(**{**known, "scales": tuple(values["scales"])})

    def differences(self, other: AnyArchitecture) -> list[str]:
        """Return what keeps weights of `other` from fitting; size and scales do not.

        Norms that were trained may be frozen, not the other way round.
        """
        ignored = ["size", "scales", "sampling", "widths", "selected"]
        if self.is_norm_frozen:
            ignored.append("is_norm_frozen")
        return _differences(self, other, ignored=ignored)


AnyArchitecture = Architecture | DetectorArchitecture | ProposalArchitecture
_KINDS: dict[str, type[AnyArchitecture]] = {
    "faster_rcnn": DetectorArchitecture,
    "instance_fcn": ProposalArchitecture,
}
_ADDED_LATER = {"is_deformable", "channels", "pooling", "pools_strides", "widths", "selected"}
_LEAST_SIDE = 8  # of an input, in pixels: below, resizing and strides of 32 leave nothing to see


def architecture_from_json(values: dict[str, Any]) -> AnyArchitecture:
    """Return the architecture of any kind that its `to_json` described."""
    return _KINDS.get(str(values.get("model")), Architecture).from_json(values)


def _fields_from_json(kind: type[AnyArchitecture], values: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    if not known - _ADDED_LATER <= set(values) <= known:
        raise ValueError(
            f"{kind.__name__}.from_json: fields {sorted(values)} arrived; {sorted(known)} are "
            "required; the checkpoint was written by another version of sparsight: evaluate "
            "it with that version."
        )
    sampling = values["sampling"]
    return {
        **values,
        "size": tuple(values["size"]),
        "sampling": None if sampling is None else Sampling(**sampling),
    }


def _differences(
    own: AnyArchitecture, other: AnyArchitecture, *, ignored: Sequence[str]
) -> list[str]:
    if type(own) is not type(other):
        return [f"model is {other.model!r}, not {own.model!r}"]
    found = [
        f"{field.name} is {getattr(other, field.name)!r}, not {getattr(own, field.name)!r}"
        for field in fields(own)
        if field.name not in ignored and getattr(own, field.name) != getattr(other, field.name)
    ]
    if (own.widths, own.selected) != (other.widths, other.selected):
        # Not the shapes themselves: there is one for every layer.
        is_full = own.widths is None and own.selected is None
        found.append("it is pruned" if is_full else "its layers have other widths")
    if other.sampling is not None and own.sampling is None:
        found.append("it is sampled, not dense")
    elif other.sampling is not None and own.sampling is not None:
        found += [
            f"{name} is {getattr(other.sampling, name)!r}, not {getattr(own.sampling, name)!r}"
            for name in ("layout", "sampler", "interpolation")
            if getattr(other.sampling, name) != getattr(own.sampling, name)
        ]
    return found


def build_dense(architecture: AnyArchitecture) -> nn.Module:
    """Return the dense model of `architecture`, as wide as it says, with random weights.

    Returns:
        A module (B, 3, H, W) -> {"out": (B, num_classes, H, W)}; one that classifies whole images
        -> (B, num_classes), clips (B, 1, T, H, W); torchvision's detector or InstanceFCN, which
        take a list of images.
    """
    model = _with_selects(_build_full(architecture), architecture.selected)
    if architecture.widths is not None:
        narrow(model, architecture.widths)
    return model


def pruned_architecture(architecture: AnyArchitecture, pruned: nn.Module) -> AnyArchitecture:
    """Return `architecture` with the widths of a pruned model recorded, so that it can be rebuilt.

    Args:
        architecture: that the model was built from, pruned before or not.
        pruned: its dense model, with fewer channels.
    """
    selected = {
        name.removesuffix(".select"): len(module.channels)
        for name, module in pruned.named_modules()
        if isinstance(module, ChannelSelect)
    }
    full = shapes_of(_with_selects(_build_full(architecture), selected))
    widths = {name: shape for name, shape in shapes_of(pruned).items() if shape != full.get(name)}
    return replace(architecture, widths=widths or None, selected=selected or None)


def _with_selects(model: nn.Module, selected: Mapping[str, int] | None) -> nn.Module:
    """Put a `ChannelSelect` of the first channels before each of these layers of `model`."""
    for name, count in (selected or {}).items():
        insert_select(model, name, torch.arange(count))
    return model


def _build_full(architecture: AnyArchitecture) -> nn.Module:
    if isinstance(architecture, DetectorArchitecture):
        return faster_rcnn(
            architecture.backbone,
            num_classes=architecture.num_classes,
            deformable=architecture.deformable,
            is_norm_frozen=architecture.is_norm_frozen,
            trainable_layers=architecture.trainable_layers,
            min_size=architecture.size[0],
            max_size=architecture.size[1],
            fpn_channels=architecture.fpn_channels,
            head_channels=architecture.head_channels,
        )
    if isinstance(architecture, ProposalArchitecture):
        return instance_fcn(
            k=architecture.k,
            m=architecture.m,
            backbone=architecture.backbone,
            num_stages=architecture.num_stages,
            is_norm_frozen=architecture.is_norm_frozen,
            head_channels=architecture.head_channels,
            min_size=architecture.size[0],
            max_size=architecture.size[1],
            scales=architecture.scales,
        )
    return apply_pooling(
        _build_with_own_pooling(architecture),
        architecture.pooling,
        pools_strides=architecture.pools_strides,
    )


def _build_with_own_pooling(architecture: Architecture) -> nn.Module:
    if architecture.model == "small_c3d":
        return small_c3d(num_classes=architecture.num_classes)
    if architecture.model == "resnet_cifar":
        depth = int((architecture.backbone or "").removeprefix("resnet"))
        return resnet_cifar(depth, num_classes=architecture.num_classes)
    if architecture.model == "resnet":
        assert architecture.backbone in ("resnet18", "resnet34", "resnet50")
        return torchvision_resnet(architecture.backbone, num_classes=architecture.num_classes)
    if architecture.model == "semantic_fpn":
        return semantic_fpn(
            cast(Any, architecture.backbone),  # it says which ones it takes
            num_classes=architecture.num_classes,
            is_dilated=architecture.is_dilated,
            is_deformable=architecture.is_deformable,
            fpn_channels=architecture.fpn_channels or 256,
            head_channels=architecture.head_channels or 128,
        )
    if architecture.model in ("frrn_a", "frrn_b"):
        build = frrn_a if architecture.model == "frrn_a" else frrn_b
        return build(architecture.num_classes, channels=architecture.channels or 48)
    if architecture.model in ("refinenet", "light_weight_refinenet"):
        build = refinenet if architecture.model == "refinenet" else light_weight_refinenet
        return build(
            architecture.num_classes,
            backbone=cast(Any, architecture.backbone),
            channels=architecture.channels or 256,
        )
    return torchvision_segmentation(architecture.model, num_classes=architecture.num_classes)


def convert(dense: nn.Module, architecture: AnyArchitecture) -> nn.Module:
    """Return `dense` itself, or a sparsified copy of it if the architecture is sampled.

    Args:
        dense: what `build_dense` returned, with or without trained weights.
        architecture: its `sampling` says how to convert.
    """
    if isinstance(architecture, DetectorArchitecture):
        return apply_sampling(dense, architecture.sampling, where=architecture.is_sampled_block)
    return apply_sampling(dense, architecture.sampling)


def at_size(
    model: nn.Module, architecture: AnyArchitecture, size: tuple[int, int] | None
) -> AnyArchitecture:
    """Return `architecture` at another size of its input; models that resize are told.

    Args:
        model: of that architecture; a detector and InstanceFCN are changed in place.
        architecture: as it was trained.
        size: height and width in pixels; for models that resize the shorter side, and the bound on
            the longer. None: as it was trained.

    Raises:
        ValueError: a side of less than 8 pixels.
    """
    if size is None:
        return architecture
    if min(size) < _LEAST_SIDE:
        raise ValueError(
            f"at_size: size={size[0]}x{size[1]}; at least {_LEAST_SIDE} pixels a side are "
            "required; pass --size HEIGHTxWIDTH, or leave it out for the size of training."
        )
    if isinstance(architecture, DetectorArchitecture):
        detector: Any = model
        detector.transform.min_size, detector.transform.max_size = (size[0],), size[1]
    if isinstance(architecture, ProposalArchitecture):
        proposer: Any = model
        proposer.min_size, proposer.max_size = size[0], max(size)
    return replace(architecture, size=size)
