"""A residual block whose convolutions are computed where samplers say so."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.nn.conv_pair import ConvPair
from sparsight.nn.deform_conv import DeformableConv2d
from sparsight.nn.interpolation import (
    AveragePoolInterpolation,
    ConvInterpolation,
    RBFInterpolation,
)
from sparsight.nn.sampled_conv import check_gate, macs_per_position
from sparsight.nn.sampler import join_heads
from sparsight.ops.normalised_fill import normalised_fill

__all__ = ["Layout", "SampledBlock"]

Layout = Literal["a", "b", "c"]

# The decision that gates each convolution, by layout and number of convolutions. The first decision
# of a basic block in layout b gates what its 3x3 leaves for the second: there b and c are the same.
_DECISIONS: dict[tuple[str, int], tuple[int, ...]] = {
    ("a", 2): (0, 0),
    ("b", 2): (0, 1),
    ("c", 2): (0, 1),
    ("a", 3): (0, 0, 0),
    ("b", 3): (0, 1, 1),
    ("c", 3): (0, 1, 2),
}


# Interpolations that are `ops.interpolate` with a kernel of theirs, and nothing else.
_ONE_STEP = (RBFInterpolation, ConvInterpolation, AveragePoolInterpolation)


class SampledBlock(nn.Module):
    """A basic or bottleneck residual block, sampled and interpolated.

    All masks are decided from the block's input. With fill_i the interpolation over mask i, a
    bottleneck in layout b is::

        h   = fill_0(relu(bn1(conv1(x))))
        h   = relu(bn2(conv2(h)))
        out = relu(fill_1(bn3(conv3(h))) + shortcut(x))

    The fill of the residual branch comes after its last norm; a hole that sees no site adds zero to
    the shortcut. The shortcut stays dense. This module computes densely and applies masks
    afterwards: it is for training, and it defines the result. `sparsight.freeze` makes the version
    that skips the holes. With masks all true the block equals its source.

    A :class:`ConvPair` is sampled the same way, in its variant: without the shortcut, without the
    last ReLU, or with one before everything, whose result the masks are decided from.

    conv2 may be a :class:`DeformableConv2d`; a guided one makes its offsets of x, as published. It
    may look anywhere, so that every hole of h is filled before it.

    Attributes:
        samplers: ModuleList, one sampler per decision: 1 in layout a, 2 in b, 3 in c (2 for a basic
            block).
        interpolations: ModuleList, one module per decision.
        layout: "a", "b" or "c".
        has_shortcut: the input, or what `downsample` makes of it, is added to the branch.
        is_preactivated: a ReLU comes before the branch; the shortcut does without.
        is_activated: a ReLU comes last.

    The other children (conv1, bn1, conv2, bn2, conv3, bn3, relu, downsample) and `stride` are the
    source's, under its names, so that the state of the source loads.

    Args:
        block: residual block with the children and the forward of torchvision's `BasicBlock` or
            `Bottleneck`, a :class:`DeformableBlock` or a :class:`ConvPair`. Its children move
            here, they are not copied.
        layout: "a" shares one mask among all convolutions. "b" (default in `sparsify`, the paper's
            choice) has one for conv1 and one for the rest. "c" has one per convolution. In layout a
            the mask has the size of conv1's output; later convolutions of stride s read every s-th
            row and column of it.
        sampler: called as ``sampler(in_channels, stride=stride)`` for each decision.
        interpolation: a module, copied for each decision, or a callable that returns one.

    Raises:
        ValueError: if `layout` is unknown, or a gate (:class:`ReLUGate`) is paired with another
            interpolation than :class:`ZeroFill`.

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, section 3.4 and figure 4. The published code
    interpolates conv3's input. That is the same where the weights sum to one, and a quarter of the
    work, so we do it as well then (`interpolation.preserves_constants`) and set to zero what sees
    no site. Basic blocks are ours: theirs are not published.
    """

    conv1: nn.Conv2d
    relu: nn.Module
    downsample: nn.Module | None

    def __init__(
        self,
        block: nn.Module,
        *,
        layout: Layout = "b",
        sampler: Callable[..., nn.Module],
        interpolation: nn.Module | Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        if layout not in ("a", "b", "c"):
            raise ValueError(
                f"SampledBlock: layout is {layout!r}, but must be 'a', 'b' or 'c'; "
                "pass 'b' for the paper's choice."
            )
        num_convs = 3 if hasattr(block, "conv3") else 2
        for i in range(1, num_convs + 1):
            setattr(self, f"conv{i}", getattr(block, f"conv{i}"))
            setattr(self, f"bn{i}", getattr(block, f"bn{i}"))
        self.relu = cast(nn.Module, block.relu)
        self.downsample = cast("nn.Module | None", block.downsample)
        self.stride = block.stride
        self.layout: Layout = layout
        pair = block if isinstance(block, ConvPair) else None
        self.has_shortcut = pair is None or pair.has_shortcut
        self.is_preactivated = pair is not None and pair.is_preactivated
        self.is_activated = pair is None or pair.is_activated
        self._decision_of = _DECISIONS[layout, num_convs]

        convs = self._convs()
        # For every convolution, the steps at which it reads its decision's mask.
        self._mask_strides: list[tuple[int, int]] = []
        for i, decision in enumerate(self._decision_of):
            first = self._decision_of.index(decision)
            self._mask_strides.append(_total_stride(convs[first + 1 : i + 1]))
        samplers, interpolations = [], []
        for decision in range(max(self._decision_of) + 1):
            first = self._decision_of.index(decision)
            vertical, horizontal = _total_stride(convs[: first + 1])
            stride = vertical if vertical == horizontal else (vertical, horizontal)
            samplers.append(sampler(self.conv1.in_channels, stride=stride))
            if isinstance(interpolation, nn.Module):
                interpolations.append(copy.deepcopy(interpolation))
            else:
                interpolations.append(interpolation())
            check_gate("SampledBlock", samplers[-1], interpolations[-1])
        self.samplers = nn.ModuleList(samplers)
        self.interpolations = nn.ModuleList(interpolations)
        # Only these: the children keep their modes, norms in eval mode under a training block too.
        self.training = block.training
        self.samplers.train(block.training)
        self.interpolations.train(block.training)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O Ho Wo"]:
        """Compute the block.

        Args:
            x: (B, C, H, W) float, any memory format, down to 1x1.

        Returns:
            (B, O, Ho, Wo), as the source block.

        Raises:
            TypeError: as :meth:`Sampler.forward`.
            ValueError: as :meth:`Sampler.forward`.

        Gradient: to `x`, all parameters, and through the relaxed masks to the samplers.
        """
        read = x  # by the branch and the samplers
        if self.is_preactivated and isinstance(x, Tensor):
            read = torch.relu(x)
        masks = [
            (sampler(read) if logits is None else sampler(read, logits)).weights
            for sampler, logits in zip(self.samplers, self._joined_logits(read), strict=True)
        ]
        parts = self.convolutions()
        last = len(parts) - 1

        features = read
        for i, (_, conv, norm, _) in enumerate(parts[:last]):
            features = _convolve(conv, features, x)
            # What stays on sites for the last convolution is filled here where it may be.
            if self._stays_on_sites(i) and not self._fills_before_last():
                features = self.relu(norm(features))
            else:
                features = self._fill_normalised(i, features, norm, masks, activates=True)
        _, conv, norm, decision = parts[last]
        features = _convolve(conv, features, x)
        if self._fills_before_last():
            window = cast(int, self.interpolations[decision].window)
            seen = _sees_site(self._mask_of(last, masks), window)
            branch = torch.where(seen, norm(features), 0.0)
        else:
            branch = self._fill_normalised(last, features, norm, masks, activates=False)

        if self.has_shortcut:
            branch = branch + (x if self.downsample is None else self.downsample(x))
        return self.relu(branch) if self.is_activated else branch

    def _joined_logits(self, x: Tensor) -> list[Tensor | None]:
        """Logits that one convolution makes for several samplers, in training; None elsewhere."""
        if not self.training or x.ndim != 4 or x.shape[1] != self.conv1.in_channels:
            return [None] * len(self.samplers)
        return join_heads(list(self.samplers), x)

    def convolutions(self) -> list[tuple[str, nn.Conv2d, nn.Module, int]]:
        """Every convolution of the residual branch: (name, convolution, norm, decision index)."""
        return [
            (f"conv{i + 1}", conv, getattr(self, f"bn{i + 1}"), self._decision_of[i])
            for i, conv in enumerate(self._convs())
        ]

    def mask_strides(self) -> list[tuple[int, int]]:
        """For every convolution, the steps at which it reads its decision's mask.

        (1, 1) but for layout a with a stride after conv1, where one mask serves two resolutions.
        """
        return list(self._mask_strides)

    def samplers_named(self) -> list[tuple[str, nn.Module]]:
        """The samplers owned here, by relative name; the index in this list is the decision's."""
        return [(f"samplers.{i}", sampler) for i, sampler in enumerate(self.samplers)]

    def gated_macs(self, i: int, height: int, width: int) -> int:
        """Dense multiply-adds per image that decision `i` gates.

        Args:
            i: index of the decision.
            height: of the decision's mask.
            width: of the decision's mask.

        Returns:
            Sum over the convolutions it gates of output size times multiply-adds per position.

        Raises:
            IndexError: if there is no such decision.
        """
        if not 0 <= i < len(self.samplers):
            raise IndexError(
                f"SampledBlock.gated_macs: i is {i}, but layout {self.layout!r} has "
                f"{len(self.samplers)} decisions here; pass 0 to {len(self.samplers) - 1}."
            )
        total = 0
        convs_and_strides = zip(self._convs(), self._mask_strides, strict=True)
        for decision, (conv, (down, right)) in zip(
            self._decision_of, convs_and_strides, strict=True
        ):
            if decision == i:
                size = math.ceil(height / down) * math.ceil(width / right)
                total += size * macs_per_position(conv)
        return total

    def _convs(self) -> list[nn.Conv2d]:
        return [getattr(self, f"conv{i}") for i in range(1, len(self._decision_of) + 1)]

    def _mask_of(self, i: int, masks: list[Tensor]) -> Tensor:
        down, right = self._mask_strides[i]
        mask = masks[self._decision_of[i]]
        return mask if down == right == 1 else mask[..., ::down, ::right]

    def _fill_normalised(
        self, i: int, features: Tensor, norm: Any, masks: list[Tensor], *, activates: bool
    ) -> Tensor:
        """Normalise what convolution i made, activate it or not, and fill what it left out."""
        interpolation: Any = self.interpolations[self._decision_of[i]]
        mask = self._mask_of(i, masks)
        if not self._is_one_step(norm, interpolation, mask, activates):
            features = norm(features)
            return interpolation(self.relu(features) if activates else features, mask)
        if norm.training:
            norm.num_batches_tracked.add_(1)
        return normalised_fill(
            features,
            mask,
            interpolation.log_kernel(),
            weight=norm.weight,
            bias=norm.bias,
            running_mean=norm.running_mean,
            running_var=norm.running_var,
            training=norm.training,
            momentum=norm.momentum,
            norm_eps=norm.eps,
            relu=activates,
            eps=interpolation.eps,
        )

    def _is_one_step(
        self, norm: Any, interpolation: nn.Module, mask: Tensor, activates: bool
    ) -> bool:
        """Whether norm, activation and fill may be one step of training, which keeps less.

        Of modules that are plainly what they seem, and that nobody watches.
        """
        if mask.dtype == torch.bool or torch.compiler.is_compiling():
            return False
        watched = [norm, interpolation, *([self.relu] if activates else [])]
        return (
            type(norm) is nn.BatchNorm2d
            and norm.affine
            and norm.track_running_stats
            and norm.momentum is not None
            and type(interpolation) in _ONE_STEP
            and (not activates or type(self.relu) is nn.ReLU)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in watched)
            and not any(m._backward_hooks or m._backward_pre_hooks for m in watched)
        )

    def _stays_on_sites(self, i: int) -> bool:
        """Whether convolution i + 1 reads convolution i's output at its own sites only."""
        return i == 1 and self._decision_of[1] == self._decision_of[2]

    def _fills_before_last(self) -> bool:
        """Whether conv3's input may be filled in place of its output."""
        last = len(self._decision_of) - 1
        interpolation = self.interpolations[self._decision_of[last]]
        commutes = getattr(interpolation, "preserves_constants", False)
        return self._stays_on_sites(last - 1) and commutes

    def extra_repr(self) -> str:
        """The layout, and what is not as in a ResNet's block, for repr."""
        differs = [
            name
            for name, value in (
                ("has_shortcut=False", not self.has_shortcut),
                ("is_preactivated=True", self.is_preactivated),
                ("is_activated=False", not self.is_activated),
            )
            if value
        ]
        return ", ".join([f"layout={self.layout!r}", *differs])


def _convolve(conv: nn.Conv2d, features: Tensor, block_input: Tensor) -> Tensor:
    """A convolution of the branch; one whose taps move as the block's input says is given it."""
    if isinstance(conv, DeformableConv2d) and conv.is_guided:
        return conv(features, block_input)
    return conv(features)


def _total_stride(convs: list[nn.Conv2d]) -> tuple[int, int]:
    return math.prod(conv.stride[0] for conv in convs), math.prod(conv.stride[1] for conv in convs)


def _sees_site(mask: Tensor, window: int) -> Tensor:
    """Where the window around a position holds a site, for a bool or float (B, 1, H, W) mask."""
    is_site = mask if mask.dtype == torch.bool else mask > 0
    return F.max_pool2d(is_site.float(), window, stride=1, padding=window // 2) > 0
