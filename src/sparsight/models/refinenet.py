"""RefineNet and its light-weight form: stages of a ResNet, refined from the coarsest to the finest.

Letters in shapes: B batch, C channels, H W height and width in pixels, K number of classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from sparsight.models.backbone_stages import TIMM, stages_of
from sparsight.models.mobilenet_stages import MobileNetV2Stages
from sparsight.models.resnet_stages import probe_stages
from sparsight.nn.conv_pair import ConvPair
from sparsight.nn.merge_maps import MergeMaps

BackboneName = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"
]
LightBackboneName = BackboneName | Literal["mobilenet_v2"]
NumCascades = Literal[1, 2, 4]
PoolingOrder = Literal["pool_conv", "conv_pool"]

# By number of cascaded blocks: the stages that each takes, as indices from the coarsest.
_GROUPS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0, 1, 2, 3),),
    2: ((0, 1), (2, 3)),
    4: ((0,), (1,), (2,), (3,)),
}
# The same of the light-weight network on a MobileNetV2, which has six.
_MOBILENET_GROUPS = ((0, 1), (2, 3), (4,), (5,))
_TWO_SCALES = (0.6, 1.2)
_WIDE_MAP = 512  # channels; the authors drop out from maps that have more


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)


def _residual_units(channels: int, count: int) -> nn.Sequential:
    """RefineNet's RCUs: a ReLU before each convolution, no norms, a bias in the first only."""
    return nn.Sequential(
        *(
            ConvPair(channels, channels, norm=None, biases=(True, False), is_preactivated=True)
            for _ in range(count)
        )
    )


class ChainedResidualPooling(nn.Module):
    """A chain of max poolings and convolutions, each link of which is added to the input's ReLU.

    Args:
        channels: C, of the input and the output.
        num_links: poolings in the chain.
        kernel_size: of the convolutions.
        order: "pool_conv" pools, then convolves; "conv_pool" the other way round.
        activation: of the input; the published ReLU, or what the light-weight network has.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_links: int,
        kernel_size: int,
        order: PoolingOrder,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(channels, channels, kernel_size) for _ in range(num_links))
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.order: PoolingOrder = order
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) of x (B, C, H, W)."""
        link = out = self.activation(x)
        for conv in self.convs:
            link = conv(self.pool(link)) if self.order == "pool_conv" else self.pool(conv(link))
            out = out + link
        return out

    def convs_to_sample(self) -> list[str]:
        """Names of the convolutions that `sparsify` samples by default: all."""
        return [f"convs.{i}" for i in range(len(self.convs))]

    def extra_repr(self) -> str:
        """The order, for repr."""
        return f"order={self.order!r}"


