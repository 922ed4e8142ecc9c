"""InstanceFCN: masks of objects, whatever they are, from instance-sensitive score maps.

Letters in shapes: B batch, C channels, H W height and width in pixels, h w those of the map in
cells of 8 pixels, k bins and m cells a side of a window, N number of objects, n of proposals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsight.models.instance_fcn_loss import (
    MASK_TARGETS,
    NORMALIZATIONS,
    LossSums,
    MaskTarget,
    Normalize,
)
from sparsight.models.mask_proposals import WindowMasks, keep_distinct, paste_masks
from sparsight.models.stride8_trunks import STRIDE, TrunkName, named_trunk, trunk_of
from sparsight.models.window_sampling import (
    WindowRule,
    corner_windows,
    draw_windows,
    label_windows,
)
from sparsight.ops import assemble_windows, windows_inside

SCALES = tuple(1.5**power for power in (-4, -3, -2, -1, 0, 1))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights
_INITIAL_STD = 0.01

Target = Mapping[str, Any]


class InstanceMaps(nn.Module):
    """The convolutions of InstanceFCN: score maps and objectness of a batch of images.

    Args:
        backbone: (B, 3, H, W) -> (B, C, h, w), of stride 8.
        channels: C.
        k: bins a side; k * k score maps.
        head_channels: width of both branches.
    """

    def __init__(self, backbone: nn.Module, *, channels: int, k: int, head_channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.masks = nn.Sequential(
            nn.Conv2d(channels, head_channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(head_channels, k * k, 3, padding=1),
        )
        self.objectness = nn.Sequential(
            nn.Conv2d(channels, head_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(head_channels, 1, 1),
        )
        for layer in [*self.masks, *self.objectness]:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=_INITIAL_STD)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, k * k, h, w) score maps and (B, 1, h, w) objectness, logits both.

        Args:
            images: (B, 3, H, W), normalised; sides are multiples of 8.
        """
        x = self.backbone(images)
        return self.masks(x), self.objectness(x)

    def convs_to_sample(self) -> list[str]:
        """Names of the convolutions that `sparsify` samples by default, beside the backbone's.

        The 3x3 one of the objectness branch holds 86 % of both branches' multiply-adds.
        """
        return ["objectness.0"]


