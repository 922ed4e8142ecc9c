"""Full-resolution residual networks: a pooling stream that recognises, a residual one that locates.

Letters in shapes: B batch, C channels, H W height and width in pixels, K number of classes, R width
of the residual stream, p scale (pixels per position) of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sparsight.nn.conv_pair import ConvPair
from sparsight.nn.merge_maps import MergeMaps

Unpooling = Literal["half_pixel", "theano"]

# (units, width over that of the stem) of each stage; encoder stages halve the resolution, decoder
# stages double it.
_ENCODER_A = ((3, 2), (4, 4), (2, 8), (2, 8))
_DECODER_A = ((2, 4), (2, 4), (2, 2))
_ENCODER_B = (*_ENCODER_A, (2, 8))
_DECODER_B = ((2, 4), *_DECODER_A)

_NORM_EPS = 1e-4  # Lasagne's default


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_NORM_EPS)


class FullResolutionUnit(nn.Module):
    """FRRU: reads both streams, replaces the pooling stream, adds to the residual stream.

    Args:
        in_channels: of the pooling stream that arrives.
        channels: of the pooling stream that leaves.
        residual_channels: R.

    Two 3x3 convolutions with norms and ReLUs make the new pooling stream; `sparsify` samples them
    as a residual block without a shortcut. The 1x1 convolution that sends it to the residual stream
    stays dense: sampling it would change nothing, because interpolation commutes with it, would
    save at most 2 % of the unit's multiply-adds, and filling what it makes costs a part of that.
    """

    def __init__(self, in_channels: int, channels: int, *, residual_channels: int) -> None:
        super().__init__()
        self.body = ConvPair(
            in_channels + residual_channels,
            channels,
            norm=_norm,
            has_shortcut=False,
            is_activated=True,
        )
        self.residual = nn.Conv2d(channels, residual_channels, 1)
        self.merge = MergeMaps("concatenate")

    def forward(self, pooling: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new pooling stream, and what is to be added to the residual stream.

        Args:
            pooling: (B, C, h, w), the pooling stream; of another size, it is resized bilinearly.
            residual: (B, R, h, w), the residual stream, max-pooled to the same size.

        Returns:
            (B, channels, h, w) and (B, R, h, w).
        """
        pooling = self.body(self.merge(pooling, residual))
        return pooling, self.residual(pooling)


class FRRN(nn.Module):
    """Per-pixel class logits from two streams. Build it with `frrn_a` or `frrn_b`.

    The published network keeps the residual stream z at full resolution, and each unit at scale p
    reads maxpool_p(z) and adds the p-fold nearest upsampling of its r. Here z is touched twice: its
    pooled versions are carried along instead, because what a unit adds is constant within each of
    the p x p pixels that are pooled::

        maxpool_p(z + up_p(r)) == maxpool_p(z) + r
        maxpool_2p(z) == maxpool_2(maxpool_p(z))

    The result is the same but for the order of the sums into z, without 17 (A) passes over a map of
    R channels at full resolution, which are not fewer where less is computed, and without keeping
    them for the gradient.

    Args:
        num_classes: number of classes K, at least 1.
        encoder: (units, width over `channels`) of each stage behind a 2x2 max pooling.
        decoder: the same, of each stage behind an unpooling; one stage less than the encoder.
        channels: width of the stem and of the full-resolution units.
        residual_channels: R.
        unpooling: see `frrn_a`.

    Attributes:
        stride: of the coarsest stage, in pixels; inputs are padded to a multiple of it.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        encoder: Sequence[tuple[int, int]],
        decoder: Sequence[tuple[int, int]],
        channels: int,
        residual_channels: int,
        unpooling: Unpooling,
    ) -> None:
        super().__init__()
        self.stride = 2 ** len(encoder)
        self.num_classes = num_classes
        self.unpooling: Unpooling = unpooling
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 5, padding=2, bias=False), _norm(channels), nn.ReLU()
        )
        self.entry = nn.Sequential(*(ConvPair(channels, channels, norm=_norm) for _ in range(3)))
        self.split = nn.Sequential(
            nn.Conv2d(channels, residual_channels, 1, bias=False), _norm(residual_channels)
        )
        width = channels
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for made, stages in ((self.encoder, encoder), (self.decoder, decoder)):
            for num_units, factor in stages:
                units = nn.ModuleList()
                for _ in range(num_units):
                    units.append(
                        FullResolutionUnit(
                            width, factor * channels, residual_channels=residual_channels
                        )
                    )
                    width = factor * channels
                made.append(units)
        self.exit = nn.Sequential(
            ConvPair(width + residual_channels, channels, norm=_norm),
            *(ConvPair(channels, channels, norm=_norm) for _ in range(2)),
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.merge = MergeMaps("concatenate")
        self.add = MergeMaps("sum", resizing="nearest")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return `{"out": logits}`, the contract of torchvision's segmentation models.

        Args:
            image: (B, 3, H, W), floating point; any H and W from 1. Where a side is no multiple of
                `stride`, its last row or column is repeated up to one, and the logits are cut.

        Returns:
            Logits (B, K, H, W), same dtype as the model computes in, before softmax.

        Raises:
            ValueError: an input without pixels or of another rank or number of channels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 1:
            raise ValueError(
                f"FRRN: the image has shape {tuple(image.shape)}, but (B, 3, H, W) with at least "
                "one pixel is required; add the batch dimension with image[None]."
            )
        height, width = image.shape[-2:]
        below, right = -height % self.stride, -width % self.stride
        if below or right:
            image = F.pad(image, (0, right, 0, below), mode="replicate")
        pooling = self.entry(self.stem(image))
        residual = self.split(pooling)

        pooled = residual
        scales: list[tuple[Tensor, Tensor]] = []
        for stage in self.encoder.children():
            pooling, pooled = F.max_pool2d(pooling, 2), F.max_pool2d(pooled, 2)
            pooling, pooled, added = _run(stage, pooling, pooled, None)
            scales.append((pooled, added))
        # `added` is what the residual stream got at this scale or coarser ones and what the pooled
        # versions at finer scales do not have yet.
        _, added = scales.pop()
        for stage in self.decoder.children():
            pooling = self._unpooled(pooling)
            pooled, finer = scales.pop()
            pooled, added = self.add(pooled, added), self.add(finer, added)
            pooling, _, added = _run(stage, pooling, pooled, added)
        merged = self.merge(self._unpooled(pooling), self.add(residual, added))
        logits = self.classifier(self.exit(merged))
        return {"out": logits[..., :height, :width]}

    def _unpooled(self, x: Tensor) -> Tensor:
        """The pooling stream for the next finer scale; on torch's grid, merging resizes it."""
        return x if self.unpooling == "half_pixel" else _unpool_as_theano(x)