class RefineBlock(nn.Module):
    """Refines the stages it is given, together with what the block before it made.

    Each stage is reduced in width and adapted by residual units; everything is brought to the
    smallest width and the largest size and summed; context is gathered by chained pooling; residual
    units follow. With one input nothing is fused.

    Args:
        stage_channels: of the stages' maps, in the order of the inputs.
        widths: to which those are reduced.
        coarse_channels: of what the block before made; None for the first block.
        kernel_size: of the convolutions outside residual units, 3 or, light-weight, 1.
        num_units: residual units behind each reduction and behind the pooling.
        num_links: of the chained pooling.
        order: of the chained pooling.
        align_corners: of the bilinear upsampling.
        fuses_stages: whether the stages have a convolution each before the sum, as what the block
            before made always has. Without, all widths must be the same.
        activation: of the chained pooling's input.

    Attributes:
        out_channels: of what it makes.
    """

    def __init__(
        self,
        stage_channels: Sequence[int],
        widths: Sequence[int],
        *,
        coarse_channels: int | None,
        kernel_size: int,
        num_units: tuple[int, int],
        num_links: int,
        order: PoolingOrder,
        align_corners: bool,
        fuses_stages: bool = True,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.reductions = nn.ModuleList(
            _conv(c, width, kernel_size) for c, width in zip(stage_channels, widths, strict=True)
        )
        self.adaptations = nn.ModuleList(_residual_units(width, num_units[0]) for width in widths)
        arriving = [*widths] if coarse_channels is None else [*widths, coarse_channels]
        self.out_channels = min(arriving)
        # A single path is not fused, and has no convolution for it.
        is_fused = [fuses_stages] * len(widths) + [True] * (coarse_channels is not None)
        self.fusions = nn.ModuleList(
            _conv(c, self.out_channels, kernel_size) if fused else nn.Identity()
            for c, fused in zip(arriving, is_fused, strict=True)
            if len(arriving) > 1
        )
        self.pooling = ChainedResidualPooling(
            self.out_channels,
            num_links=num_links,
            kernel_size=kernel_size,
            order=order,
            activation=activation,
        )
        self.output = _residual_units(self.out_channels, num_units[1])
        self.merge = MergeMaps("sum", resizing="bilinear_corners" if align_corners else "bilinear")

    def forward(self, stages: Sequence[Tensor], coarse: Tensor | None) -> Tensor:
        """Refine.

        Args:
            stages: maps (B, C_i, H_i, W_i), of any sizes.
            coarse: (B, coarse_channels, h, w), or None for the first block.

        Returns:
            (B, out_channels, H, W) of the largest of those sizes.
        """
        paths = [
            adapt(reduce(x))
            for reduce, adapt, x in zip(self.reductions, self.adaptations, stages, strict=True)
        ]
        if coarse is not None:
            paths.append(coarse)
        if len(paths) == 1:
            return self.output(self.pooling(paths[0]))
        fused = [fuse(path) for fuse, path in zip(self.fusions, paths, strict=True)]
        return self.output(self.pooling(self.merge(*fused)))

    def convs_to_sample(self) -> list[str]:
        """Names of the convolutions that `sparsify` samples by default, pooling's aside: all."""
        return [
            f"{kind}.{i}"
            for kind in ("reductions", "fusions")
            for i, conv in enumerate(getattr(self, kind))
            if isinstance(conv, nn.Conv2d)
        ]


class RefineNet(nn.Module):
    """Per-pixel class logits from cascaded refinement. Build it with `refinenet`.

    Args:
        backbones: each maps (B, 3, H, W) to as many maps as the groups take, finest first. Two for
            two scales.
        channels: of those maps.
        scales: of the image that each backbone is given.
        num_classes: number of classes K, at least 1.
        groups: see `_GROUPS`: stages of each block, from the coarsest.
        widths: of the reduced stages, from the coarsest.
        kernel_size: of the decoder's convolutions.
        num_units: residual units behind reductions and behind poolings.
        num_links: of each chained pooling.
        order: of each chained pooling.
        dropout: share of what the classifier reads that is dropped in training; 0 for none.
        align_corners: of the bilinear upsampling.
        fuses_stages: see `RefineBlock`.
        activation: of each chained pooling's input.
    """

    def __init__(
        self,
        backbones: Sequence[nn.Module],
        *,
        channels: Sequence[int],
        scales: Sequence[float],
        num_classes: int,
        groups: Sequence[Sequence[int]],
        widths: Sequence[int],
        kernel_size: int,
        num_units: tuple[int, int],
        num_links: int,
        order: PoolingOrder,
        dropout: float,
        align_corners: bool,
        fuses_stages: bool = True,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        # One backbone is `.backbone`, as in the other models; the second of two scales beside it.
        self.backbone = backbones[0]
        self.other_backbone: nn.Module | None = backbones[1] if len(backbones) > 1 else None
        self.scales = tuple(scales)
        self.groups = tuple(tuple(group) for group in groups)
        from_coarsest = list(reversed(channels))
        self.drops = nn.ModuleList(
            nn.Dropout(0.5) if c > _WIDE_MAP else nn.Identity() for c in from_coarsest
        )
        blocks: list[RefineBlock] = []
        for group in self.groups:
            block = RefineBlock(
                [from_coarsest[i] for i in group for _ in backbones],
                [widths[i] for i in group for _ in backbones],
                coarse_channels=blocks[-1].out_channels if blocks else None,
                kernel_size=kernel_size,
                num_units=num_units,
                num_links=num_links,
                order=order,
                align_corners=align_corners,
                fuses_stages=fuses_stages,
                activation=activation,
            )
            blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(blocks[-1].out_channels, num_classes, 3, padding=1)
        self.num_classes = num_classes
        self.resize = MergeMaps(
            "concatenate", resizing="bilinear_corners" if align_corners else "bilinear"
        )
        for part in (self.blocks, self.classifier):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=0.01)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return `{"out": logits}`, the contract of torchvision's segmentation models.

        Args:
            image: (B, 3, H, W), floating point, normalised; any H and W from 1.

        Returns:
            Logits (B, K, H, W), same dtype as the model computes in, before softmax.

        Raises:
            ValueError: an input without pixels or of another rank or number of channels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 1:
            raise ValueError(
                f"RefineNet: the image has shape {tuple(image.shape)}, but (B, 3, H, W) with at "
                "least one pixel is required; add the batch dimension with image[None]."
            )
        size = (image.shape[-2], image.shape[-1])
        maps = [self._stages(self.backbone, image, self.scales[0])]
        if self.other_backbone is not None:
            maps.append(self._stages(self.other_backbone, image, self.scales[1]))
        x: Tensor | None = None
        for group, block in zip(self.groups, self.blocks, strict=True):
            x = block([of_scale[i] for i in group for of_scale in maps], x)
        assert x is not None
        logits = self.classifier(self.drop(x))
        return {"out": self.resize(logits, size=size)}

    def _stages(self, backbone: nn.Module, image: Tensor, scale: float) -> list[Tensor]:
        """The maps of one backbone, coarsest first."""
        if scale != 1.0:
            sides = [max(1, round(side * scale)) for side in image.shape[-2:]]
            image = self.resize(image, size=(sides[0], sides[1]))
        coarsest_first = reversed(backbone(image))
        return [drop(x) for drop, x in zip(self.drops, coarsest_first, strict=True)]


def refinenet(
    num_classes: int,
    *,
    backbone: nn.Module | BackboneName | str = "resnet101",
    num_cascades: NumCascades = 4,
    is_two_scale: bool = False,
    channels: int = 256,
    num_poolings: int = 4,
    pooling_order: PoolingOrder = "pool_conv",
    is_norm_frozen: bool = False,
    align_corners: bool = False,
) -> RefineNet:
    """Return a RefineNet with random weights, or with those of the backbone that was passed in.

    `sparsight.sparsify` samples the residual blocks of the backbone, the residual units and all
    other convolutions of the decoder but the classifier.

    Args:
        num_classes: number of classes K, at least 1.
        backbone: torchvision's name of a ResNet (random weights); or a ResNet with torchvision's
            attribute names, whose modules are used as they are (not copied); or any module that
            returns a list of at least four maps, finest first, the last four of which are used; or
            "timm:NAME", which is ``timm.create_model(NAME, features_only=True)`` with random
            weights, of the extra `sparsight[timm]`. For weights of torchvision, see
            `load_backbone_weights`.
        num_cascades: blocks that refine one after the other: 4 (default), one for each stage; 2,
            the second with what the first made of stages 4 and 3; or 1, which fuses all stages.
        is_two_scale: two backbones with weights of their own, on the image at 0.6 and 1.2 times its
            size, whose stages enter the same blocks. A module that was passed in is the first; the
            second starts as a copy of it.
        channels: width of the decoder, 256 as published; the coarsest stage is reduced to twice
            that.
        num_poolings: links of each chained pooling; 4 as in the published weights, 2 in the paper's
            figure.
        pooling_order: "pool_conv" (default, the paper) or "conv_pool" (the authors' code of 2018).
        is_norm_frozen: norms of the backbone are constants, as published, which random weights
            cannot do with. Applies to a backbone of torchvision asked for by name.
        align_corners: grid of the bilinear upsampling; True for weights of DrSleep's port.

    Returns:
        A module that maps (B, 3, H, W) to `{"out": (B, K, H, W)}`.

    Raises:
        ValueError: an unknown backbone, a count that is too small, or an unknown cascade or order.
        ModuleNotFoundError: a backbone of timm, which is not installed.

    Example:
        >>> import torch
        >>> model = refinenet(11, backbone="resnet18", channels=16).eval()
        >>> model(torch.zeros(1, 3, 50, 70))["out"].shape
        torch.Size([1, 11, 50, 70])

    Source: Lin, Milan, Shen, Reid, "RefineNet: Multi-Path Refinement Networks for High-Resolution
    Semantic Segmentation", CVPR 2017, arXiv 1611.06612, section 3; biases, dropout and weights of
    N(0, 0.01^2) as in the authors' code (github.com/guosheng/refinenet, of whose text nothing is
    used). We depart in two things: logits are upsampled to the input, and the loss is taken there,
    where the authors shrink the labels; and upsampling is bilinear, as in the paper, where their
    code is bicubic.
    """
    return _build(
        "refinenet",
        num_classes,
        backbone=backbone,
        num_cascades=num_cascades,
        is_two_scale=is_two_scale,
        channels=channels,
        num_poolings=num_poolings,
        pooling_order=pooling_order,
        is_norm_frozen=is_norm_frozen,
        align_corners=align_corners,
        kernel_size=3,
        num_units=(2, 3),
        dropout=0.5,
    )


def light_weight_refinenet(
    num_classes: int,
    *,
    backbone: nn.Module | LightBackboneName | str = "resnet50",
    channels: int = 256,
    num_poolings: int = 4,
    is_norm_frozen: bool = False,
    align_corners: bool = False,
) -> RefineNet:
    """Return a light-weight RefineNet: 1x1 convolutions in the decoder, and no residual units.

    Args:
        num_classes: number of classes K, at least 1.
        backbone: as for `refinenet`; or "mobilenet_v2", or torchvision's module of it, with which
            the network is the published one of 3.3 M parameters: six stages enter, the last four of
            them in pairs, which are summed as they are, without a convolution each; and chained
            poolings begin with a ReLU6.
        channels: as for `refinenet`.
        num_poolings: as for `refinenet`.
        is_norm_frozen: as for `refinenet`.
        align_corners: as for `refinenet`.

    Returns:
        A module that maps (B, 3, H, W) to `{"out": (B, K, H, W)}`.

    Raises:
        ValueError: an unknown backbone, or a count that is too small.
        ModuleNotFoundError: as for `refinenet`.

    Example:
        >>> import torch
        >>> model = light_weight_refinenet(11, backbone="mobilenet_v2", channels=16).eval()
        >>> model(torch.zeros(1, 3, 50, 70))["out"].shape
        torch.Size([1, 11, 50, 70])

    Source: Nekrasov, Shen, Reid, "Light-Weight RefineNet for Real-Time Semantic Segmentation", BMVC
    2018, arXiv 1810.03272; on a MobileNetV2 as in the authors' code
    (github.com/DrSleep/light-weight-refinenet, of whose text nothing is used). Its classifier stays
    3x3, and nothing is dropped before it. We depart as in `refinenet`.
    """
    return _build(
        "light_weight_refinenet",
        num_classes,
        backbone=backbone,
        num_cascades=4,
        is_two_scale=False,
        channels=channels,
        num_poolings=num_poolings,
        pooling_order="pool_conv",
        is_norm_frozen=is_norm_frozen,
        align_corners=align_corners,
        kernel_size=1,
        num_units=(0, 0),
        dropout=0.0,
    )


def _build(
    caller: str,
    num_classes: int,
    *,
    backbone: nn.Module | str,
    num_cascades: NumCascades,
    is_two_scale: bool,
    channels: int,
    num_poolings: int,
    pooling_order: PoolingOrder,
    is_norm_frozen: bool,
    align_corners: bool,
    kernel_size: int,
    num_units: tuple[int, int],
    dropout: float,
) -> RefineNet:
    counts = {"num_classes": num_classes, "channels": channels, "num_poolings": num_poolings}
    for argument, value in counts.items():
        if value < 1:
            raise ValueError(
                f"{caller}: {argument}={value}; at least 1 is required; leave it out for the "
                "published one, and count classes without the ignored one."
            )
    if num_cascades not in _GROUPS:
        raise ValueError(
            f"{caller}: num_cascades={num_cascades}; 1, 2 or 4 is required; pass 4 for a block a "
            "stage."
        )
    if pooling_order not in get_args(PoolingOrder):
        raise ValueError(
            f"{caller}: pooling_order={pooling_order!r}; 'pool_conv' or 'conv_pool' is required; "
            "leave it out for the paper's."
        )
    if is_norm_frozen and (not isinstance(backbone, str) or backbone.startswith(TIMM)):
        raise ValueError(
            f"{caller}: is_norm_frozen=True came with a backbone module, or timm's, but it changes "
            "a backbone of torchvision asked for by name only; freeze the module's norms, or pass "
            "its name."
        )
    is_light = caller == "light_weight_refinenet"
    names = get_args(BackboneName) + (("mobilenet_v2",) if is_light else ())
    build = partial(stages_of, caller, backbone, names=names, is_norm_frozen=is_norm_frozen)
    backbones = [build()]
    if is_two_scale and isinstance(backbone, str):
        backbones.append(build())
    elif is_two_scale:
        backbones.append(copy.deepcopy(backbones[0]))
    has_six = isinstance(backbones[0], MobileNetV2Stages)
    return RefineNet(
        backbones,
        channels=probe_stages(backbones[0])[0],
        scales=_TWO_SCALES if is_two_scale else (1.0,),
        num_classes=num_classes,
        groups=_MOBILENET_GROUPS if has_six else _GROUPS[num_cascades],
        widths=(channels,) * 6 if has_six else (2 * channels, channels, channels, channels),
        kernel_size=kernel_size,
        num_units=num_units,
        num_links=num_poolings,
        order=pooling_order,
        dropout=dropout,
        align_corners=align_corners,
        fuses_stages=not has_six,
        activation=F.relu6 if has_six else F.relu,
    )
