"""Fixed patterns of sites that no image changes: the sampler of perforated networks."""

import functools
import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparsight.nn.noise import sampling_noise
from sparsight.nn.sampler import SamplingDecision
from sparsight.ops.conv import output_size

__all__ = ["PerforatedSampler", "PerforationPattern", "perforation_mask"]

PerforationPattern = Literal["grid", "uniform"]


class PerforatedSampler(nn.Module):
    """A mask that depends on the size of the map only: the baseline that does not look.

    In the place of :class:`Sampler`, with :class:`NearestInterpolation`, it makes a perforated
    network; with another interpolation it isolates what adaptive sampling is worth. There is
    nothing to learn and no logit: the decision's probability is the mask itself, without gradient.

    Attributes:
        rate: share of the positions that is computed, in (0, 1]. (The source's code calls the same
            number rate; its text calls 1 - rate the perforation rate.) May be set at any time.
        layer: index of this sampler in the model; every layer has a pattern of its own. `sparsify`
            sets it.

    Args:
        in_channels: channels of the features; plays no part.
        stride: of the convolution that the mask gates, so that the mask has its output's size.
        rate: see attributes; default 0.5.
        pattern: "grid" (default, which the source uses for VGG) keeps whole rows and columns,
            spread evenly from a random start; "uniform" keeps positions drawn at random.
        seed: of the pattern.

    Cost: none; the pattern of a map size is kept.

    Example:
        >>> sampler = PerforatedSampler(8, rate=0.25)
        >>> int(sampler(torch.randn(1, 8, 20, 20)).mask.sum())
        100

    Source: Figurnov, Ibraimova, Vetrov, Kohli, "PerforatedCNNs", NIPS 2016, arXiv 1504.08362,
    section 3.2, and their MATLAB code. We depart from it thus: maps need not be square, so that
    each side has its own number of rows; all layers share one rate, where theirs are found layer by
    layer; impact and pooling-structure patterns, which need data or the layer behind, are not
    there.
    """

    layer: int

    def __init__(
        self,
        in_channels: int,
        *,
        stride: int | tuple[int, int] = 1,
        rate: float = 0.5,
        pattern: PerforationPattern = "grid",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pattern not in ("grid", "uniform"):
            raise ValueError(
                f"PerforatedSampler: pattern is {pattern!r}, but must be 'grid' or 'uniform'; "
                "pass 'grid' for regular rows and columns."
            )
        _check_rate(rate)
        self.in_channels = in_channels
        self.rate = rate
        self.pattern: PerforationPattern = pattern
        self.seed = seed
        self.layer = 0
        down, right = (stride, stride) if isinstance(stride, int) else stride
        # Kernel, stride, padding, dilation of what is gated: those of a 3x3 convolution fit every
        # one that is padded by half its kernel.
        self.geometry = ((3, 3), (down, right), (1, 1), (1, 1))

    def extra_repr(self) -> str:
        """The settings, for repr."""
        return f"rate={self.rate:.3g}, pattern={self.pattern!r}, seed={self.seed}"

    def align_to(self, conv: nn.Conv2d) -> None:
        """Give the mask the size of the output of `conv`, whatever its kernel and padding.

        Args:
            conv: the gated convolution.
        """
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same":
            # The size is kept, also by an even kernel, whose padding is uneven.
            self.geometry = ((1, 1), (1, 1), (0, 0), (1, 1))
            return
        given = (0, 0) if conv.padding == "valid" else conv.padding
        padding = int(given[0]), int(given[1])
        stride = conv.stride[0], conv.stride[1]
        self.geometry = ((reach[0] + 1, reach[1] + 1), stride, padding, (1, 1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> SamplingDecision:
        """The pattern for a map of this size.

        Args:
            x: (B, C, H, W), the input of the gated layer; only its size and device count.

        Returns:
            The decision, at the output resolution of the gated layer, the same for every image;
            `relaxed` is None in training mode too, as there is nothing to relax.

        Raises:
            ValueError: if the rank is wrong or `rate` was set outside (0, 1].
        """
        if x.ndim != 4:
            raise ValueError(
                f"PerforatedSampler (layer {self.layer}): features have shape {tuple(x.shape)}, "
                "but (B, C, height, width) is needed; add the batch dimension with x[None]."
            )
        _check_rate(self.rate)
        size = output_size((x.shape[2], x.shape[3]), *self.geometry)
        pattern = perforation_mask(
            self.pattern, rate=self.rate, size=size, seed=self.seed, layer=self.layer
        )
        mask = pattern.to(x.device).expand(x.shape[0], 1, *size)
        return SamplingDecision(mask, mask.float(), None)


@functools.lru_cache(maxsize=512)
def perforation_mask(
    pattern: PerforationPattern, *, rate: float, size: tuple[int, int], seed: int, layer: int
) -> Bool[Tensor, "H W"]:
    """The sites of a perforated layer, a pure function of the arguments; do not write to it.

    Args:
        pattern: see :class:`PerforatedSampler`.
        rate: share of the positions to keep, in (0, 1].
        size: (height, width) of the map.
        seed: of the draws.
        layer: index of the layer.

    Returns:
        (height, width) bool on the CPU: for "grid" the product of floor(sqrt(rate) * side) rows and
        as many columns, for "uniform" floor(rate * height * width) positions; one at least.
    """
    height, width = size
    if pattern == "uniform":
        noise = sampling_noise("white", seed=seed, layer=layer, batch=1, height=height, width=width)
        kept = max(1, math.floor(rate * height * width + 1e-9))
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[noise.flatten().topk(kept).indices] = True
        return mask.view(height, width)
    # Two uniform numbers, one a side: where each comb starts.
    starts = torch.sigmoid(
        sampling_noise("white", seed=seed, layer=layer, batch=1, height=1, width=2).flatten()
    )
    rows, columns = (
        _comb(side, rate, float(start)) for side, start in zip(size, starts, strict=True)
    )
    return rows[:, None] & columns[None, :]


def _comb(side: int, rate: float, start: float) -> Tensor:
    """Which rows are kept: the (i + start)-th fraction of the side, i from 0, as in the source."""
    kept = max(1, math.floor(math.sqrt(rate) * side + 1e-9))
    at = ((torch.arange(kept, dtype=torch.float64) + start) * (side / kept)).ceil().long() - 1
    rows = torch.zeros(side, dtype=torch.bool)
    rows[at.clamp(0, side - 1)] = True
    return rows


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(
            f"PerforatedSampler: rate is {rate}, but must be the share of positions to compute, in "
            "(0, 1]; pass for example 0.5."
        )
