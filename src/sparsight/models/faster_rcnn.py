"""Faster R-CNN with a feature pyramid: torchvision's detector, with deformable stages on request.

Letters in shapes: B batch, C channels, H W height and width in pixels, N number of boxes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from sparsight.models.state_dict import is_count, misfits, read_state_dict
from sparsight.nn.deform_block import make_stage_deformable

BackboneName = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d"
]

_NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "resnext101_32x8d",
)
_STAGES = ("layer1", "layer2", "layer3", "layer4")
# In the order in which torchvision thaws them.
_THAWED = ("layer4", "layer3", "layer2", "layer1", "conv1")
_DEFAULT_EPS = 1e-5


def faster_rcnn(
    backbone: nn.Module | BackboneName = "resnet50",
    *,
    num_classes: int,
    deformable: bool = False,
    is_norm_frozen: bool = False,
    trainable_layers: int = 5,
    min_size: int = 800,
    max_size: int = 1333,
    fpn_channels: int = 256,
    head_channels: int = 1024,
    **options: Any,
) -> nn.Module:
    """Return torchvision's Faster R-CNN with a feature pyramid, with random weights.

    The ResNet is `.backbone.body`, and everything else has torchvision's name too, so that its
    state_dicts load (`load_torchvision_weights`). `sparsight.sparsify` samples the residual blocks,
    all of them as published, or those that `where` selects.

    Args:
        backbone: name of a ResNet of torchvision, or a ResNet with torchvision's attribute names,
            whose modules are used as they are (not copied).
        num_classes: number of classes, the background (label 0) among them, as torchvision counts:
            81 for the categories of COCO in a row, 91 for labels that are COCO's category ids.
        deformable: the 3x3 convolutions of stages 2 to 4 (conv3_x to conv5_x) are deformable, with
            offsets made of the block's input, as published (`sparsight.nn.DeformableBlock`); in a
            basic block, which is not published, the second one, where its first has a stride with
            offsets made of its own input. Offsets start at 0, so that weights of the plain network
            give its outputs.
        is_norm_frozen: norms are constants (torchvision's FrozenBatchNorm2d), for weights that were
            trained before; torchvision does so whenever it loads some. Default: they learn, which
            random weights need. The published detector keeps the statistics and trains scale and
            bias; torchvision keeps all four. Applies to a backbone asked for by name.
        trainable_layers: how many of layer4, layer3, layer2, layer1, stem (in this order) learn;
            the others' parameters get `requires_grad=False`. Default 5, all; the published detector
            has 4; torchvision takes 3 for pretrained weights.
        min_size: shorter side of the image, in pixels, that the model resizes to; 800 in
            torchvision, 1000 to 500 in the sampling paper.
        max_size: upper bound on the longer side, in pixels; 1333 in torchvision, 1667 for a shorter
            side of 1000 in the sampling paper.
        fpn_channels: width of the pyramid; 256 in the source.
        head_channels: width of the box head; 1024 in the source.
        options: further arguments of torchvision's `FasterRCNN`, as `box_score_thresh`.

    Returns:
        torchvision's `FasterRCNN`. In eval mode it maps a list of images (3, H, W), float in [0, 1]
        of any sizes, to a list of {"boxes": (N, 4) x0 y0 x1 y1 in pixels of the image, "labels":
        (N,), "scores": (N,)}; in training mode (images, targets) to a dict of four losses.

    Raises:
        ValueError: unknown backbone, fewer than two classes, `trainable_layers` outside 0 to 5, or
            a ResNet that lacks a stage.

    Example:
        >>> import torch
        >>> model = faster_rcnn("resnet18", num_classes=3, min_size=64, max_size=96).eval()
        >>> [sorted(found) for found in model([torch.rand(3, 48, 64)])]
        [['boxes', 'labels', 'scores']]

    Source: Ren et al., NIPS 2015, arXiv 1506.01497, with Lin et al., CVPR 2017, arXiv 1612.03144;
    deformable stages Dai et al., ICCV 2017, arXiv 1703.06211, as in Xie et al., ECCV 2020, arXiv
    2003.08866. The detector itself is torchvision's (BSD-3-Clause), not rewritten.
    """
    if num_classes < 2:
        raise ValueError(
            f"faster_rcnn: num_classes={num_classes}; at least 2 are required, the background is "
            "one of them; pass the number of classes plus 1."
        )
    if not 0 <= trainable_layers <= len(_THAWED):
        raise ValueError(
            f"faster_rcnn: trainable_layers={trainable_layers}; 0 to {len(_THAWED)} is required; "
            "pass 5 to train all, 4 for all but the stem."
        )
    # heavy: only for those who ask for a detector
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    resnet = (
        _named_resnet(backbone, is_norm_frozen=is_norm_frozen)
        if isinstance(backbone, str)
        else backbone
    )
    widths = _stage_channels(resnet)
    _freeze_all_but(resnet, trainable_layers)
    if deformable:
        for name in _STAGES[1:]:
            make_stage_deformable(getattr(resnet, name))
    pyramid = BackboneWithFPN(
        resnet,
        return_layers={name: str(i) for i, name in enumerate(_STAGES)},
        in_channels_list=widths,
        out_channels=fpn_channels,
        extra_blocks=LastLevelMaxPool(),
    )
    return FasterRCNN(
        pyramid,
        min_size=min_size,
        max_size=max_size,
        box_head=TwoMLPHead(fpn_channels * 7 * 7, head_channels),
        box_predictor=FastRCNNPredictor(head_channels, num_classes),
        **options,
    )


def load_torchvision_weights(
    model: nn.Module, path: str | Path, *, trained_eps: float | None = None
) -> list[str]:
    """Load a local file of torchvision's weights into a detector; return what it did not hold.

    Args:
        model: from `faster_rcnn`, dense; changed in place.
        path: a state_dict on disk, as `read_state_dict` takes it: of torchvision's Faster R-CNN,
            whose box predictor is left out if its number of classes is another one, or of its
            ResNet classifiers, which goes into `.backbone.body` without the classifier.
        trained_eps: the epsilon under the root that the norms were trained with. Default None: 0
            for a file with the parameter names of before torchvision 0.13, which the published
            "fasterrcnn_resnet50_fpn" COCO_V1 weights are and need; 1e-5, torch's, for all others.
            Another one than the model's is made up for in the variances.

    Returns:
        Names of the parameters that keep their values, in the order of the state_dict: offsets of
        deformable convolutions, and what the above leaves out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no state_dict, or one that does not fit; names what differs.

    Cost: none beyond reading the file; nothing is downloaded.
    """
    advice = (
        "a local file of torchvision's weights is required, as *.safetensors or written by "
        "torch.save; fetch it from the URL that torchvision names "
        "(torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url)"
    )
    tensors = read_state_dict(path, name="load_torchvision_weights", advice=advice)
    own = model.state_dict()
    is_old = any(
        name in tensors for name in ("rpn.head.conv.weight", "backbone.fpn.inner_blocks.0.weight")
    )
    is_detector = any(name.startswith("backbone.body.") for name in tensors)
    if is_detector:
        tensors = _with_current_names(tensors)
        predictor = "roi_heads.box_predictor."
        name = f"{predictor}cls_score.weight"
        if name in tensors and tensors[name].shape[0] != own[name].shape[0]:
            tensors = {k: v for k, v in tensors.items() if not k.startswith(predictor)}
    else:
        tensors = {f"backbone.body.{k}": v for k, v in tensors.items() if not k.startswith("fc.")}
    # FrozenBatchNorm2d does not count batches, and old files have no counts.
    tensors = {k: v for k, v in tensors.items() if k in own or not is_count(k)}
    missing = [name for name in own if name not in tensors and not is_count(name)]
    # What a file of this kind does not hold, or holds for other classes.
    optional = (
        "roi_heads.box_predictor." if is_detector else ("backbone.fpn.", "rpn.", "roi_heads.")
    )
    lacking = [name for name in missing if ".offset." not in name and not name.startswith(optional)]
    refused = misfits(own, tensors, missing=lacking)
    if refused:
        raise ValueError(
            f"load_torchvision_weights: {str(path)!r} does not fit the model: "
            f"{'; '.join(refused)}; weights of the same backbone are required; build the "
            "model with the backbone that the file was trained with."
        )
    if trained_eps is None:
        trained_eps = 0.0 if is_old else _DEFAULT_EPS
    for name, module in model.named_modules():
        key = f"{name}.running_var"
        if key in tensors and getattr(module, "eps", trained_eps) != trained_eps:
            # 1 / sqrt(var + eps) is all that a norm makes of the two.
            tensors[key] = tensors[key] + (trained_eps - cast(float, module.eps))
    model.load_state_dict(tensors, strict=False)
    return missing


def _named_resnet(name: str, *, is_norm_frozen: bool) -> nn.Module:
    if name not in _NAMES:
        raise ValueError(
            f"faster_rcnn: backbone={name!r}; one of {', '.join(_NAMES)} or a module is required; "
            "build any other ResNet yourself and pass it."
        )
    from torchvision.models import resnet as zoo
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d if is_norm_frozen else nn.BatchNorm2d
    return getattr(zoo, name)(weights=None, norm_layer=norm)


def _stage_channels(resnet: nn.Module) -> list[int]:
    """Output channels of the four stages, read off the last block's last convolution."""
    widths = []
    for name in _STAGES:
        stage = getattr(resnet, name, None)
        block: Any = stage[-1] if isinstance(stage, nn.Sequential) and len(stage) else None
        last = getattr(block, "conv3", None) or getattr(block, "conv2", None)
        if last is None:
            raise ValueError(
                f"faster_rcnn: backbone {type(resnet).__name__} has no stage {name!r} of residual "
                "blocks; a ResNet with torchvision's attribute names is required; rename the "
                "attributes or wrap the backbone in a module that has them."
            )
        widths.append(last.out_channels)
    return widths


def _freeze_all_but(resnet: nn.Module, trainable_layers: int) -> None:
    """As torchvision: whatever lies in no thawed layer takes no gradient."""
    thawed: list[str] = list(_THAWED[:trainable_layers])
    if trainable_layers == len(_THAWED):
        thawed.append("bn1")
    for name, parameter in resnet.named_parameters():
        if name.partition(".")[0] not in thawed:
            parameter.requires_grad_(False)


def _with_current_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of before torchvision 0.13 as those of today."""
    renamed = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[:2] == ["backbone", "fpn"] and len(parts) == 5:  # ...inner_blocks.0.weight
            parts.insert(4, "0")
        elif parts[:3] == ["rpn", "head", "conv"] and len(parts) == 4:  # ...conv.weight
            parts[3:3] = ["0", "0"]
        renamed[".".join(parts)] = value
    return renamed