def _run(
    stage: nn.Module, pooling: Tensor, pooled: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the units of a stage; also returns the pooled residual stream and what it was added."""
    for unit in stage.children():
        pooling, residual = unit(pooling, pooled)
        pooled = pooled + residual
        added = residual if added is None else added + residual
    assert added is not None
    return pooling, pooled, added


def _unpool_as_theano(x: Tensor) -> Tensor:
    """Double the resolution, bilinearly."""
    # out[2i] = x[i], out[2i + 1] = (x[i] + x[i + 1]) / 2, the last row and column repeated: with
    # one more of each, that is a grid from corner to corner.
    height, width = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    size = (2 * height + 1, 2 * width + 1)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return x[..., :-1, :-1]


def frrn_a(
    num_classes: int,
    *,
    channels: int = 48,
    residual_channels: int = 32,
    unpooling: Unpooling = "half_pixel",
) -> FRRN:
    """Return FRRN-A with random weights: 17.75 M parameters for 19 classes, scales 2 to 16.

    `sparsight.sparsify` samples the two 3x3 convolutions of each of its 17 two-stream units and of
    its 6 residual units at full resolution: 98 % of its multiply-adds.

    Args:
        num_classes: number of classes K, at least 1.
        channels: width of the stem and of the full-resolution units, 48 as published; stages have
            2, 4 and 8 times as many.
        residual_channels: width of the residual stream, 32 as published.
        unpooling: grid of the bilinear unpooling: "half_pixel" (default), torch's; "theano" is the
            grid of the published code, for weights that were trained with it.

    Returns:
        A module that maps (B, 3, H, W) to `{"out": (B, K, H, W)}`.

    Raises:
        ValueError: a count below 1, or an unknown unpooling.

    Example:
        >>> import torch
        >>> model = frrn_a(11, channels=8, residual_channels=4).eval()
        >>> model(torch.zeros(1, 3, 50, 70))["out"].shape
        torch.Size([1, 11, 50, 70])

    Source: Pohlen, Hermans, Mathias, Leibe, "Full-Resolution Residual Networks for Semantic
    Segmentation in Street Scenes", CVPR 2017, arXiv 1611.08323, table 1; He-uniform weights, norms'
    epsilon and the norm behind the split as in the authors' code (github.com/TobyPDE/FRRN, of whose
    text nothing is used). We depart in three things: any size is accepted, not only
    multiples of 16 (32 for B); unpooling is on torch's grid unless asked otherwise; and the sums
    into the residual stream are taken in another order, see `FRRN`.
    """
    return _frrn("frrn_a", num_classes, channels, residual_channels, unpooling)


def frrn_b(
    num_classes: int,
    *,
    channels: int = 48,
    residual_channels: int = 32,
    unpooling: Unpooling = "half_pixel",
) -> FRRN:
    """Return FRRN-B with random weights: 24.76 M parameters for 19 classes, scales 2 to 32.

    FRRN-A with one more scale, for inputs of twice the size: published for Cityscapes at 512x1024,
    where A takes 256x512.

    Args:
        num_classes: number of classes K, at least 1.
        channels: as for `frrn_a`.
        residual_channels: as for `frrn_a`.
        unpooling: as for `frrn_a`.

    Returns:
        A module that maps (B, 3, H, W) to `{"out": (B, K, H, W)}`.

    Raises:
        ValueError: a count below 1, or an unknown unpooling.

    Source: as `frrn_a`.
    """
    return _frrn("frrn_b", num_classes, channels, residual_channels, unpooling)


def _frrn(
    name: Literal["frrn_a", "frrn_b"],
    num_classes: int,
    channels: int,
    residual_channels: int,
    unpooling: Unpooling,
) -> FRRN:
    counts = {
        "num_classes": num_classes,
        "channels": channels,
        "residual_channels": residual_channels,
    }
    for argument, value in counts.items():
        if value < 1:
            raise ValueError(
                f"{name}: {argument}={value}; at least 1 is required; leave it out for the "
                "published width, and count classes without the ignored one."
            )
    if unpooling not in ("half_pixel", "theano"):
        raise ValueError(
            f"{name}: unpooling={unpooling!r}; 'half_pixel' or 'theano' is required; leave it out "
            "unless weights of the published code are to be used."
        )
    return FRRN(
        num_classes,
        encoder=_ENCODER_A if name == "frrn_a" else _ENCODER_B,
        decoder=_DECODER_A if name == "frrn_a" else _DECODER_B,
        channels=channels,
        residual_channels=residual_channels,
        unpooling=unpooling,
    )
