"""Multiply-adds as the sampling paper's authors count them: the backbone, at one nominal size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsight.measure.macs import MacCount
from sparsight.measure.multiply_adds import convolution_macs
from sparsight.measure.sampled_layers import LayerMacs, join

_STAGES = ("layer1", "layer2", "layer3", "layer4")


def published_size(shorter_side: int) -> tuple[int, int]:
    """Return the nominal (height, width) at which the authors count, in pixels.

    Both are rounded down to multiples of 32, the width after 5/3 of the shorter side: 1000 gives
    (992, 1664). 224 gives (224, 224), a classifier's crop.
    """
    if shorter_side < 32:
        raise ValueError(
            f"published_size: shorter_side={shorter_side}; at least 32 pixels are required; pass "
            "1000, 800, 600 or 500 for the published rows."
        )
    height = shorter_side // 32 * 32
    return height, height if shorter_side == 224 else shorter_side * 5 // 3 // 32 * 32


def count_published_macs(
    model: nn.Module,
    *,
    shorter_side: int = 1000,
    size: tuple[int, int] | None = None,
    density: float | Mapping[str, float] = 1.0,
) -> MacCount:
    """Count a ResNet's multiply-adds by the published convention, without running it.

    The figures called "GFLOPs" in the paper's tables are these, in units of 1e9: for a ResNet-101
    with deformable stages 2 to 4, 289.47, 184.06, 100.20 and 70.03 at shorter sides 1000, 800, 600
    and 500. What it leaves out makes it no measure of a whole detector; use `count_macs` for what
    one input needs.

    Counted: the convolutions of the backbone, shortcuts and offset branches of deformable
    convolutions included, at `published_size(shorter_side)`. Of a sampled block: each convolution
    (and offset branch) times the density d of its mask; sampler heads everywhere; interpolation
    once per mask, of the last map that it gates, with window * window * channels * positions *
    d * (1 - d): the sites that a hole expects in its window. Not counted: everything behind the
    backbone, biases, norms, activations, pooling, the bilinear gathering of deformable
    convolutions.

    `count_macs` differs for sampled blocks only: it takes the masks of one input, counts the sites
    that each hole really sees (fewer at the border, or where samples cluster) and fills conv1's map
    only where conv2 reads. For a dense backbone the two agree.

    Args:
        model: a detector or segmentation model whose ResNet is `.backbone.body` or `.backbone`, or
            the ResNet itself; dense or sampled, not frozen.
        shorter_side: of the images, in pixels.
        size: (height, width) of the input in pixels instead of the nominal one of `shorter_side`.
        density: share of the positions that are computed, grid included, in [0, 1]: one number for
            all masks, or one per sampler by qualified name, as `record_sampling` names them,
            averaged over images. Default 1. The published sampled rows (164.8, 120.3, 94.4, 71.4)
            come from the densities of trained networks that are not published: they cannot be
            derived, only those of a uniform density.

    Returns:
        The counts for one image. `dense` is the source's without heads and interpolation: the
        published dense rows, whether or not the model is sampled.

    Raises:
        ValueError: no ResNet was found, a block has no convolutions to read (a frozen model), a
            density is missing or outside [0, 1], or the size is below 32 pixels.

    Source: the counter in the repository of Xie et al., ECCV 2020, arXiv 2003.08866 (Apache-2.0),
    for ResNet-50 and -101 in layout b. Basic blocks, groups, other layouts and partly sampled
    networks follow the same rules and are ours.
    """
    prefix, resnet = _find_resnet(model)
    _check_readable(join(prefix, "conv1"), resnet.conv1)
    counter = _Counter(density)
    if size is None:
        size = published_size(shorter_side)
    size = counter.convolution(join(prefix, "conv1"), resnet.conv1, size)
    size = _after(size, 2)  # max pooling
    for stage in _STAGES:
        for index, block in enumerate(getattr(resnet, stage)):
            size = counter.block(join(prefix, f"{stage}.{index}"), block, size)
    rows = counter.rows
    return MacCount(sum(row.total for row in rows), sum(row.dense for row in rows), rows)


def _find_resnet(model: nn.Module) -> tuple[str, Any]:
    for prefix in ("backbone.body", "backbone", ""):
        found: Any = model
        for part in filter(None, prefix.split(".")):
            found = getattr(found, part, None)
        if all(getattr(found, name, None) is not None for name in ("conv1", *_STAGES)):
            return prefix, found
    raise ValueError(
        f"count_published_macs: {type(model).__name__} holds no ResNet; conv1 and layer1 to layer4 "
        "are required, in the model itself, in .backbone or in .backbone.body; pass the module "
        "that has them."
    )


def _check_readable(name: str, conv: nn.Module) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(
            f"count_published_macs: {name} is a {type(conv).__name__}, whose convolutions cannot "
            "be read; a dense or converted residual network is required; pass the model before it "
            "was frozen."
        )


def _after(size: tuple[int, int], stride: int | tuple[int, int]) -> tuple[int, int]:
    """Output size behind a stride, of a layer that pads by half its kernel."""
    down, right = (stride, stride) if isinstance(stride, int) else stride
    return math.ceil(size[0] / down), math.ceil(size[1] / right)


class _Counter:
    """Rows of the layers that were counted so far."""

    def __init__(self, density: float | Mapping[str, float]) -> None:
        self.density = density
        self.rows: list[LayerMacs] = []

    def density_of(self, sampler: str) -> float:
        if isinstance(self.density, Mapping):
            if sampler not in self.density:
                raise ValueError(
                    f"count_published_macs: density has no entry for {sampler}; one per sampler is "
                    "required; pass the mean densities by the names of record_sampling(model)."
                )
            value = self.density[sampler]
        else:
            value = self.density
        if not 0 <= value <= 1:
            raise ValueError(
                f"count_published_macs: density is {value}; a share of positions in [0, 1] is "
                "required; pass 0.3 where 30 % are computed."
            )
        return value

    def convolution(
        self, name: str, conv: Any, size: tuple[int, int], density: float = 1.0, gated: bool = False
    ) -> tuple[int, int]:
        """Count a convolution and its offsets; return the size of its output."""
        size = _after(size, conv.stride)
        positions = size[0] * size[1]
        computed = round(positions * density)
        for part, module in ((name, conv), (join(name, "offset"), getattr(conv, "offset", None))):
            if module is not None:
                macs = convolution_macs(module, positions)
                self.rows.append(
                    LayerMacs(
                        part,
                        "Conv2d",
                        macs,
                        round(macs * density),
                        positions if gated else 0,
                        computed if gated else 0,
                    )
                )
        return size

    def block(self, name: str, block: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Count a residual block, sampled or dense; return the size of its output."""
        _check_readable(name, getattr(block, "conv1", block))
        if getattr(block, "downsample", None) is not None:
            self.convolution(join(name, "downsample.0"), block.downsample[0], size)
        if not hasattr(block, "samplers_named"):
            for i in range(1, 4):
                conv = getattr(block, f"conv{i}", None)
                if conv is not None:
                    size = self.convolution(join(name, f"conv{i}"), conv, size)
            return size
        samplers = block.samplers_named()
        parts = block.convolutions()
        last_of = {index: i for i, (_, _, _, index) in enumerate(parts)}
        seen: set[int] = set()
        for i, (child, conv, _, index) in enumerate(parts):
            sampler = join(name, samplers[index][0])
            density = self.density_of(sampler)
            size = self.convolution(join(name, child), conv, size, density, gated=True)
            positions = size[0] * size[1]
            if index not in seen:
                seen.add(index)
                head = getattr(samplers[index][1], "head", None)
                if head is not None:  # a fixed pattern has none
                    macs = convolution_macs(head, positions)
                    self.rows.append(LayerMacs(sampler, "Sampler", 0, macs))
            fill = block.interpolations[index]
            if i == last_of[index] and fill.window:
                expected = density * (1 - density)
                macs = round(fill.window**2 * conv.out_channels * positions * expected)
                holes = positions - round(positions * density)
                kind = type(fill).__name__
                row = LayerMacs(
                    join(name, f"interpolations.{index}"), kind, 0, macs, positions, holes
                )
                self.rows.append(row)
        return size
