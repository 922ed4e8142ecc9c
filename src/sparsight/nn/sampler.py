"""From features to a decision: which positions of a map are worth computing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparsight.nn.noise import (
    TILE_SIZE,
    NoiseKind,
    blue_noise_ranks,
    sampling_noise,
    training_noise,
)

__all__ = ["Sampler", "SamplingDecision"]

# Without noise, relaxed masks below this are exactly 0, see `Sampler`.
_LEAST_RELAXED = 1e-3
_LEAST_LOGIT = math.log(_LEAST_RELAXED / (1 - _LEAST_RELAXED))


@dataclass(frozen=True)
class SamplingDecision:
    """What a sampler decided for one map.

    Attributes:
        mask: (B, 1, Ho, Wo) bool; True where features are computed.
        probability: (B, 1, Ho, Wo) float32 in [0, 1]; sigmoid of the logits, before noise and grid.
            Carries the gradient of the sampling loss.
        relaxed: (B, 1, Ho, Wo) float32 in [0, 1] in training mode, 1 on the grid: the mask that
            task gradients flow through. None in eval mode. Of a gate, in both modes: the factor,
            not negative, that what is computed is multiplied by.
    """

    mask: Bool[Tensor, "B 1 Ho Wo"]
    probability: Float[Tensor, "B 1 Ho Wo"]
    relaxed: Float[Tensor, "B 1 Ho Wo"] | None

    @property
    def weights(self) -> Tensor:
        """The mask to interpolate with: `relaxed` where there is one, else `mask`."""
        return self.mask if self.relaxed is None else self.relaxed


# A pytree node, so that torch.export and torch.compile can return a decision.
torch.export.register_dataclass(
    SamplingDecision, serialized_type_name="sparsight.nn.SamplingDecision"
)


class Sampler(nn.Module):
    """A 3x3 convolution to one logit, and the draw of a mask from it.

    In eval mode the mask is ``logit + noise >= 0`` with counter-based noise: the same image always
    gets the same mask. In training mode the noise comes from torch's global generator and the
    decision also holds the relaxed mask ``sigmoid((logit + noise) / temperature)``. In both, the
    positions of the grid are added to the mask.

    Attributes:
        head: the convolution, weight 0 and bias `bias` at first.
        temperature: of the relaxed mask, > 0; 1.0 at first. Set it from outside, as a function of
            the step; forward never changes it. The hard mask does not depend on it.
        layer: index of this sampler in the model; the noise depends on it. `sparsify` sets it.

    Args:
        in_channels: channels C of the features.
        stride: of the convolution that the mask gates, so that the mask has its output's size.
        noise: "white" (the paper), "blue" (same marginal, evenly spread) or "none" (a threshold).
            Without noise whole regions lie below the threshold, and relaxed masks of 1e-10 would
            fill their holes in training from the very features that inference does not compute,
            as the weights of an interpolation are relative: there, relaxed masks below 1e-3 are 0.
        grid_stride: every position with y and x divisible by it is computed, whatever the logits
            say. Default 11, the paper's. None for no grid.
        bias: of the head; the initial probability is sigmoid(bias), 0.953 for the paper's 3.0.
        seed: of the noise at inference.
        straight_through: make the relaxed mask's value hard (0 or 1) and keep its soft gradient.
            Default False, as published. With a narrow interpolation its gradients explode: where
            the mask is exactly 0, dI/dM of a hole is 1 / (weight of the sites it sees), for
            `RBFInterpolation` of width 3 and a nearest site at distance 2 already e^18, and the
            kernel only bounds it at 2^80. Prefer the relaxed masks, or pass eps (1e-5) to the
            interpolation, which bounds it at about 1 / eps.
        device: of the head.
        dtype: of the head.

    Cost: 9 * C multiply-adds per position of the mask.

    Example:
        >>> sampler = Sampler(8, grid_stride=None).eval()
        >>> decision = sampler(torch.randn(1, 8, 5, 7))
        >>> decision.mask.shape, decision.relaxed
        (torch.Size([1, 1, 5, 7]), None)

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, section 3.2. We depart from it thus: one logit
    and logistic noise replace the two-class Gumbel-softmax (equal in distribution, without the
    1e-8 inside its logarithms); the temperature does not decay inside forward; the mask at
    inference is hard, where the published code keeps soft values above one half.
    """

    temperature: float
    layer: int
    ranks: Tensor | None

    def __init__(
        self,
        in_channels: int,
        *,
        stride: int | tuple[int, int] = 1,
        noise: NoiseKind = "white",
        grid_stride: int | None = 11,
        bias: float = 3.0,
        seed: int = 0,
        straight_through: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if noise not in ("white", "blue", "none"):
            raise ValueError(
                f"Sampler: noise is {noise!r}, but must be 'white', 'blue' or 'none'; "
                "pass noise='white' for the paper's setting."
            )
        if grid_stride is not None and grid_stride < 1:
            raise ValueError(
                f"Sampler: grid_stride is {grid_stride}, but must be at least 1; "
                "pass None for no grid."
            )
        self.head = nn.Conv2d(
            in_channels, 1, 3, stride=stride, padding=1, device=device, dtype=dtype
        )
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, bias)
        self.noise: NoiseKind = noise
        self.grid_stride = grid_stride
        self.seed = seed
        self.straight_through = straight_through
        self.temperature = 1.0
        self.layer = 0
        # Left, right, top, bottom: what is added to (or, negative, cut from) the features' border
        # before the head, see `align_to`. None: the head's own padding suffices.
        self.border: tuple[int, int, int, int] | None = None
        ranks = blue_noise_ranks(TILE_SIZE).to(device) if noise == "blue" else None
        self.register_buffer("ranks", ranks, persistent=False)

    @property
    def level(self) -> Tensor:
        """What moves the density as a whole: the head's bias, in logits."""
        assert self.head.bias is not None
        return self.head.bias

    def extra_repr(self) -> str:
        """The settings, for repr."""
        parts = [f"noise={self.noise!r}", f"grid_stride={self.grid_stride}", f"seed={self.seed}"]
        if self.straight_through:
            parts.append("straight_through=True")
        return ", ".join([*parts, f"layer={self.layer}"])

    def align_to(self, conv: nn.Conv2d) -> None:
        """Make the mask fit the output of `conv`, whatever its kernel, padding and dilation.

        The head is a 3x3 convolution; with padding 1 its output has the size of any convolution
        of the same stride whose padding is half its (dilated) kernel less one. For the others the
        head's border is changed so that size and centres agree: logit (i, j) is centred on the
        features that output (i, j) of `conv` is centred on, half a pixel off at most, which is
        where an even kernel has its centre.

        Args:
            conv: the gated convolution; its stride must be this sampler's.

        Raises:
            ValueError: if the strides differ.
        """
        if tuple(conv.stride) != tuple(self.head.stride):
            raise ValueError(
                f"Sampler.align_to: the convolution has stride {tuple(conv.stride)} and the head "
                f"{tuple(self.head.stride)}, but they must agree; "
                f"build the sampler with stride={tuple(conv.stride)}."
            )
        pads = []
        for axis in (0, 1):
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            if conv.padding == "same":
                total = reach
            elif conv.padding == "valid":
                total = 0
            else:
                total = 2 * int(conv.padding[axis])
            # A head of reach 2 with this total padding has the output size of `conv`.
            total = total + 2 - reach
            pads.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = pads
        if top == bottom >= 0 and left == right >= 0:
            self.head.padding = (top, left)
            self.border = None
        else:
            self.head.padding = (0, 0)
            self.border = (left, right, top, bottom)

    def forward(
        self, x: Float[Tensor, "B C H W"], logits: Float[Tensor, "B 1 Ho Wo"] | None = None
    ) -> SamplingDecision:
        """Decide which positions to compute.

        Args:
            x: (B, C, H, W) float, the input of the gated layer; any memory format, down to 1x1.
            logits: what the head makes of `x`, where the caller has it already, see `join_heads`.

        Returns:
            The decision, at the output resolution of the gated layer.

        Raises:
            TypeError: if `x` is not a float tensor of the head's dtype (autocast excepted).
            ValueError: if rank, channels or device are wrong, if the temperature is not positive in
                training, or, on the CPU in eager mode, if the logits hold NaN. Elsewhere looking
                for NaN would wait for the device: there a NaN counts as sampled.

        Gradient: of `relaxed` and `probability` to `x` and the head.
        """
        self._check(x)
        if logits is not None:
            return self.decide(logits)
        if self.border is not None:
            x = nn.functional.pad(x, self.border)
        return self.decide(self.head(x))

    def decide(self, logits: Float[Tensor, "B 1 Ho Wo"]) -> SamplingDecision:
        """Draw the mask of given logits: `forward` without the head.

        Args:
            logits: (B, 1, Ho, Wo) float, unbounded; computed with in float32.

        Returns:
            The decision, at the logits' resolution.

        Raises:
            ValueError: as for `forward`.
        """
        if logits.ndim != 4 or logits.shape[1] != 1:
            raise ValueError(
                f"Sampler: logits have shape {tuple(logits.shape)}, but (B, 1, height, width) is "
                "needed; give one logit per position."
            )
        logits = logits.float()
        batch, _, height, width = logits.shape
        device = logits.device
        if device.type == "cpu" and not torch.compiler.is_compiling():
            if bool(torch.isnan(logits).any()):
                raise ValueError(
                    f"Sampler (layer {self.layer}): the logits hold NaN, but must be numbers; the "
                    "features or the head's weights hold NaN or infinity: look for the first layer "
                    "whose output is not finite."
                )
        size = {"batch": batch, "height": height, "width": width, "device": device}
        if self.training:
            if not self.temperature > 0:
                raise ValueError(
                    f"Sampler (layer {self.layer}): temperature is {self.temperature}, but must be "
                    "positive; anneal it from 1.0 towards 0.03, not to 0."
                )
            noise = training_noise(self.noise, ranks=self.ranks, **size)
        else:
            noise = sampling_noise(
                self.noise, seed=self.seed, layer=self.layer, ranks=self.ranks, **size
            )
        perturbed = logits + noise
        # Not (perturbed >= 0): a NaN counts as sampled.
        mask = ~(perturbed < 0)
        scaled = perturbed / self.temperature if self.training else None
        if self.grid_stride is not None:
            rows = torch.arange(height, device=device) % self.grid_stride == 0
            columns = torch.arange(width, device=device) % self.grid_stride == 0
            grid = rows[:, None] & columns[None, :]
            mask = mask | grid
            if scaled is not None:
                # Before the sigmoid, which then keeps the one map that the fill keeps too.
                scaled = scaled.masked_fill(grid, torch.inf)
        if scaled is not None and self.noise == "none":
            scaled = scaled.masked_fill(scaled < _LEAST_LOGIT, -torch.inf)
        relaxed = None if scaled is None else torch.sigmoid(scaled)
        if relaxed is not None and self.straight_through:
            # The difference is exactly zero, so that the value is exactly 0 or 1.
            relaxed = mask.float() + (relaxed - relaxed.detach())
        return SamplingDecision(mask, torch.sigmoid(logits), relaxed)

    def _check(self, x: Tensor) -> None:
        weight = self.head.weight
        if x.ndim != 4:
            raise ValueError(
                f"Sampler (layer {self.layer}): features have shape {tuple(x.shape)}, but "
                "(B, C, height, width) is needed; add the batch dimension with x[None]."
            )
        if x.shape[1] != self.head.in_channels:
            raise ValueError(
                f"Sampler (layer {self.layer}): features have {x.shape[1]} channels, but the head "
                f"was built for {self.head.in_channels}; give it the input of the layer it gates."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"Sampler (layer {self.layer}): features have dtype {x.dtype}, but a float dtype "
                "is needed; convert images with x.float() / 255."
            )
        if x.device != weight.device:
            raise ValueError(
                f"Sampler (layer {self.layer}): features are on {x.device} and the head is on "
                f"{weight.device}, but they must share a device; move one with .to(device)."
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"Sampler (layer {self.layer}): features have dtype {x.dtype} and the head "
                f"{weight.dtype}, but they must agree; cast one of them, or use autocast."
            )


