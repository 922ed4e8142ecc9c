"""`sampled_block`: heads, masks, convolutions, interpolation and residual of a block in one call.

A residual block of separate calls would pay for each: 14 us of arrays, a pass over memory, a
parallel region. The block is data here (`spec`, `params`, see csrc/sampled_block.h); the modules
that write it are in `sparsight.nn.frozen_block`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsight import _kernels
from sparsight.ops import cpu
from sparsight.ops.conv import output_size
from sparsight.ops.operators import LIBRARY


@dataclass(frozen=True)
class MaskSpec:
    """One mask of a block.

    Attributes:
        head_weight: (1, C, 3, 3) and head_bias (1,), of the head; None where the mask is given by
            the caller or derived.
        head_bias: see head_weight.
        stride: of the head, or of the derivation.
        grid_stride: of the grid prior, 0 for none.
        parent: index of the mask that this one takes every `stride`-th position of, or -1.
        log_kernel: (K, K), or None to leave holes at zero.
        eps: of the division, or None for the exact one.
    """

    head_weight: Tensor | None
    head_bias: Tensor | None
    stride: tuple[int, int]
    grid_stride: int
    parent: int
    log_kernel: Tensor | None
    eps: float | None


@dataclass(frozen=True)
class OffsetSpec:
    """What moves the taps of a stage: a convolution of the stage's own geometry.

    Attributes:
        weight: (2 * groups * kh * kw, G, kh, kw) float32 with y before x for each tap; modulated,
            groups * kh * kw further rows of the factors' logits. G channels are the block's input,
            where guided, or the stage's.
        bias: one number a row.
        groups: channel groups that move on their own.
        is_modulated: whether each tap has a factor, the sigmoid of its logit.
        is_guided: whether the offsets are made of the block's input instead of the stage's own.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    is_modulated: bool
    is_guided: bool


@dataclass(frozen=True)
class PoolSpec:
    """The max pooling after a dense convolution: window, step and padding as in nn.MaxPool2d."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the pooled map."""
        return output_size(size, self.kernel_size, self.stride, self.padding, (1, 1))


@dataclass(frozen=True)
class StageSpec:
    """One convolution of a block.

    Attributes:
        weight: (O, C/groups, kh, kw) float32, norm folded in.
        bias: (O,) float32.
        mask: index of the mask that it is computed at, or -1: everywhere.
        relu: whether ReLU follows at once.
        stride: vertical and horizontal step; padding, dilation and groups likewise as in Conv2d.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
        offset: what moves the taps, or None. A stage with offsets has a mask, and its input has the
            size of the block's where they are guided.
    """

    weight: Tensor
    bias: Tensor
    mask: int
    relu: bool
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset: OffsetSpec | None = None


def _unit(dtype: torch.dtype) -> int:
    """Channels that one float of the packed weights holds."""
    return 2 if dtype == torch.bfloat16 else 1