class InstanceFCN(nn.Module):
    """Proposes masks of objects in images of any sizes. Build it with `instance_fcn`.

    Args:
        network: (B, 3, H, W) -> score maps and objectness, as `InstanceMaps`.
        k: bins a side.
        m: cells a side of a window, odd.
        min_size: shorter side of the image in pixels at scale 1.
        max_size: bound on its longer side at scale 1.
        scales: factors on both.
        num_windows: windows of an image that a training step sees.
        rule: which windows are positive and negative.
        normalize: see `LossSums.losses`.
        mask_target: see `mask_cells`.
        windows_per_scale: windows that are assembled at each scale, those of the best objectness.
        nms_threshold: largest IoU of the boxes of two proposals.
        max_proposals: of an image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        k: int,
        m: int,
        min_size: int,
        max_size: int,
        scales: Sequence[float],
        num_windows: int,
        rule: WindowRule,
        normalize: Normalize,
        mask_target: MaskTarget,
        windows_per_scale: int,
        nms_threshold: float,
        max_proposals: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.k = k
        self.m = m
        self.min_size = min_size
        self.max_size = max_size
        self.scales = tuple(float(scale) for scale in scales)
        self.num_windows = num_windows
        self.rule = rule
        self.normalize: Normalize = normalize
        self.mask_target: MaskTarget = mask_target
        self.windows_per_scale = windows_per_scale
        self.nms_threshold = nms_threshold
        self.max_proposals = max_proposals
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training mode, proposals in eval mode.

        Args:
            images: (3, H, W) each, floating point in [0, 1], of any sizes.
            targets: in training, of each image {"boxes": (N, 4) x0 y0 x1 y1 in pixels, "masks":
                (N, H, W) bool or 0 and 1}; optionally "iscrowd": (N,), regions that are no objects
                and no background either, and "scale": one of `scales`, the size at which this image
                is seen; all images that have none are seen at one that is drawn from torch's global
                generator. "labels" are not looked at: what an object is makes no difference.

        Returns:
            In training {"loss_objectness", "loss_mask"}, scalars. Otherwise of each image, best
            first, {"masks": (n, 1, H, W) bool, "boxes": (n, 4) x0 y0 x1 y1 around them, "scores":
            (n,) in [0, 1], "labels": (n,) all 1, as COCO's tools want one}.

        Raises:
            ValueError: no targets in training, or images or targets of other shapes.

        Cost: of n proposals n * H * W bytes for each image of the batch: 300 MiB for a thousand at
        480x640; pass fewer images at once, or lower `max_proposals`.
        """
        _check_images(images)
        if self.training:
            return self._losses(images, _checked_targets(images, targets))
        return self._proposals(images)

    def prepare(
        self, images: Sequence[Tensor], scales: Sequence[float]
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return images as the network takes them.

        Args:
            images: (3, H, W) each, in [0, 1].
            scales: of each image: its shorter side becomes `min_size` times this, if its longer one
                stays within `max_size` times this.

        Returns:
            (B, 3, Hp, Wp) channels-last: resized, normalised, and padded at the right and below
            with zeros to one size, a multiple of 8; and height and width of each without padding.
        """
        sizes = [self.resized(image, scale) for image, scale in zip(images, scales, strict=True)]
        height, width = (-(-max(sides) // STRIDE) * STRIDE for sides in zip(*sizes, strict=True))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            normalised = (image - self.mean) / self.std
            batch[i, :, :h, :w] = F.interpolate(
                normalised[None], size=(h, w), mode="bilinear", align_corners=False, antialias=True
            )[0]
        return batch.contiguous(memory_format=torch.channels_last), sizes

    def resized(self, image: Tensor, scale: float) -> tuple[int, int]:
        """Return the height and width in pixels of an image at a scale."""
        shorter, longer = sorted(image.shape[-2:])
        factor = scale * min(self.min_size / shorter, self.max_size / longer)
        return max(1, round(image.shape[-2] * factor)), max(1, round(image.shape[-1] * factor))

    def _losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        drawn = self.scales[int(torch.randint(len(self.scales), ()))]
        batch, sizes = self.prepare(images, [float(t.get("scale", drawn)) for t in targets])
        score_maps, objectness = self.network(batch)
        sums = LossSums.nothing(objectness)
        for i, (image, target, size) in enumerate(zip(images, targets, sizes, strict=True)):
            rows, columns = map_size = _map_size(size)
            ratio = [size[1] / image.shape[2], size[0] / image.shape[1]] * 2
            boxes = target["boxes"]
            labels = label_windows(
                boxes * torch.tensor(ratio, dtype=boxes.dtype, device=boxes.device),
                _crowds(target),
                map_size=map_size,
                size=self.m,
                stride=STRIDE,
                rule=self.rule,
            )
            sums.add(
                score_maps[i, :, :rows, :columns],
                objectness[i, 0, :rows, :columns],
                draw_windows(labels, self.num_windows),
                target["masks"],
                size=size,
                window=self.m,
                target=self.mask_target,
            )
        losses = sums.losses(self.normalize)
        # Without a positive window in the batch the mask branch still gets a gradient, of 0: in a
        # distributed run all processes wait for all gradients.
        losses["loss_mask"] = losses["loss_mask"] + 0 * score_maps.float().sum()
        return losses

    def _proposals(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        parts: list[list[WindowMasks]] = [[] for _ in images]
        for scale in self.scales:
            batch, sizes = self.prepare(images, [scale] * len(images))
            score_maps, objectness = self.network(batch)
            for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
                rows, columns = _map_size(size)
                parts[i].append(
                    self._best_windows(
                        score_maps[i, :, :rows, :columns],
                        objectness[i, 0, :rows, :columns],
                        (size[1] / image.shape[2], size[0] / image.shape[1]),
                    )
                )
        return [
            self._pasted(WindowMasks.concatenate(found), (image.shape[1], image.shape[2]))
            for image, found in zip(images, parts, strict=True)
        ]

    def _best_windows(
        self, score_maps: Tensor, objectness: Tensor, ratio: tuple[float, float]
    ) -> WindowMasks:
        """Assemble the windows of the best objectness of one image at one scale.

        Args:
            score_maps: (k * k, h, w).
            objectness: (h, w).
            ratio: pixels of the resized image for one of the image, across and down.
        """
        height, width = objectness.shape
        flat = objectness.flatten().float()
        scores, index = flat.topk(min(self.windows_per_scale, len(flat)))
        cells = torch.stack([index // width, index % width], dim=1)
        windows = corner_windows(cells, 0, size=self.m)
        corner = windows[:, [2, 1]].float() * STRIDE
        scale = corner.new_tensor(ratio)
        return WindowMasks(
            logits=assemble_windows(score_maps[None].float(), windows, size=self.m),
            is_inside=windows_inside(windows, size=self.m, height=height, width=width),
            boxes=torch.cat([corner / scale, (corner + self.m * STRIDE) / scale], dim=1),
            scores=scores,
        )

    def _pasted(self, found: WindowMasks, size: tuple[int, int]) -> dict[str, Tensor]:
        found = keep_distinct(
            found, size=size, threshold=self.nms_threshold, most=self.max_proposals
        )
        masks, boxes, kept = paste_masks(found, size)
        return {
            "masks": masks[:, None],
            "boxes": boxes,
            "scores": found.scores[kept].sigmoid(),
            "labels": torch.ones_like(kept),
        }

    def extra_repr(self) -> str:
        """Sizes, for repr."""
        scales = ", ".join(f"{scale:.3g}" for scale in self.scales)
        return (
            f"k={self.k}, m={self.m}, min_size={self.min_size}, max_size={self.max_size}, "
            f"scales=({scales})"
        )


def _map_size(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the cells that an image covers, the last ones perhaps in part."""
    return -(-size[0] // STRIDE), -(-size[1] // STRIDE)


def _crowds(target: Target) -> Tensor:
    boxes = target["boxes"]
    crowds = target.get("iscrowd")
    if crowds is None:
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return torch.as_tensor(crowds, device=boxes.device).bool()


def _check_images(images: Sequence[Tensor]) -> None:
    if not len(images):
        raise ValueError(
            "InstanceFCN: the list of images is empty; at least one is required; leave the call "
            "out."
        )
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(
                f"InstanceFCN: an image has shape {tuple(image.shape)}; (3, H, W) with at least "
                "one pixel is required; pass a list of RGB images, in [0, 1]."
            )
        if not image.is_floating_point():
            raise ValueError(
                f"InstanceFCN: an image is {image.dtype}; floating point in [0, 1] is required; "
                "divide bytes by 255."
            )


def _checked_targets(
    images: Sequence[Tensor], targets: Sequence[Target] | None
) -> Sequence[Target]:
    if targets is None or len(targets) != len(images):
        arrived = "none" if targets is None else str(len(targets))
        raise ValueError(
            f"InstanceFCN: {arrived} targets for {len(images)} images; one for each is required in "
            "training mode; pass them, or call eval() first."
        )
    for image, target in zip(images, targets, strict=True):
        boxes, masks = (target.get(name) for name in ("boxes", "masks"))
        num = None if boxes is None else len(boxes)
        crowds = target.get("iscrowd")
        if (
            boxes is None
            or masks is None
            or tuple(boxes.shape) != (num, 4)
            or tuple(masks.shape) != (num, *image.shape[1:])
            or (crowds is not None and len(crowds) != num)
        ):
            shapes = {
                name: tuple(value.shape) if isinstance(value, Tensor) else value
                for name, value in (("boxes", boxes), ("masks", masks), ("iscrowd", crowds))
            }
            raise ValueError(
                f"InstanceFCN: a target has {shapes} for an image of {tuple(image.shape)}; boxes "
                "(N, 4), masks (N, H, W) of the image's size and, if there are crowds, iscrowd "
                "(N,) are required; N is 0 where there is no object."
            )
    return targets


def instance_fcn(
    *,
    k: int = 5,
    m: int = 21,
    backbone: nn.Module | TrunkName = "vgg16",
    num_stages: int = 4,
    is_norm_frozen: bool = False,
    head_channels: int = 512,
    min_size: int = 600,
    max_size: int = 1200,
    scales: Sequence[float] = SCALES,
    num_windows: int = 256,
    rule: WindowRule | None = None,
    normalize: Normalize = "pixels",
    mask_target: MaskTarget = "binary",
    windows_per_scale: int = 1000,
    nms_threshold: float = 0.8,
    max_proposals: int = 1000,
) -> InstanceFCN:
    """Return InstanceFCN with random weights: 17.45 M parameters with VGG-16.

    A window slides over k * k score maps, one for each part of an object that a pixel may belong
    to; its mask is put together of m * m cells, each read from the map of its part
    (`sparsight.ops.assemble_windows`); a second branch says whether the window holds an object.

    `load_trunk_weights` of `sparsight.models.stride8_trunks` reads torchvision's ImageNet weights
    into `.network.backbone`. `sparsight.sparsify` samples the residual blocks of a ResNet, the
    convolutions of VGG but the first, and the 3x3 one of the objectness branch.

    Args:
        k: bins a side of a window; 5 as published, which also has 3 and 7.
        m: cells a side of a window, odd, at least k; 21 as published: 168 pixels.
        backbone: "vgg16" as published; "resnet18" to "resnet101" at stride 8; a ResNet with
            torchvision's attributes, which is dilated in place; or a module with the integer
            `out_channels` that maps (B, 3, H, W), sides multiples of 8, to (B, out_channels, H / 8,
            W / 8).
        num_stages: of a ResNet: 3 leaves out layer4, 2 layer3 too, which at stride 8 are most of
            the cost.
        is_norm_frozen: norms of a ResNet asked for by name are constants, for weights that were
            trained before.
        head_channels: width of both branches; 512 as published.
        min_size: shorter side of the image in pixels at scale 1; 600 as published.
        max_size: bound on the longer side at scale 1; the paper names none; 1200 leaves images up
            to 1:2 as they are.
        scales: of training, one of them drawn for each call, and of inference, all of them; as
            published 1.5 to the powers of -4 to 1: shorter sides of 118.5 to 900 pixels.
        num_windows: windows of an image that a training step sees; 256 as published.
        rule: which windows are positive and negative; default: DeepMask's, to which the paper
            refers.
        normalize: of the losses: "pixels" (default) means over windows and over their cells,
            "windows" over windows both, "none" sums, as the paper writes them.
        mask_target: what a cell of a mask is told: "binary" (default) whether half of it or more is
            the object's, as DeepMask's masks are reduced; "share" how much of it is. Proposals are
            interpolated between cells before they are cut at a half, which of shares gives back the
            outline: 20 COCO images' own masks, reduced so, have an AR of 81 %, of 65 % as binary.
        windows_per_scale: windows that are assembled at each scale; the paper assembles all.
        nms_threshold: largest IoU of the boxes of two proposals; 0.8 as published.
        max_proposals: of an image.

    Returns:
        A module with the call contract of torchvision's detectors, see `InstanceFCN.forward`.

    Raises:
        ValueError: a count or size that is too small, an even window, no scales, an unknown
            backbone or normalisation.

    Example:
        >>> model = instance_fcn(backbone="resnet18", min_size=48, max_size=96, scales=(1.0,))
        >>> (found,) = model.eval()([torch.rand(3, 40, 60)])
        >>> sorted(found), found["masks"].shape[1:]
        (['boxes', 'labels', 'masks', 'scores'], torch.Size([1, 40, 60]))

    Source: Dai, He, Li, Ren, Sun, "Instance-sensitive Fully Convolutional Networks", ECCV 2016,
    arXiv 1603.08678. Where the paper is silent: the fourth pooling looks at 3x3 positions, as
    DeepLab's; windows at the border of the image are trained and read on the cells inside of it;
    the mask loss is of positive windows only; of a kind of windows that an image has too few of,
    each counts for several; images are normalised as for torchvision's weights.
    """
    counts = {
        "k": (k, 1),
        "m": (m, k),
        "head_channels": (head_channels, 1),
        "min_size": (min_size, STRIDE),
        "max_size": (max_size, min_size),
        "num_windows": (num_windows, 2),
        "windows_per_scale": (windows_per_scale, 1),
        "max_proposals": (max_proposals, 1),
    }
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(
                f"instance_fcn: {name}={value}; at least {least} is required; leave it out for the "
                "published value."
            )
    if m % 2 == 0:
        raise ValueError(
            f"instance_fcn: m={m}; an odd number is required, as a window is centred at a cell; "
            f"pass {m + 1}."
        )
    if not scales or min(scales) <= 0:
        raise ValueError(
            f"instance_fcn: scales={tuple(scales)}; at least one factor above 0 is required; leave "
            "them out for the published ones."
        )
    if normalize not in NORMALIZATIONS:
        raise ValueError(
            f"instance_fcn: normalize={normalize!r}; one of {', '.join(NORMALIZATIONS)} is "
            "required; leave it out for means."
        )
    if mask_target not in MASK_TARGETS:
        raise ValueError(
            f"instance_fcn: mask_target={mask_target!r}; one of {', '.join(MASK_TARGETS)} is "
            "required; leave it out for binary ones."
        )
    if isinstance(backbone, str):
        trunk: nn.Module = named_trunk(
            backbone, num_stages=num_stages, is_norm_frozen=is_norm_frozen, caller="instance_fcn"
        )
        channels = trunk.out_channels  # type: ignore[union-attr]  # a trunk's is an int
    else:
        trunk, channels = trunk_of(backbone, num_stages=num_stages, caller="instance_fcn")
    return InstanceFCN(
        InstanceMaps(trunk, channels=channels, k=k, head_channels=head_channels),  # type: ignore[arg-type]
        k=k,
        m=m,
        min_size=min_size,
        max_size=max_size,
        scales=scales,
        num_windows=num_windows,
        rule=rule or WindowRule(),
        normalize=normalize,
        mask_target=mask_target,
        windows_per_scale=windows_per_scale,
        nms_threshold=nms_threshold,
        max_proposals=max_proposals,
    )
