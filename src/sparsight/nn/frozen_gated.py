"""The inference form of layers whose gate scales what is computed: one operator call a stage."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.nn.deform_conv import DeformableConv2d
from sparsight.nn.frozen_block import fold_norm, refusal
from sparsight.nn.frozen_conv import check_features, padding_of
from sparsight.nn.sampled_block import SampledBlock
from sparsight.nn.sampled_conv import SampledConv2d
from sparsight.ops import block as block_ops

__all__ = ["FrozenGatedLayer", "is_gated", "refusal_of_gates"]


class FrozenGatedLayer(nn.Module):
    """A gated block or convolution for inference on the CPU.

    Every convolution runs at the positions whose gate is open, with packed weights and the norm
    folded in; the gates themselves stay the modules they are. Between the convolutions the map is
    multiplied by the gate, which a kernel that knows masks only does not do: one call a stage, and
    a pass over the map after each.

    Attributes:
        samplers: copies of the source's gates.
        interpolations: the source's; zeros all.
        downsample: the dense shortcut, or None.
        stage0, spec0, ...: packed weights of each convolution and what describes them.
        dtype: what the convolutions compute in, torch.float32 or torch.bfloat16.

    Args:
        source: the layer to freeze; not changed.
        dtype: see attributes.

    Raises:
        ValueError: if the layer cannot be frozen; says why.
    """

    def __init__(
        self, source: SampledBlock | SampledConv2d, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        reason = refusal_of_gates(source)
        if reason is not None:
            raise ValueError(
                f"FrozenGatedLayer: the layer cannot be frozen because {reason}; keep it unfrozen."
            )
        self.dtype = dtype
        self.has_shortcut = isinstance(source, SampledBlock) and source.has_shortcut
        self.is_preactivated = isinstance(source, SampledBlock) and source.is_preactivated
        self.is_activated = isinstance(source, SampledBlock) and source.is_activated
        owned = source.samplers_named()
        self._sampler_names = [name for name, _ in owned]
        self.samplers = nn.ModuleList(copy.deepcopy(sampler) for _, sampler in owned)
        if isinstance(source, SampledBlock):
            named = [(name, conv, norm) for name, conv, norm, _ in source.convolutions()]
            self._decision_of = [decision for *_, decision in source.convolutions()]
            self._strides = source.mask_strides()
            fills: list[Any] = list(source.interpolations)
        else:
            named = [("", source, nn.Identity())]
            self._decision_of, self._strides = [0], [(1, 1)]
            fills = [source.interpolation]
        self.interpolations = nn.ModuleList(copy.deepcopy(fills))
        self._names = [name for name, *_ in named]
        self.shapes: list[block_ops.StageShape] = []
        hole = block_ops.MaskSpec(
            head_weight=None,
            head_bias=None,
            stride=(1, 1),
            grid_stride=0,
            parent=-1,
            log_kernel=None,
            eps=None,
        )
        for i, (_, conv, norm) in enumerate(named):
            weight, bias = fold_norm(conv.weight, conv.bias, norm)
            stage = block_ops.StageSpec(
                weight=weight,
                bias=bias,
                mask=0,
                # A gate is not negative: relu(g * y) is g * relu(y), and the kernel has it for
                # nothing.
                relu=i + 1 < len(named),
                stride=(conv.stride[0], conv.stride[1]),
                padding=padding_of(conv),
                dilation=(conv.dilation[0], conv.dilation[1]),
                groups=conv.groups,
            )
            params, spec = block_ops.pack_block([hole], [stage], relu=False, dtype=dtype)
            self.register_buffer(f"stage{i}", params)
            self.register_buffer(f"spec{i}", spec)
            self.shapes.append(block_ops.StageShape.of(stage))
        downsample = source.downsample if isinstance(source, SampledBlock) else None
        self.downsample: nn.Module | None = copy.deepcopy(downsample)
        self.settings = source.extra_repr()
        self.eval()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O Ho Wo"]:
        """Compute the layer.

        Args:
            x: (B, C, H, W) float32, or bfloat16 where that is computed in.

        Returns:
            (B, O, Ho, Wo) float32, channels-last.

        Raises:
            TypeError: `x` is of another dtype.
            ValueError: rank, channels or device are wrong.
            RuntimeError: a gradient is asked for.
        """
        check_features("FrozenGatedLayer", x, self.shapes[0].in_channels, self.dtype)
        read = x.relu() if self.is_preactivated else x
        decisions = [sampler(read.float()) for sampler in self.samplers]
        sizes = block_ops.block_sizes(self.shapes, (x.shape[2], x.shape[3]))
        features = read.to(self.dtype)
        last = len(self.shapes) - 1
        for i, (shape, size) in enumerate(zip(self.shapes, sizes, strict=True)):
            decision = decisions[self._decision_of[i]]
            down, right = self._strides[i]
            features, _, _ = block_ops.sampled_block(
                features,
                None,
                [None],
                [decision.mask[..., ::down, ::right].contiguous()],
                self.get_buffer(f"stage{i}"),
                self.get_buffer(f"spec{i}"),
                output_shape=(x.shape[0], shape.out_channels, *size),
                mask_positions=size[0] * size[1],
                output_dtype=torch.float32 if i == last else self.dtype,
            )
            if not self._is_pointwise_next(i):
                features = features.mul_(decision.relaxed[..., ::down, ::right])
        if self.has_shortcut:
            shortcut = x.float()
            if self.downsample is not None:
                shortcut = self.downsample(shortcut).float()
            features = features.add_(shortcut)
        return F.relu_(features) if self.is_activated else features

    def _is_pointwise_next(self, i: int) -> bool:
        """Whether conv3 reads convolution i at its own sites: one gate scales the two once."""
        return i == 1 and len(self.shapes) == 3 and self._decision_of[1] == self._decision_of[2]

    def samplers_named(self) -> list[tuple[str, nn.Module]]:
        """The gates, by relative name, as in the source."""
        return list(zip(self._sampler_names, self.samplers, strict=True))

    def convolutions(self) -> list[tuple[str, block_ops.StageShape, None, int]]:
        """As :meth:`SampledBlock.convolutions`: (name, shape, no norm, decision index)."""
        return [
            (name, shape, None, decision)
            for name, shape, decision in zip(
                self._names, self.shapes, self._decision_of, strict=True
            )
        ]

    def gated_macs(self, i: int, height: int, width: int) -> int:
        """Dense multiply-adds per image that decision `i`, of this size, gates."""
        return sum(
            -(-height // down) * -(-width // right) * shape.macs_per_position
            for shape, decision, (down, right) in zip(
                self.shapes, self._decision_of, self._strides, strict=True
            )
            if decision == i
        )

    def train(self, mode: bool = True) -> "FrozenGatedLayer":
        """Refuse training mode."""
        if mode:
            raise RuntimeError(
                "FrozenGatedLayer.train: the model is frozen, for inference only; train the "
                "converted model that it was made from, and freeze again."
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        """What was packed, for repr."""
        return ", ".join(filter(None, [self.settings, f"dtype={self.dtype}"]))


def is_gated(layer: nn.Module) -> bool:
    """Whether a sampled layer multiplies what it computes by what its samplers return."""
    if not isinstance(layer, SampledBlock | SampledConv2d):
        return False
    return any(getattr(sampler, "scales", False) for _, sampler in layer.samplers_named())


def refusal_of_gates(source: SampledBlock | SampledConv2d) -> str | None:
    """Why a gated layer cannot be frozen, or None when it can."""
    reason = refusal(source)
    if reason is not None:
        return reason
    if not all(getattr(sampler, "scales", False) for _, sampler in source.samplers_named()):
        return "some of its samplers are gates that scale and others are not"
    convs: list[nn.Conv2d] = [source] if isinstance(source, SampledConv2d) else []
    if isinstance(source, SampledBlock):
        convs = [conv for _, conv, _, _ in source.convolutions()]
    if any(isinstance(conv, DeformableConv2d) for conv in convs):
        return "it is gated and deformable at once"
    return None
