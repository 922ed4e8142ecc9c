"""What a module that samples computes, from its masks: the same for converted and frozen models.

A module is read by what it offers, so that this room need not know who made it: `samplers_named()`,
and either `convolutions()` with `interpolations` (residual blocks) or the attributes of a
convolution with `interpolation`. A frozen block also lists, in `shortcut_convolutions()`, the dense
convolutions that run inside its operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsight.measure.multiply_adds import (
    convolution_macs,
    interpolation_macs,
    read_footprint,
)


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-adds of one layer for one input, the whole batch together.

    Attributes:
        name: qualified name of the module in the model; "" for products outside any module.
        kind: its class, e.g. "Conv2d", "Sampler", "RBFInterpolation".
        dense: MACs in the source network; 0 for what sampling adds (heads, interpolation).
        total: MACs that this input needed.
        positions: output positions that a mask decides on, over batch and calls; 0 for a layer
            without a mask.
        computed: how many of them were computed or, by an interpolation, filled.
    """

    name: str
    kind: str
    dense: int
    total: int
    positions: int = 0
    computed: int = 0

    @property
    def density(self) -> float:
        """Share of the positions computed (an interpolation: filled); 1 without a mask."""
        return self.computed / self.positions if self.positions else 1.0

    def __add__(self, other: "LayerMacs") -> "LayerMacs":
        """The row of two calls of the same layer."""
        return LayerMacs(
            self.name,
            self.kind,
            self.dense + other.dense,
            self.total + other.total,
            self.positions + other.positions,
            self.computed + other.computed,
        )


@dataclass(frozen=True)
class GatedConvolution:
    """One convolution of a sampling module, the mask of its output and what fills the holes.

    Attributes:
        name: relative to the module; "" if the module is the convolution.
        conv: anything with the attributes of `nn.Conv2d`; a deformable one also has `offset`, the
            convolution that makes its offsets, which runs at the same sites.
        mask: (B, 1, Ho, Wo) bool.
        interpolation_name: relative to the module.
        interpolation: anything with `window`; 0 fills nothing. One that only copies says so by
            `multiplies`, False.
    """

    name: str
    conv: Any
    mask: Tensor
    interpolation_name: str
    interpolation: Any


def owns_samplers(module: nn.Module) -> bool:
    """Whether a module decides where it computes."""
    return callable(getattr(module, "samplers_named", None))


def samplers_of(owner: Any) -> list[tuple[str, nn.Module]]:
    """Samplers of a module by relative name; the index of one is that of its mask."""
    return owner.samplers_named()


def convolution_modules(owner: Any) -> list[Any]:
    """The convolutions that the masks of a sampling module gate."""
    if not callable(getattr(owner, "convolutions", None)):
        return [owner]
    return [conv for _, conv, _, _ in owner.convolutions()]


def interpolation_modules(owner: Any) -> list[Any]:
    """What fills the holes in a sampling module."""
    if not callable(getattr(owner, "convolutions", None)):
        return [owner.interpolation]
    return list(owner.interpolations)


def shortcut_convolutions(owner: Any) -> list[tuple[str, Any]]:
    """Dense convolutions inside a frozen block's operator; none for a block that calls modules."""
    has_any = callable(getattr(owner, "shortcut_convolutions", None))
    return owner.shortcut_convolutions() if has_any else []


def gated_convolutions(owner: Any, masks: Sequence[Tensor]) -> list[GatedConvolution]:
    """Pair every gated convolution of a module with the mask of its output positions.

    A mask has the size of the first output that it gates; behind a further stride s (layout a),
    every s-th row and column of it is read.

    Args:
        owner: a module that owns samplers.
        masks: of one call, (B, 1, H, W) bool, in the order of `samplers_named()`.
    """
    if not callable(getattr(owner, "convolutions", None)):
        return [GatedConvolution("", owner, masks[0], "interpolation", owner.interpolation)]
    pairs = []
    steps: dict[int, tuple[int, int]] = {}  # of a mask: the strides behind the first that it gates
    for name, conv, _, index in owner.convolutions():
        if index in steps:
            steps[index] = steps[index][0] * conv.stride[0], steps[index][1] * conv.stride[1]
        else:
            steps[index] = 1, 1
        mask = masks[index][..., :: steps[index][0], :: steps[index][1]]
        # A frozen convolution is its own and only part, without a name: as before it was frozen.
        filler = f"interpolations.{index}" if name else "interpolation"
        pairs.append(GatedConvolution(name, conv, mask, filler, owner.interpolations[index]))
    return pairs


def sampled_layers(prefix: str, owner: Any, masks: Sequence[Tensor]) -> list[LayerMacs]:
    """Rows of one call of a sampling module, but for its samplers.

    Args:
        prefix: qualified name of the module.
        owner: the module.
        masks: as for `gated_convolutions`.
    """
    rows = []
    pairs = gated_convolutions(owner, masks)
    following: list[GatedConvolution | None] = [*pairs[1:], None]
    for pair, after in zip(pairs, following, strict=True):
        sites, positions = int(pair.mask.sum()), pair.mask.numel()
        dense, total = convolution_macs(pair.conv, positions), convolution_macs(pair.conv, sites)
        name = join(prefix, pair.name)
        rows.append(LayerMacs(name, "Conv2d", dense, total, positions, sites))
        offset = getattr(pair.conv, "offset", None)
        if offset is not None:
            dense, total = convolution_macs(offset, positions), convolution_macs(offset, sites)
            rows.append(LayerMacs(join(name, "offset"), "Conv2d", dense, total, positions, sites))
        fill = _interpolation_row(prefix, pair, after)
        if fill.total:
            rows.append(fill)
    for name, conv in shortcut_convolutions(owner):
        # The shortcut ends at the size at which the residual branch ends.
        macs = convolution_macs(conv, pairs[-1].mask.numel())
        rows.append(LayerMacs(join(prefix, name), "Conv2d", macs, macs))
    return rows


def _interpolation_row(
    prefix: str, pair: GatedConvolution, after: GatedConvolution | None
) -> LayerMacs:
    """Cost of filling the holes behind one convolution, as far as anyone reads them."""
    holes = pair.mask.logical_not()
    # A deformable convolution may look anywhere: every hole before it is filled.
    if after is not None and getattr(after.conv, "offset", None) is None:
        # A 1x1 convolution on the same sites reads no hole: nothing is filled between the two.
        holes = holes & read_footprint(after.mask, after.conv, *pair.mask.shape[-2:])
    window = pair.interpolation.window if getattr(pair.interpolation, "multiplies", True) else 0
    macs = interpolation_macs(pair.mask, holes, window, pair.conv.out_channels) if window else 0
    kind = type(pair.interpolation).__name__
    name = join(prefix, pair.interpolation_name)
    return LayerMacs(name, kind, 0, macs, holes.numel(), int(holes.sum()))


def join(prefix: str, name: str) -> str:
    """Qualified name of a child; the parent's where the child has none."""
    return ".".join(part for part in (prefix, name) if part)