def pack(
    weight: Tensor, bias: Tensor | None, groups: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The blocked layouts of a weight (O, C/groups, kh, kw) and a bias (O,), flat; see pack.h.

    Both are float32 tensors; with `dtype` bfloat16 a float of the weight holds two rounded values.
    """
    ones = (1, 1)
    numbers = cpu.geometry(
        tuple(weight.shape), ones, ones, stride=ones, padding=ones, dilation=ones, groups=groups
    )
    weight_size, bias_size = _kernels.packed_sizes(numbers, _unit(dtype))
    packed_weight, packed_bias = torch.empty(weight_size), torch.empty(bias_size)
    weight = weight.detach().float().contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    _kernels.pack(
        numbers,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        packed_weight.data_ptr(),
        packed_bias.data_ptr(),
        _unit(dtype),
    )
    return packed_weight, packed_bias


def _fill_tables(log_kernel: Tensor, dtype: torch.dtype) -> tuple[int, list[int], Tensor]:
    """Number of levels, sets of taps and ratios of an interpolation kernel; see csrc/kernels.h."""
    logs = log_kernel.detach().float().contiguous()
    levels, words, numbers = _kernels.fill_tables(logs.data_ptr(), logs.shape[0], _unit(dtype))
    return levels, words, torch.tensor(numbers)


def merges_rows(stage: StageSpec) -> bool:
    """Whether a dense convolution reads each kernel row as one run: few channels, as of images."""
    in_channels, width = stage.weight.shape[1], stage.weight.shape[3]
    return stage.groups == 1 and width > 1 and in_channels * width <= 64 and stage.dilation[1] == 1


def pack_block(
    masks: Sequence[MaskSpec],
    stages: Sequence[StageSpec],
    *,
    relu: bool,
    dtype: torch.dtype = torch.float32,
    pool: PoolSpec | None = None,
) -> tuple[Tensor, Tensor]:
    """Write a block down for `sampled_block`.

    Args:
        masks: at most three; none for a dense convolution.
        stages: the convolutions, first to last; a mask has the output size of the first stage that
            it gates.
        relu: whether ReLU follows the residual addition.
        dtype: of the maps between the convolutions and of the weights and heads: torch.float32, or
            torch.bfloat16 (sums are float32). With bfloat16, heads need an even number of channels.
        pool: follows the only stage, which has no mask.

    Returns:
        params, a flat float32 tensor (bit patterns where two bfloat16 share a float), and spec, a
        flat int64 tensor.
    """
    parts: list[Tensor] = []
    offset = 0

    def store(values: Tensor) -> int:
        nonlocal offset
        at = offset
        # Whole cache lines, so that a panel's loads never straddle two.
        padded = torch.zeros((values.numel() + 15) // 16 * 16)
        padded[: values.numel()] = values.detach().float().flatten()
        parts.append(padded)
        offset += padded.numel()
        return at

    first = stages[0]
    in_channels = first.weight.shape[1] * first.groups
    heads = [m.head_weight for m in masks if m.head_weight is not None]
    head_at = -1
    if heads:
        # One row a tap: a head's nine, then the next head's.
        columns = torch.cat([head[0].detach().float().flatten(1).T for head in heads]).contiguous()
        unit = _unit(dtype)
        assert in_channels % unit == 0
        packed = torch.empty(_kernels.packed_heads_size(*columns.shape, unit))
        _kernels.pack_heads(*columns.shape, columns.data_ptr(), packed.data_ptr(), unit)
        head_at = store(packed)
    spec = [_kernels.SPEC_VERSION, in_channels, len(masks), len(stages), int(relu)]
    merge = not masks and len(stages) == 1 and merges_rows(first)
    assert pool is None or (not masks and len(stages) == 1)
    pooling = [0] * 6 if pool is None else [*pool.kernel_size, *pool.stride, *pool.padding]
    spec += [head_at, int(merge), 9 * len(heads), *pooling, _unit(dtype)]
    column = 0
    sets: list[int] = []
    sets_at = len(spec) + len(masks) * _kernels.MASK_FIELDS + len(stages) * _kernels.STAGE_FIELDS
    for m in masks:
        bias_at = -1 if m.head_bias is None else store(m.head_bias)
        window = 1 if m.log_kernel is None else m.log_kernel.shape[0]
        levels, words_at, ratios_at = 0, -1, -1
        if m.log_kernel is not None:
            levels, words, numbers = _fill_tables(m.log_kernel, dtype)
            words_at, ratios_at = sets_at + len(sets), store(numbers)
            sets += words
        eps_at = -1 if m.eps is None else store(torch.tensor([m.eps]))
        spec += [m.parent, column, bias_at, *m.stride, m.grid_stride]
        spec += [window, levels, words_at, ratios_at, eps_at]
        column += 9 if m.head_weight is not None else 0
    for stage in stages:
        out_channels, in_per_group, *kernel = stage.weight.shape
        weight = stage.weight
        if merge:
            weight = weight.permute(0, 3, 1, 2).flatten(1, 2).unsqueeze(3)
        weight, bias = pack(weight, stage.bias, stage.groups, dtype)
        weight_at, bias_at = store(weight), store(bias)
        spec += [in_per_group * stage.groups, out_channels, stage.groups, *kernel, *stage.stride]
        spec += [
            *stage.padding,
            *stage.dilation,
            stage.mask,
            int(stage.relu),
            weight_at,
            bias_at,
        ]
        if stage.offset is None:
            spec += [0, 0, 0, -1, -1]
            continue
        moving = stage.offset
        weight, bias = pack(moving.weight, moving.bias, 1, dtype)
        spec += [moving.groups, int(moving.is_modulated), int(moving.is_guided)]
        spec += [store(weight), store(bias)]
    assert len(spec) == sets_at
    return torch.cat(parts), torch.tensor(spec + sets, dtype=torch.int64)


@dataclass(frozen=True)
class StageShape:
    """What of a stage is needed to know its sizes and its cost, without its weights.

    Attributes:
        offset: shape of the convolution that makes the offsets of a deformable stage, or None.
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    mask: int
    offset: "StageShape | None" = None

    @classmethod
    def of(cls, stage: StageSpec) -> "StageShape":
        """The shape of a stage."""
        shape = cls(
            in_channels=stage.weight.shape[1] * stage.groups,
            out_channels=stage.weight.shape[0],
            groups=stage.groups,
            kernel_size=(stage.weight.shape[2], stage.weight.shape[3]),
            stride=stage.stride,
            padding=stage.padding,
            dilation=stage.dilation,
            mask=stage.mask,
        )
        if stage.offset is None:
            return shape
        out_channels, in_channels = stage.offset.weight.shape[:2]
        offset = replace(shape, in_channels=in_channels, out_channels=out_channels, groups=1)
        return replace(shape, offset=offset)

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one output position, those that make its offsets included."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        macs = self.out_channels * (self.in_channels // self.groups) * taps
        return macs + (0 if self.offset is None else self.offset.macs_per_position)


def block_sizes(stages: Sequence[StageShape], input_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Output size of every stage for an input size."""
    sizes = []
    size = input_size
    for stage in stages:
        size = output_size(size, stage.kernel_size, stage.stride, stage.padding, stage.dilation)
        sizes.append(size)
    return sizes


LIBRARY.define(
    "sampled_block(Tensor x, Tensor? shortcut, Tensor?[] noise, Tensor?[] given, Tensor params, "
    "Tensor spec, SymInt[] output_shape, SymInt mask_positions, ScalarType output_dtype) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "sampled_block", "CPU")
def _block_cpu(
    x: Tensor,
    shortcut: Tensor | None,
    noise: list[Tensor | None],
    given: list[Tensor | None],
    params: Tensor,
    spec: Tensor,
    output_shape: list[int],
    mask_positions: int,
    output_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.sampled_block(
        x, shortcut, noise, given, params, spec, output_shape, mask_positions, output_dtype
    )


@torch.library.register_fake("sparsight::sampled_block", lib=LIBRARY)
def _block_fake(
    x: Tensor,
    shortcut: Tensor | None,
    noise: list[Tensor | None],
    given: list[Tensor | None],
    params: Tensor,
    spec: Tensor,
    output_shape: list[int],
    mask_positions: int,
    output_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(output_shape, dtype=output_dtype)
    out = out.contiguous(memory_format=torch.channels_last)
    masks = x.new_empty((x.shape[0], mask_positions), dtype=torch.bool)
    logits = x.new_empty((x.shape[0], mask_positions), dtype=torch.float32)
    return out, masks, logits


def sampled_block(
    x: Tensor,
    shortcut: Tensor | None,
    noise: Sequence[Tensor | None],
    given: Sequence[Tensor | None],
    params: Tensor,
    spec: Tensor,
    *,
    output_shape: Sequence[int],
    mask_positions: int,
    output_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a packed block. Inference only.

    Args:
        x: (B, C, H, W) of the dtype that the block was packed for, on the CPU.
        shortcut: (B, O, Ho, Wo) of the same dtype, added to the filled branch, or None.
        noise: per mask, (B, 1, height, width) float32 added to its logits; None where the mask is
            given or derived.
        given: per mask, (B, 1, height, width) bool that replaces the head's decision, or None.
        params: from `pack_block`.
        spec: from `pack_block`.
        output_shape: (B, O, Ho, Wo).
        mask_positions: total size of the masks of one image.
        output_dtype: torch.float32, or that of `x`.

    Returns:
        The output (B, O, Ho, Wo) channels-last; all masks, (B, mask_positions) bool, one after
        another; their logits, (B, mask_positions) float32, undefined for masks without a head.

    Raises:
        TypeError: a dtype is not what the block was packed for.
        ValueError: the logits of an image hold NaN.
    """
    return torch.ops.sparsight.sampled_block(
        x,
        shortcut,
        list(noise),
        list(given),
        params,
        spec,
        list(output_shape),
        mask_positions,
        output_dtype,
    )
