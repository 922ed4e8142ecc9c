"""The inference form of sampled layers: packed weights, one operator call each."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.nn.deform_conv import DeformableConv2d
from sparsight.nn.frozen_conv import check_features, dtype_note, padding_of, refusal_of_conv
from sparsight.nn.frozen_sampler import ComputedEverywhere, FrozenSampler
from sparsight.nn.sampled_block import SampledBlock
from sparsight.nn.sampled_conv import SampledConv2d
from sparsight.nn.sampler import Sampler, SamplingDecision
from sparsight.ops import block as block_ops
from sparsight.ops import cpu

__all__ = ["Form", "FrozenBlock", "Measurement", "fold_norm", "refusal"]

Form = Literal["dense", "sampled"]


@dataclass(frozen=True)
class Measurement:
    """What a layer took in both forms when it was frozen.

    Attributes:
        dense_ms: milliseconds of all its calls for the example, every position computed.
        sampled_ms: the same, at its sampled positions only.
        density: share of its gated multiply-adds that its masks asked for then.
    """

    dense_ms: float
    sampled_ms: float
    density: float

    def __str__(self) -> str:
        return (
            f"dense: {self.dense_ms:.4g} ms, sampled: {self.sampled_ms:.4g} ms "
            f"at density {self.density:.2f}"
        )


class FrozenBlock(nn.Module):
    """A sampled block or convolution for inference on the CPU: one operator call.

    Made by :func:`sparsight.freeze` from a :class:`SampledBlock` or a :class:`SampledConv2d`, with
    the norms folded and the weights packed. Any batch and input size.

    A layer that is computed dense is the same operator call without heads, masks and interpolation:
    the source with its masks all true. `record_sampling` shows full masks of probability one for
    it, which is what it computes, and `count_macs` counts every position.

    Attributes:
        computed: "sampled", or "dense" where every position is computed.
        measured: what both forms took, where freezing measured it; else None.
        samplers: what `record_sampling` watches, in the order of the source's.
        interpolations: the source's, for repr and `measure`; the kernels read `params`.
        downsample: the dense shortcut, or None.
        params: packed weights, heads and interpolation kernels, flat float32 buffer.
        spec: flat int64 buffer that describes them.
        dtype: what is computed in, torch.float32 or torch.bfloat16 (with float32 sums).
        output_dtype: what is returned: torch.float32, or `dtype`. May be set.
        shortcut_dtype: what `downsample` is given: torch.float32 (default), or `dtype`. May be set.

    Args:
        source: the layer to freeze; not changed.
        dtype: see attributes.
        computed: "sampled" (default) or "dense".
    """

    params: Tensor
    spec: Tensor

    def __init__(
        self,
        source: SampledBlock | SampledConv2d,
        *,
        dtype: torch.dtype = torch.float32,
        computed: Form = "sampled",
    ) -> None:
        super().__init__()
        self.dtype, self.output_dtype = dtype, torch.float32
        self.shortcut_dtype = torch.float32
        self.computed: Form = computed
        self.measured: Measurement | None = None
        reason = refusal(source)
        if reason is not None:
            raise ValueError(
                f"FrozenBlock: the layer cannot be frozen because {reason}; keep it unfrozen."
            )
        self.has_shortcut = isinstance(source, SampledBlock) and source.has_shortcut
        self.is_preactivated = isinstance(source, SampledBlock) and source.is_preactivated
        is_activated = isinstance(source, SampledBlock) and source.is_activated
        owned = source.samplers_named()
        self._sampler_names = [name for name, _ in owned]
        samplers: list[Any] = [sampler for _, sampler in owned]
        if isinstance(source, SampledBlock):
            parts = [(conv, norm) for _, conv, norm, _ in source.convolutions()]
            decisions = [decision for *_, decision in source.convolutions()]
            strides = source.mask_strides()
            fills: list[Any] = list(source.interpolations)
        else:
            parts, decisions, strides = [(source, nn.Identity())], [0], [(1, 1)]
            fills = [source.interpolation]

        # A convolution without a sampler has a decision all the same: forward is given it.
        self._num_decisions = max(decisions) + 1
        # Masks are the decisions, then the coarser copies of them that layout a reads.
        self._decision_of_mask = list(range(self._num_decisions))
        masks: list[tuple[int, tuple[int, int]]] = [(-1, (1, 1))] * self._num_decisions
        mask_of_stage = []
        for decision, stride in zip(decisions, strides, strict=True):
            if stride == (1, 1):
                mask_of_stage.append(decision)
                continue
            if (decision, stride) not in masks:
                masks.append((decision, stride))
                self._decision_of_mask.append(decision)
            mask_of_stage.append(masks.index((decision, stride)))

        inside = [
            _head_is_inside(sampler, [c for c, _ in parts[: decisions.index(i) + 1]], dtype)
            for i, sampler in enumerate(samplers)
        ]
        mask_specs = []
        for i, (parent, stride) in enumerate(masks):
            decision = self._decision_of_mask[i]
            fill = fills[decision]
            has_head = parent < 0 and any(inside[decision : decision + 1])
            sampler = samplers[decision] if has_head else None
            head = None if sampler is None else sampler.head
            log_kernel = fill.log_kernel() if hasattr(fill, "log_kernel") else None
            mask_specs.append(
                block_ops.MaskSpec(
                    head_weight=None if head is None else head.weight,
                    head_bias=None if head is None else head.bias,
                    stride=stride if head is None else head.stride,
                    grid_stride=0 if sampler is None else sampler.grid_stride or 0,
                    parent=parent,
                    log_kernel=log_kernel,
                    eps=getattr(fill, "eps", None),
                )
            )
        stages = []
        for i, (conv, norm) in enumerate(parts):
            weight, bias = fold_norm(conv.weight, conv.bias, norm)
            stages.append(
                block_ops.StageSpec(
                    weight=weight,
                    bias=bias,
                    mask=mask_of_stage[i],
                    relu=i + 1 < len(parts),
                    stride=(conv.stride[0], conv.stride[1]),
                    padding=padding_of(conv),
                    dilation=(conv.dilation[0], conv.dilation[1]),
                    groups=conv.groups,
                    offset=_offset_of(conv),
                )
            )
        self.shapes = [block_ops.StageShape.of(stage) for stage in stages]
        self.windows = [0 if m.log_kernel is None else m.log_kernel.shape[0] for m in mask_specs]
        # Shapes keep their masks: what is dense still says which decision would have gated what.
        self._packed_masks = len(mask_specs)
        if computed == "dense":
            self._packed_masks = 0
            mask_specs, stages = [], [replace(stage, mask=-1) for stage in stages]
        params, spec = block_ops.pack_block(mask_specs, stages, relu=is_activated, dtype=dtype)
        self.register_buffer("params", params)
        self.register_buffer("spec", spec)
        self.samplers = nn.ModuleList(
            ComputedEverywhere() if computed == "dense" else FrozenSampler(sampler, inside=flag)
            for sampler, flag in zip(samplers, inside, strict=True)
        )
        self.interpolations = nn.ModuleList(copy.deepcopy(fills))
        self._conv_names = [""]
        if isinstance(source, SampledBlock):
            self._conv_names = [name for name, *_ in source.convolutions()]
        downsample = source.downsample if isinstance(source, SampledBlock) else None
        self.downsample: nn.Module | None = copy.deepcopy(downsample)
        self.settings = source.extra_repr()
        self.eval()

    def forward(
        self, x: Float[Tensor, "B C H W"], decision: SamplingDecision | None = None
    ) -> Float[Tensor, "B O Ho Wo"]:
        """Compute the layer.

        Args:
            x: (B, C, H, W) float32, or bfloat16 where that is computed in; channels-last of the
                same dtype is read in place, everything else is copied.
            decision: for a convolution only, a decision made elsewhere; needed where the source
                has no sampler, refused where the layer is computed dense.

        Returns:
            (B, O, Ho, Wo) channels-last, `output_dtype`.

        Raises:
            TypeError: `x` is of another dtype.
            ValueError: rank, channels, size or device are wrong, `x` holds NaN that reaches a
                head, there is neither a decision nor a sampler, or a decision for a dense layer.
            RuntimeError: a gradient is asked for.
        """
        check_features("FrozenBlock", x, self.shapes[0].in_channels, self.dtype)
        if self.computed == "dense" and decision is not None:
            raise ValueError(
                "FrozenBlock: a decision is passed, but this layer was frozen to compute every "
                "position and would not listen; call it without one, or freeze the model again "
                "with choose={its name: 'sampled'}."
            )
        batch, _, height, width = x.shape
        sizes = block_ops.block_sizes(self.shapes, (height, width))
        if min(sizes[-1]) < 1:
            raise ValueError(
                f"FrozenBlock: a {height}x{width} input is smaller than the kernel "
                f"{self.shapes[-1].kernel_size} with its padding; use a larger input."
            )
        mask_sizes = []
        for m in range(self._packed_masks):
            first = next(i for i, shape in enumerate(self.shapes) if shape.mask == m)
            mask_sizes.append(sizes[first])
        noise: list[Tensor | None] = []
        given: list[Tensor | None] = []
        elsewhere: list[SamplingDecision | None] = []
        for m, decision_index in enumerate(self._decision_of_mask[: self._packed_masks]):
            made, drawn = decision, None
            is_copy = m >= self._num_decisions
            if made is None and not is_copy:
                if not self.samplers:
                    raise ValueError(
                        "FrozenBlock: decision is None and the layer has no sampler, but one of "
                        "the two must say what to compute; pass decision=sampler(features)."
                    )
                sampler = self.samplers[decision_index]
                assert isinstance(sampler, FrozenSampler)
                if sampler.source is None:
                    drawn = sampler.noise(batch, *mask_sizes[m])
                else:
                    read = x.float()
                    made = sampler.source(read.relu() if self.is_preactivated else read)
            noise.append(drawn)
            elsewhere.append(made)
            given.append(None if made is None or is_copy else made.mask)
        for mask, size in zip(given, mask_sizes, strict=True):
            if mask is not None and mask.dtype != torch.bool:
                raise TypeError(
                    f"FrozenBlock: the decision's mask has dtype {mask.dtype}, but torch.bool is "
                    "needed; threshold it, for example mask >= 0.5."
                )
            if mask is not None and tuple(mask.shape) != (batch, 1, *size):
                raise ValueError(
                    f"FrozenBlock: the decision's mask has shape {tuple(mask.shape)}, but "
                    f"{(batch, 1, *size)} is needed; build the mask at output resolution."
                )
        features, shortcut = x.to(self.dtype), None
        if self.has_shortcut and self.downsample is None:
            shortcut = features
        elif self.has_shortcut:
            assert self.downsample is not None
            is_narrow = self.shortcut_dtype == self.dtype
            shortcut = self.downsample(features if is_narrow else x.float())
            shortcut = shortcut.to(self.dtype)
        if self.is_preactivated:
            features = features.relu()
        out, masks, logits = block_ops.sampled_block(
            features,
            shortcut,
            noise,
            given,
            self.params,
            self.spec,
            output_shape=(batch, self.shapes[-1].out_channels, *sizes[-1]),
            mask_positions=sum(h * w for h, w in mask_sizes),
            output_dtype=self.output_dtype,
        )
        if self.computed == "dense":
            self._show_everywhere(batch, sizes)
        else:
            self._show(masks, logits, elsewhere, mask_sizes)
        return out

    def _show(
        self,
        masks: Tensor,
        logits: Tensor,
        elsewhere: Sequence[SamplingDecision | None],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Pass the decisions through the samplers that are being watched."""
        at = 0
        for i, (height, width) in enumerate(sizes[: len(self.samplers)]):
            end = at + height * width
            sampler, made = self.samplers[i], elsewhere[i]
            if sampler._forward_hooks:
                mask = masks[:, at:end].view(-1, 1, height, width)
                logit = logits[:, at:end].view(-1, 1, height, width)
                sampler(mask, torch.sigmoid(logit) if made is None else made.probability)
            at = end

    def _show_everywhere(self, batch: int, sizes: Sequence[tuple[int, int]]) -> None:
        """Pass full masks through the samplers that are being watched."""
        for i, sampler in enumerate(self.samplers):
            if sampler._forward_hooks:
                size = (batch, 1, *sizes[self._decision_index_first(i)])
                sampler(torch.ones(size, dtype=torch.bool), torch.ones(size))

    def samplers_named(self) -> list[tuple[str, nn.Module]]:
        """The decisions' names relative to this module, as in the source, and what shows them."""
        return list(zip(self._sampler_names, self.samplers, strict=True))

    def convolutions(self) -> list[tuple[str, block_ops.StageShape, None, int]]:
        """As :meth:`SampledBlock.convolutions`: (name, shape, no norm, decision index).

        The name is empty for a single convolution, which is this module itself.
        """
        return [
            (name, shape, None, self._decision_of_mask[shape.mask])
            for name, shape in zip(self._conv_names, self.shapes, strict=True)
        ]

    def gated_macs(self, i: int, height: int, width: int) -> int:
        """Dense multiply-adds per image that decision `i`, of this size, gates."""
        total = 0
        for shape in self.shapes:
            if self._decision_of_mask[shape.mask] != i:
                continue
            down = 1, 1
            if shape.mask >= self._num_decisions:
                # A coarser copy: its size follows from the stages between.
                first = next(k for k, s in enumerate(self.shapes) if s.mask == shape.mask)
                between = [
                    s.stride
                    for k, s in enumerate(self.shapes)
                    if self._decision_index_first(i) < k <= first
                ]
                down = _product(between)
            size = -(-height // down[0]) * -(-width // down[1])
            total += size * shape.macs_per_position
        return total

    def _decision_index_first(self, i: int) -> int:
        return next(k for k, s in enumerate(self.shapes) if self._decision_of_mask[s.mask] == i)

    def train(self, mode: bool = True) -> "FrozenBlock":
        """Refuse training mode."""
        if mode:
            raise RuntimeError(
                "FrozenBlock.train: the model is frozen, for inference only; train the converted "
                "model that it was made from, and freeze again."
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        """What was packed, for repr."""
        form = "" if self.computed == "sampled" else f"computed={self.computed}"
        if self.measured is not None:
            form = f"computed={self.computed} ({self.measured})"
        settings = ", ".join(filter(None, [self.settings, f"params={self.params.numel()}", form]))
        return settings + dtype_note(self.dtype, self.output_dtype)


def refusal(source: SampledBlock | SampledConv2d) -> str | None:
    """Why a layer cannot be frozen, or None when it can."""
    convs = (
        [conv for _, conv, _, _ in source.convolutions()]
        if isinstance(source, SampledBlock)
        else [source]
    )
    fills = (
        list(source.interpolations) if isinstance(source, SampledBlock) else [source.interpolation]
    )
    for conv in convs:
        reason = refusal_of_conv(conv)
        if reason is not None:
            return reason
        if isinstance(conv, DeformableConv2d):
            reason = _refusal_of_offsets(conv)
            if reason is not None:
                return reason
    if isinstance(source, SampledBlock):
        for i, conv in enumerate(convs):
            is_guided = isinstance(conv, DeformableConv2d) and conv.is_guided
            if is_guided and _product([before.stride for before in convs[:i]]) != (1, 1):
                return (
                    "a stride comes before a deformable convolution whose offsets are made of the "
                    "block's input"
                )
        if type(source.relu) is not nn.ReLU:
            return f"its activation is {type(source.relu).__name__} and the kernels know ReLU"
        for _, _, norm, _ in source.convolutions():
            statistics = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
            folds = all(isinstance(value, Tensor) for value in statistics)
            if not folds and not isinstance(norm, nn.Identity):
                return f"its norm {type(norm).__name__} has no running statistics to fold"
    for fill in fills:
        known = hasattr(fill, "log_kernel") or type(fill).__name__ == "ZeroFill"
        if not known:
            return f"its interpolation {type(fill).__name__} has no log_kernel()"
        if getattr(fill, "window", 0) > cpu.MAX_WINDOW:
            return f"its interpolation window exceeds {cpu.MAX_WINDOW}"
    return None


def _offset_of(conv: nn.Conv2d) -> block_ops.OffsetSpec | None:
    """What moves the taps of a convolution; None for a plain one."""
    if not isinstance(conv, DeformableConv2d):
        return None
    bias = conv.offset.bias
    weight = conv.offset.weight.detach()
    return block_ops.OffsetSpec(
        weight=weight,
        bias=weight.new_zeros(weight.shape[0]) if bias is None else bias.detach(),
        groups=conv.offset_groups,
        is_modulated=conv.is_modulated,
        is_guided=conv.is_guided,
    )


def _refusal_of_offsets(conv: DeformableConv2d) -> str | None:
    """Why what moves the taps cannot be packed, or None when it can."""
    offset = conv.offset
    if type(offset) is not nn.Conv2d:
        return f"its offsets are made by a {type(offset).__name__} and the kernels know Conv2d"
    names = ("kernel_size", "stride", "padding", "dilation")
    if any(getattr(offset, name) != getattr(conv, name) for name in names) or offset.groups != 1:
        return "the convolution that makes its offsets has other numbers than the one that moves"
    reason = refusal_of_conv(offset)
    return None if reason is None else f"{reason} (the convolution that makes its offsets)"


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch norm after it folded in.

    Args:
        weight: (O, C/groups, kh, kw).
        bias: (O,) or None.
        norm: BatchNorm2d or torchvision's FrozenBatchNorm2d, used with its running statistics, or
            Identity.

    Returns:
        The folded weight and bias, computed in float64 and rounded once.
    """
    with torch.no_grad():
        offset = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
        if bias is not None:
            offset = bias.double()
        if isinstance(norm, nn.Identity):
            return weight.detach().clone(), offset.to(weight.dtype)
        stats: Any = norm
        mean, variance = stats.running_mean.double(), stats.running_var.double()
        scale = (variance + stats.eps).rsqrt()
        if stats.weight is not None:
            scale = scale * stats.weight.double()
        shift = (offset - mean) * scale
        if stats.bias is not None:
            shift = shift + stats.bias.double()
        folded = weight.double() * scale.view(-1, 1, 1, 1)
        return folded.to(weight.dtype), shift.to(weight.dtype)


def _head_is_inside(sampler: nn.Module, convs: Sequence[nn.Conv2d], dtype: torch.dtype) -> bool:
    """Whether the kernel can evaluate the head: the published one, on the block's own input."""
    if type(sampler) is not Sampler or sampler.border is not None:
        return False
    head = sampler.head
    # The heads' kernel has no last channel without a partner.
    if dtype == torch.bfloat16 and head.in_channels % 2:
        return False
    if tuple(head.padding) != (1, 1) or type(head) is not nn.Conv2d:
        return False
    if tuple(head.stride) != _product([conv.stride for conv in convs]):
        return False
    # The head's map has the size of the last convolution's at every input size only if each
    # convolution keeps ceil(size / stride).
    return all(
        2 * p == d * (k - 1)
        for conv in convs
        for p, d, k in zip(padding_of(conv), conv.dilation, conv.kernel_size, strict=True)
    )


def _product(strides: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    down, right = 1, 1
    for stride in strides:
        down, right = down * stride[0], right * stride[1]
    return down, right
