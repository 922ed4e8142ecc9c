"""The truth for frozen layers in bfloat16, and what is summed exactly.

Every map is rounded once, and what is summed is summed in float32. The truth is `rounded_block`,
the packed block in float64 with the rounding where the kernels have theirs. On whole numbers
float32 sums are exact, and the two must be equal.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from sparsight.nn import ZeroFill
from sparsight.ops import cpu
from sparsight.ops.block import MaskSpec, StageSpec, pack_block


def load(name: str) -> ModuleType:
    """A module of the ops tests, which are no package."""
    path = Path(__file__).parents[1] / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ops_{name}", path)
    assert spec is not None and spec.loader is not None
    if spec.name not in sys.modules:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


blocks, shared = load("test_block"), load("conftest")

NARROW, WIDE = torch.bfloat16, torch.float32
DTYPES = [NARROW, WIDE]
LANE_WIDTHS = (1, 2, 4, 8, 16)

# Against `rounded_block`, float32 sums tip a value over to the next bfloat16 now and then: a step
# of up to 2^-7 of it, and what was summed of such. In the root of mean squares they are few, where
# a rounding left out or doubled is 2^-9.4. They are more where the output is rounded and most
# holes are means of a few sites: half-way between two bfloat16 every other time.
RELATIVE_NORM = 2.0**-11
RELATIVE_NORM_OF_MEANS = 2.0**-10
RELATIVE_MAX = 2.0**-6
# Of the nearest site's weight: what weighs less is not read (csrc/kernels.h).
NEGLIGIBLE = 2.0**-12


def to_bfloat16(x: Tensor) -> Tensor:
    return x.to(NARROW).to(x.dtype)


def in_lanes(stage: StageSpec) -> bool:
    """Whether the weights are packed in lanes, which stay float32 (csrc/pack.h)."""
    out_channels, width = stage.weight.shape[0], stage.weight.shape[1]
    return stage.groups > 1 and width * stage.groups == out_channels and width in LANE_WIDTHS


def rounded_block(
    packed,
    x: Tensor,
    shortcut: Tensor,
    given: Sequence[Tensor],
    narrow: Callable[[Tensor], Tensor] = to_bfloat16,
    negligible: float = NEGLIGIBLE,
) -> Tensor:
    """The block in float64, `narrow` applied to the input, the weights and each stored map.

    A last convolution that is computed everywhere adds the shortcut to its sums; otherwise its
    sites are stored before they are filled. The output itself is not rounded.
    """
    masks = [*given, *(given[i][..., ::down, ::right] for i, down, right in packed.parents)]
    block_input = features = narrow(x.double())
    last = len(packed.stages) - 1
    for i, stage in enumerate(packed.stages):
        mask, spec = masks[stage.mask], packed.masks[stage.mask]
        features = convolve(stage, features, block_input, narrow)
        if stage.relu:
            features = features.relu()
        if i < last:
            after = packed.stages[i + 1]
            stays = after.weight.shape[2:] == (1, 1) and after.mask == stage.mask
            features = narrow(features)
            if not stays:
                features = narrow(fill(features, mask, spec, negligible))
            continue
        is_full = mask.flatten(1).all(1).view(-1, 1, 1, 1)
        features = torch.where(is_full, features, fill(narrow(features), mask, spec, negligible))
    return (features + narrow(shortcut.double())).relu()


def convolve(stage: StageSpec, x: Tensor, block_input: Tensor, narrow) -> Tensor:
    weight, bias = stage.weight.detach().double(), stage.bias.detach().double()
    weight = weight if in_lanes(stage) else narrow(weight)
    numbers = {"stride": stage.stride, "padding": stage.padding, "dilation": stage.dilation}
    if stage.offset is None:
        return F.conv2d(x, weight, bias, groups=stage.groups, **numbers)
    moving = stage.offset
    made = F.conv2d(
        block_input if moving.is_guided else x,
        narrow(moving.weight.detach().double()),
        moving.bias.detach().double(),
        **numbers,
    )
    moves = 2 * moving.groups * weight.shape[2] * weight.shape[3]
    factors = made[:, moves:].sigmoid() if moving.is_modulated else None
    # Every tap of every channel as a channel: what is stored before it is multiplied.
    channels, taps = x.shape[1], weight.shape[2] * weight.shape[3]
    one_hot = torch.eye(taps).double().view(taps, 1, *weight.shape[2:]).repeat(channels, 1, 1, 1)
    rows = narrow(deform_conv2d(x, made[:, :moves], one_hot, mask=factors, **numbers))
    return F.conv2d(rows, weight.flatten(1)[..., None, None], bias, groups=stage.groups)


def fill(x: Tensor, mask: Tensor, spec: MaskSpec, negligible: float) -> Tensor:
    x = torch.where(mask, x, 0.0)
    if spec.log_kernel is None:
        return x
    logs, window = spec.log_kernel.detach().double().view(1, -1, 1), spec.log_kernel.shape[0]
    seen = F.unfold(mask.double(), window, padding=window // 2) > 0
    logs = torch.where(seen, logs, -torch.inf)
    best = logs.amax(1, keepdim=True) if spec.eps is None else torch.zeros(())
    weights = torch.where(seen, (logs - best).exp(), 0.0)
    if spec.eps is None:
        weights = torch.where(weights > negligible, weights, 0.0)
    weights = weights / (weights.sum(1, keepdim=True) + (spec.eps or 0.0))
    weights = torch.where(seen, weights, 0.0)
    taps = F.unfold(x, window, padding=window // 2).view(*x.shape[:2], window**2, -1)
    mixed = (taps * weights.unsqueeze(1)).sum(2).view(x.shape)
    return torch.where(mask, x, mixed)


def check_narrow(
    actual: Tensor, truth: Tensor, note: object = "", bound: float = RELATIVE_NORM
) -> None:
    """Raise AssertionError unless `actual` is `truth` up to a few steps of bfloat16.

    Args:
        actual: what the kernel made, of either dtype.
        truth: of `rounded_block`, rounded where `actual` is.
        note: the case, for the message.
        bound: of the norm of the error, relative to that of `truth`.
    """
    assert actual.shape == truth.shape, f"shape {actual.shape} != {truth.shape}, {note}"
    assert actual.isfinite().all(), f"{int((~actual.isfinite()).sum())} not finite, {note}"
    error = actual.double() - truth
    norm, most = error.norm() / truth.norm(), error.abs().max() / truth.abs().max()
    if truth.norm() == 0:
        assert error.norm() == 0, f"not zero, {note}"
        return
    # In a map of a few values one of them may be a step off.
    bound += RELATIVE_MAX / math.sqrt(truth.numel())
    assert norm <= bound, f"norm of the error {norm:.3g} over its bound, {note}"
    assert most <= RELATIVE_MAX, f"largest error {most:.3g} over its bound, {note}"


def as_output(truth: Tensor, dtype: torch.dtype) -> Tensor:
    return to_bfloat16(truth) if dtype == NARROW else truth


def whole(draw, most: int, *shape: int) -> Tensor:
    """Whole numbers from -most to most."""
    return torch.randint(-most, most + 1, shape, generator=draw.generator).float()


def make_whole(kind, layout, draw, sampler=None):
    """A block of whole weights whose sums float32 holds exactly; holes are zero.

    Features up to 15 and weights up to 2 keep the sum of all products below 2^24. Taps move by
    whole pixels, and the factors of modulation are a half.
    """
    block = blocks.make(kind, layout, ZeroFill, sampler=sampler).block
    make_weights_whole(block, draw)
    return blocks.Packed(block, with_heads=sampler is not None, dtype=NARROW)


def make_weights_whole(block: nn.Module, draw) -> None:
    """Of a block with or without heads; see `make_whole`."""
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(whole(draw, 2, *module.weight.shape))
                if module.bias is not None:
                    module.bias.copy_(whole(draw, 9, *module.bias.shape))
        if isinstance(block.conv2, blocks.DeformableConv2d):
            offset = block.conv2.offset
            moves = 2 * block.conv2.offset_groups * 9
            offset.weight.zero_()
            offset.bias.copy_(whole(draw, 2, *offset.bias.shape))
            offset.bias[moves:] = 0.0
            if block.conv2.is_guided:
                offset.weight[torch.arange(moves), torch.arange(moves) % 3, 1, 1] = 0.25


def whole_features(packed, draw, size=(9, 7), batch=2) -> Tensor:
    """Multiples of 4 where offsets are a quarter of them: up to three pixels."""
    deformable = packed.stages[1].offset is not None
    x = whole(draw, 3 if deformable else 15, batch, packed.block.conv1.in_channels, *size)
    return 4 * x if deformable else x


def run(packed, x, given, output_dtype, *, num_threads=1, out=None, place=None):
    """The kernel on inputs that `place` lays out; an output of NaN where there is none."""
    x_, shortcut, *rest = packed.arguments(x, given, output_dtype=output_dtype)
    if place is not None:
        x_, shortcut = place[0](x_), place[1](shortcut)
    if out is None:
        out = torch.full(rest[4], torch.nan, dtype=output_dtype)
        out = out.contiguous(memory_format=torch.channels_last)
    return cpu.sampled_block(x_, shortcut, *rest, num_threads=num_threads, out=out)


def truth_of(packed, x, given, narrow=to_bfloat16, negligible=NEGLIGIBLE) -> Tensor:
    shortcut = packed.arguments(x, given)[1]
    return rounded_block(packed, x, shortcut, given, narrow, negligible)


ZEROS = MaskSpec(None, None, (1, 1), 0, -1, log_kernel=None, eps=None)


def single(weight, bias, groups=1, padding=None):
    """One convolution, computed everywhere, nothing after it."""
    kernel = weight.shape[2], weight.shape[3]
    padding = (kernel[0] // 2, kernel[1] // 2) if padding is None else padding
    stage = StageSpec(weight, bias, 0, False, padding=padding, groups=groups)
    return pack_block([ZEROS], [stage], relu=False, dtype=NARROW)


def run_single(packed, x, out_channels, output_dtype=WIDE):
    batch, _, height, width = x.shape
    given = torch.ones(batch, 1, height, width, dtype=torch.bool)
    shape = [batch, out_channels, height, width]
    arguments = (x.to(NARROW), None, [None], [given], *packed, shape, height * width)
    return cpu.sampled_block(*arguments, output_dtype, num_threads=1)[0]


def check_weights_are_read_back(draw, groups: int, in_per_group: int, out_per_group: int) -> None:
    in_channels, out_channels = groups * in_per_group, groups * out_per_group
    weight, bias = draw.normal(out_channels, in_per_group, 1, 1), torch.zeros(out_channels)
    x = torch.eye(in_channels).view(1, in_channels, 1, in_channels)
    out = run_single(single(weight, bias, groups), x, out_channels)
    if not in_lanes(StageSpec(weight, bias, 0, False, groups=groups)):
        weight = to_bfloat16(weight)
    dense = torch.block_diag(*weight[:, :, 0, 0].split(out_per_group))
    note = f"{groups} groups of {in_per_group} to {out_per_group} channels"
    assert torch.equal(out[0, :, 0, :], dense), f"over its bound of nothing: {note}"


def noises(packed, x, draw):
    _, sizes = packed.sizes(x)
    samplers = packed.block.samplers
    return [whole(draw, 9, x.shape[0], 1, *size) for size in sizes[: len(samplers)]]