def join_heads(samplers: Sequence[nn.Module], x: Tensor) -> list[Tensor | None]:
    """Logits of several samplers from one convolution, for the step of training.

    A convolution to one channel reads its whole input for little work, forward and backward: two
    together take hardly longer than one.

    Args:
        samplers: that read the same features.
        x: (B, C, H, W) float, the features.

    Returns:
        By sampler its logits (B, 1, Ho, Wo), or None where there is nothing to join: a single
        sampler, one that is not plainly a :class:`Sampler` in training mode, whose head carries
        hooks, or whose stride no other has.
    """
    logits: list[Tensor | None] = [None] * len(samplers)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sampler in enumerate(samplers):
        if type(sampler) is not Sampler or not sampler.training or sampler.border is not None:
            continue
        head = sampler.head
        if type(head) is nn.Conv2d and not (head._forward_hooks or head._forward_pre_hooks):
            groups.setdefault((*head.stride, *map(int, head.padding)), []).append(i)
    for (down, right, *padding), members in groups.items():
        heads = [cast(Sampler, samplers[i]).head for i in members]
        if len(heads) == 1 or x.ndim != 4 or any(h.bias is None for h in heads):
            continue
        weight = torch.cat([head.weight for head in heads])
        bias = torch.cat([cast(Tensor, head.bias) for head in heads])
        joined = nn.functional.conv2d(x, weight, bias, (down, right), padding)
        for i, part in zip(members, joined.split(1, dim=1), strict=True):
            logits[i] = part
    return logits
