"""Frozen layers in bfloat16: every map is rounded once, and what is summed is summed in float32.

The truth is `rounded_block`, the packed block in float64 with the rounding where the kernels have
theirs. On whole numbers float32 sums are exact, and the two must be equal.
"""

import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from sparsight.nn import AveragePoolInterpolation, RBFInterpolation, ZeroFill
from sparsight.nn.frozen_block import FrozenBlock
from sparsight.nn.frozen_conv import FrozenConv2d
from sparsight.nn.record import record_sampling
from sparsight.ops import cpu, reference
from sparsight.ops.block import MaskSpec, OffsetSpec, StageSpec, pack_block


def load(name: str) -> ModuleType:
    """A module of the ops tests, which are no package."""
    path = Path(__file__).parent / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ops_{name}", path)
    assert spec is not None and spec.loader is not None
    if spec.name not in sys.modules:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


blocks, shared = load("test_block"), load("conftest")
draw, layouts, is_intact = shared.draw, shared.layouts, shared.is_intact
rbf_log_kernel = shared.rbf_log_kernel

pytestmark = pytest.mark.skipif(
    not cpu.has_bfloat16(), reason="this CPU or this build has no AVX-512 BF16 instructions"
)

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


FILLS = {
    "rbf": lambda: RBFInterpolation(),
    "narrow rbf": lambda: RBFInterpolation(width=0.5, window=9),
    "steep rbf": lambda: RBFInterpolation(width=2.0),
    "rbf with eps": lambda: RBFInterpolation(width=0.7, eps=1e-2),
    "average": lambda: AveragePoolInterpolation(window=3),
    "zeros": ZeroFill,
}


@pytest.mark.parametrize("kind", blocks.KINDS)
@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_the_truth_without_its_rounding_is_the_block(kind, layout, draw):
    packed = blocks.make(kind, layout)
    for seed, density in enumerate(blocks.DENSITIES):
        x = blocks.features(packed, draw(seed))
        given = blocks.given_masks(packed, x, draw(seed), density)
        shortcut = x.double()
        if packed.block.downsample is not None:
            shortcut = copy.deepcopy(packed.block.downsample).double()(shortcut)
        made = rounded_block(packed, x, shortcut, given, lambda t: t, negligible=0.0)
        expected = packed.truth(x, given, torch.float64)
        # The kernel of the interpolation is float32 in the one, float64 in the other.
        torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["rbf", "narrow rbf", "steep rbf", "rbf with eps", "average"])
def test_the_truth_fills_as_the_reference(name, draw):
    packed = blocks.make("bottleneck", "c", FILLS[name])
    for seed, density in enumerate(blocks.DENSITIES):
        x, mask = draw(seed).normal(2, 5, 12, 17).double(), draw(seed).mask(2, 12, 17, density)
        spec = packed.masks[0]
        expected = reference.interpolate(x, mask, spec.log_kernel.detach().double(), spec.eps)
        torch.testing.assert_close(fill(x, mask, spec, 0.0), expected)


@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("kind", blocks.KINDS)
@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_whole_numbers_are_exact(kind, layout, output_dtype, draw, layouts, is_intact):
    packed = make_whole(kind, layout, draw(0))
    for seed, density in enumerate(blocks.DENSITIES):
        d = draw(seed)
        x = whole_features(packed, d)
        given = blocks.given_masks(packed, x, d, density)
        truth = as_output(truth_of(packed, x, given), output_dtype)
        out = layouts["guarded"](torch.full_like(truth, torch.nan).to(output_dtype))
        place = layouts["guarded"], layouts["sliced"]
        made, masks, _ = run(packed, x, given, output_dtype, out=out, place=place)
        assert made is out
        assert is_intact(out)
        assert torch.equal(masks, blocks.all_masks(packed, given))
        assert torch.equal(out.double(), truth), density


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_the_whole_numbers_are_large_enough_to_be_rounded(kind, draw):
    """And small enough to be exact: no sum of absolute values reaches 2^24."""
    packed = make_whole(kind, "b", draw(0))
    x = whole_features(packed, draw(0))
    given = blocks.given_masks(packed, x, draw(0), 0.5)
    rounded, kept = (truth_of(packed, x, given, f) for f in (to_bfloat16, lambda t: t))
    assert not torch.equal(rounded, kept)
    largest = x.abs().max()
    for stage in packed.stages:
        weight = stage.weight.abs().flatten(1).sum(1).max()
        largest = 1.01 * (largest * weight + stage.bias.abs().max())
    assert largest < 2**24


@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("name", FILLS)
def test_every_kind_of_fill_is_rounded_once(name, output_dtype, draw):
    packed = blocks.Packed(blocks.make("bottleneck", "c", FILLS[name]).block, dtype=NARROW)
    for seed, density in enumerate(blocks.DENSITIES):
        d = draw(seed)
        x = to_bfloat16(blocks.features(packed, d, size=(12, 17)))
        given = blocks.given_masks(packed, x, d, density)
        out, _, _ = run(packed, x, given, output_dtype)
        truth = as_output(truth_of(packed, x, given), output_dtype)
        check_narrow(out, truth, f"{name}, density {density}", RELATIVE_NORM_OF_MEANS)


@pytest.mark.parametrize("kind", blocks.KINDS)
@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_random_numbers_are_within_the_bound(kind, layout, draw):
    packed = blocks.Packed(blocks.make(kind, layout).block, dtype=NARROW)
    for seed, density in enumerate(blocks.DENSITIES):
        d = draw(seed)
        x = blocks.features(packed, d)
        given = blocks.given_masks(packed, x, d, density)
        out, _, _ = run(packed, x, given, WIDE)
        check_narrow(out, truth_of(packed, x, given), f"{kind}, layout {layout}, density {density}")


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0, 3.0])
def test_the_sites_left_out_weigh_less_than_the_rounding(width, draw):
    packed = blocks.make("bottleneck", "a", lambda: RBFInterpolation(width=width))
    packed = blocks.Packed(packed.block, dtype=NARROW)
    for seed, density in enumerate((0.02, 0.1, 0.3)):
        x = blocks.features(packed, draw(seed), (12, 17))
        given = blocks.given_masks(packed, x, draw(seed), density)
        out, _, _ = run(packed, x, given, WIDE)
        truth = truth_of(packed, x, given, negligible=0.0)
        assert (out - truth).norm() <= 2.0**-9.4 * truth.norm()


def test_the_bound_sees_one_lost_site(draw):
    packed = blocks.Packed(blocks.make("bottleneck", "b").block, dtype=NARROW)
    x = blocks.features(packed, draw(0))
    given = blocks.given_masks(packed, x, draw(1), 0.5)
    truth = truth_of(packed, x, given)
    site = given[1].flatten().nonzero()[3]
    given[1].view(-1)[site] = False
    with pytest.raises(AssertionError, match="over its bound"):
        check_narrow(run(packed, x, given, WIDE)[0], truth)


@pytest.mark.parametrize("where", ["input", "weights", "maps"])
def test_the_bound_sees_a_rounding_left_out(where, draw):
    packed = blocks.Packed(blocks.make("bottleneck", "b").block, dtype=NARROW)
    x = blocks.features(packed, draw(0))
    given = blocks.given_masks(packed, x, draw(1), 0.5)

    def narrow(t: Tensor) -> Tensor:
        is_weight = any(t.shape == stage.weight.shape for stage in packed.stages)
        kind = "weights" if is_weight else "input" if t.shape == x.shape else "maps"
        return t if kind == where else to_bfloat16(t)

    with pytest.raises(AssertionError, match=r"norm of the error .* over its bound"):
        check_narrow(run(packed, x, given, WIDE)[0], truth_of(packed, x, given, narrow))


@pytest.mark.parametrize("kind", blocks.KINDS)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_one_thread_equals_n_threads_bit_for_bit(kind, output_dtype, draw):
    for layout in ("a", "c"):
        packed = blocks.Packed(blocks.make(kind, layout).block, dtype=NARROW)
        for seed, density in enumerate(blocks.DENSITIES):
            d = draw(seed)
            x = blocks.features(packed, d, size=(31, 18))
            given = blocks.given_masks(packed, x, d, density)
            results = [run(packed, x, given, output_dtype, num_threads=n)[0] for n in (1, 2, 3)]
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 5), (3, 40)])
@pytest.mark.parametrize("kind", ["basic", "grouped in panels", "deformable v2 strided"])
def test_sizes_down_to_one_pixel(size, kind, draw):
    packed = make_whole(kind, "a", draw(0))
    x = whole_features(packed, draw(1), size, batch=3)
    given = blocks.given_masks(packed, x, draw(2), 0.5)
    for output_dtype in DTYPES:
        truth = as_output(truth_of(packed, x, given), output_dtype)
        assert torch.equal(run(packed, x, given, output_dtype)[0].double(), truth)


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "sliced", "transposed"])
def test_any_layout_and_alignment_of_the_input(name, draw, layouts):
    packed = make_whole("basic", "b", draw(0))
    x = whole_features(packed, draw(1))
    given = blocks.given_masks(packed, x, draw(2), 0.5)
    expected, _, _ = run(packed, x, given, NARROW)
    place = layouts[name], layouts[name]
    assert torch.equal(run(packed, x, given, NARROW, place=place)[0], expected)


# Single convolutions: what is packed, and what is read.

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


@pytest.mark.parametrize("out_channels", [1, 15, 16, 31, 32, 33, 70])
@pytest.mark.parametrize("in_channels", [1, 2, 16, 33])
def test_one_hot_features_read_the_rounded_weight_back(in_channels, out_channels, draw):
    weight, bias = draw(0).normal(out_channels, in_channels, 1, 1), draw(1).normal(out_channels)
    x = torch.eye(in_channels).view(1, in_channels, 1, in_channels)
    out = run_single(single(weight, bias), x, out_channels)
    assert torch.equal(out[0, :, 0, :], to_bfloat16(weight)[:, :, 0, 0] + bias[:, None])


@pytest.mark.parametrize(
    ("groups", "in_per_group", "out_per_group"),
    [(4, 4, 4), (6, 8, 8), (20, 1, 1), (2, 16, 16), (3, 5, 5), (4, 4, 8), (2, 33, 40), (7, 1, 3)],
)
def test_grouped_weights_are_read_back_those_in_lanes_unrounded(
    groups, in_per_group, out_per_group, draw
):
    check_weights_are_read_back(draw(0), groups, in_per_group, out_per_group)


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


@pytest.mark.parametrize("value", [1.00390625, 1.01171875, -(2.0**-130), 3.4e38, 1e-45, torch.inf])
def test_weights_are_rounded_as_torch_rounds(value):
    """To the nearest, ties to even, in the packed bits; subnormal products are zero, not wrong."""
    weight = torch.tensor([value]).view(1, 1, 1, 1)
    packed, _ = single(weight, torch.zeros(1))
    bits = packed.view(torch.int16)[0]
    assert bits == torch.tensor(value).to(NARROW).view(torch.int16)


@pytest.mark.parametrize(
    ("groups", "in_per_group", "out_per_group"), [(4, 4, 4), (3, 5, 5), (5, 3, 40), (20, 1, 1)]
)
def test_nan_in_one_group_never_reaches_another(groups, in_per_group, out_per_group, draw):
    """Groups of an odd width share a pair of channels in memory."""
    in_channels, out_channels = groups * in_per_group, groups * out_per_group
    weight = draw(0).normal(out_channels, in_per_group, 3, 3)
    packed = single(weight, draw(1).normal(out_channels), groups)
    for group in range(groups):
        x = draw(2).normal(1, in_channels, 5, 6)
        expected = run_single(packed, x, out_channels)
        x[:, group * in_per_group : (group + 1) * in_per_group] = torch.nan
        out = run_single(packed, x, out_channels)
        hit = torch.zeros(out_channels, dtype=torch.bool)
        hit[group * out_per_group : (group + 1) * out_per_group] = True
        assert out[:, hit].isnan().all()
        assert torch.equal(out[:, ~hit], expected[:, ~hit])


STEMS = {
    "merged rows, odd run": nn.Conv2d(3, 40, 7, 2, 3),
    "merged rows, even run": nn.Conv2d(3, 33, (3, 4), padding=(1, 2)),
    "odd channels": nn.Conv2d(17, 35, 3, padding=1),
    "one channel": nn.Conv2d(1, 32, 1),
    "odd groups": nn.Conv2d(15, 24, 3, 2, 1, groups=3),
    "lanes": nn.Conv2d(24, 24, 3, 1, 2, 2, groups=3),
}


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_a_dense_convolution_of_whole_numbers_is_exact(name, output_dtype, draw, layouts):
    conv = copy.deepcopy(STEMS[name])
    with torch.no_grad():
        conv.weight.copy_(whole(draw(0), 9, *conv.weight.shape))
        conv.bias.copy_(whole(draw(1), 99, conv.out_channels))
    frozen = FrozenConv2d(conv, relu=True, dtype=NARROW)
    frozen.output_dtype = output_dtype
    for size in ((9, 11), (1, 1), (5, 40)):
        x = whole(draw(2), 200, 3, conv.in_channels, *size)
        with torch.no_grad():
            truth = as_output(copy.deepcopy(conv).double()(x.double()).relu(), output_dtype)
        for layout in ("contiguous", "guarded", "sliced"):
            assert torch.equal(frozen(layouts[layout](x)).double(), truth)
            assert torch.equal(frozen(layouts[layout](x.to(NARROW))).double(), truth)


@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("density", ["one", 0.5, 1.0])
def test_weights_larger_than_a_cache_are_exact(density, output_dtype, draw):
    """Seven panels, of which six stay in the cache while sites pass; an odd number of channels."""
    d, size = draw(0), (17, 13)
    weight, bias = whole(d, 2, 224, 97, 3, 3), whole(d, 9, 224)
    stage = StageSpec(weight, bias, 0, True, padding=(1, 1))
    packed = pack_block([ZEROS], [stage], relu=False, dtype=NARROW)
    x, given = whole(d, 15, 2, 97, *size).to(NARROW), d.mask(2, *size, density)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    if density != 1.0:
        truth = torch.where(given, to_bfloat16(truth), 0.0)
    arguments = (x, None, [None], [given], *packed, [2, 224, *size], size[0] * size[1])
    for num_threads in (1, 2, 3, 8):
        out, _, _ = cpu.sampled_block(*arguments, output_dtype, num_threads=num_threads)
        assert torch.equal(out.double(), as_output(truth, output_dtype))


@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("density", [0.0, "one", 0.9, 1.0])
def test_one_deformable_stage_equals_torchvision_at_the_sites(density, groups, output_dtype, draw):
    """Three blocks of sites are mixed in turn; with all of them the output is written at once."""
    d, channels, size = draw(0), 64, (41, 31)
    x = 4 * whole(d, 3, 2, channels, *size)
    weight, bias = whole(d, 2, 5 * groups, channels // groups, 3, 3), whole(d, 9, 5 * groups)
    moves = torch.zeros(36, channels, 3, 3)
    moves[torch.arange(36), torch.arange(36), 1, 1] = 0.25
    moving = OffsetSpec(moves, whole(d, 2, 36), 2, False, False)
    stage = StageSpec(weight, bias, 0, False, padding=(1, 1), groups=groups, offset=moving)
    packed = pack_block([ZEROS], [stage], relu=False, dtype=NARROW)
    given = d.mask(2, *size, density)
    offsets = F.conv2d(x.double(), moves.double(), moving.bias.double(), padding=1)
    truth = deform_conv2d(x.double(), offsets, weight.double(), bias.double(), padding=1)
    if density != 1.0:
        truth = torch.where(given, to_bfloat16(truth), 0.0)
    shape = [2, 5 * groups, *size]
    arguments = (x.to(NARROW), None, [None], [given], *packed, shape, size[0] * size[1])
    for num_threads in (1, 3):
        out = torch.full(shape, torch.nan, dtype=output_dtype)
        out = out.contiguous(memory_format=torch.channels_last)
        cpu.sampled_block(*arguments, num_threads=num_threads, out=out)
        assert torch.equal(out.double(), as_output(truth, output_dtype))


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_nan_stays_within_the_receptive_field(name, output_dtype, draw):
    conv = STEMS[name]
    frozen = FrozenConv2d(conv, dtype=NARROW)
    frozen.output_dtype = output_dtype
    size = (9, 11)
    clean = draw(0).normal(2, conv.in_channels, *size)
    expected = frozen(clean)
    ones = copy.deepcopy(conv)
    nn.init.ones_(ones.weight), nn.init.zeros_(ones.bias)
    for y, x in [(0, 0), (0, 10), (4, 5), (8, 0), (8, 10)]:
        poisoned, reach = clean.clone(), torch.zeros_like(clean)
        poisoned[0, :, y, x], reach[0, :, y, x] = torch.nan, 1.0
        with torch.no_grad():
            reached = ones(reach) > 0
        for form in (torch.contiguous_format, torch.channels_last):
            out = frozen(poisoned.contiguous(memory_format=form))
            assert torch.equal(out.isnan(), reached)
            assert torch.equal(out[~reached], expected[~reached])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["merged rows, odd run", "merged rows, even run"])
def test_an_image_in_planes_equals_one_in_pixels(name, dtype, draw, layouts):
    conv = STEMS[name]
    frozen = FrozenConv2d(conv, relu=True, dtype=dtype)
    x = draw(0).normal(2, 3, 13, 18)
    planar = frozen(x)
    assert torch.equal(planar, frozen(x.contiguous(memory_format=torch.channels_last)))
    # Planes between NaN: nothing beside them is read.
    beside = torch.full((x.numel() + 128,), torch.nan)
    beside[64:-64] = x.flatten()
    assert torch.equal(planar, frozen(beside[64:-64].view(x.shape)))
    assert torch.equal(planar, frozen(layouts["sliced"](x)))
    with torch.no_grad():
        torch.testing.assert_close(planar, conv(x).relu(), atol=0.03, rtol=0.03)


# Large maps, which are written past the caches.


def shifted(shape, dtype) -> Tensor:
    """Channels-last and 16 bytes off a cache line, where the kernels do not stream."""
    elements, skip = math.prod(shape), 16 // dtype.itemsize
    memory = torch.full((elements + 2 * 64,), torch.nan, dtype=dtype)
    start = (-memory.data_ptr() // dtype.itemsize) % (64 // dtype.itemsize) + skip
    batch, channels, height, width = shape
    view = memory[start : start + elements].view(batch, height, width, channels)
    return view.permute(0, 3, 1, 2)


def large_case(draw, dtype, out_channels, groups, density, log_kernel):
    """One 1x1 convolution with shortcut and ReLU onto two maps of 160 x 256 positions."""
    size, in_channels = (160, 256), 6
    weight = whole(draw, 2, out_channels, in_channels // groups, 1, 1)
    stage = StageSpec(weight, whole(draw, 9, out_channels), 0, False, groups=groups)
    masks = [replace(ZEROS, log_kernel=log_kernel)]
    x = whole(draw, 15, 2, in_channels, *size).to(dtype)
    shortcut = whole(draw, 9, 2, out_channels, *size).to(dtype)
    given = draw.mask(2, *size, density)
    packed = pack_block(masks, [stage], relu=True, dtype=dtype)
    shape = [2, out_channels, *size]
    arguments = (x, shortcut, [None], [given], *packed, shape, size[0] * size[1])
    truth = F.conv2d(x.double(), weight.double(), stage.bias.double(), groups=groups)
    if dtype == NARROW and not given.all():
        truth = to_bfloat16(truth)
    return arguments, (torch.where(given, truth, 0.0) + shortcut.double()).relu()


@pytest.mark.parametrize(
    ("dtype", "output_dtype"), [(NARROW, NARROW), (NARROW, WIDE), (WIDE, WIDE)]
)
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(("out_channels", "groups"), [(256, 1), (256, 2), (224, 1), (200, 2)])
def test_large_maps_are_exact(out_channels, groups, density, dtype, output_dtype, draw):
    """From 16 MiB an image on; 224 and 200 channels are no whole lines of a filled map."""
    arguments, truth = large_case(draw(0), dtype, out_channels, groups, density, None)
    shape = arguments[6]
    if (out_channels, groups) == (256, 1):
        assert math.prod(shape[1:]) * output_dtype.itemsize >= 16 << 20
    truth = as_output(truth, output_dtype)
    for num_threads in (1, 3):
        made, _, _ = cpu.sampled_block(*arguments, output_dtype, num_threads=num_threads)
        assert torch.equal(made.double(), truth)
        made.fill_(torch.nan)  # the next call may be given this memory


@pytest.mark.parametrize("output_dtype", DTYPES)
def test_a_large_filled_map_is_the_same_past_the_caches(output_dtype, draw, rbf_log_kernel):
    log_kernel = rbf_log_kernel(7, 0.7)
    arguments, _ = large_case(draw(0), NARROW, 256, 1, 0.3, log_kernel)
    out = shifted(arguments[6], output_dtype)
    plain, _, _ = cpu.sampled_block(*arguments, num_threads=1, out=out)
    assert plain.data_ptr() % 64 == 16
    made, _, _ = cpu.sampled_block(*arguments, output_dtype, num_threads=2)
    assert made.data_ptr() % 64 == 0
    assert torch.equal(made, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_maps_are_channels_last_and_used_again(dtype):
    shape = (2, 64, 80, 256)
    cpu.drop_buffers()
    made = cpu._new_map(shape, dtype)
    assert made.dtype == dtype and made.shape == shape
    assert made.is_contiguous(memory_format=torch.channels_last)
    made.fill_(1.0)  # every element is there
    where = made.data_ptr()
    assert where % 64 == 0
    del made
    again = cpu._new_map(shape, dtype)
    assert again.data_ptr() == where
    del again
    assert cpu.drop_buffers() == math.prod(shape) * dtype.itemsize


# Decisions.


def noises(packed, x, draw):
    _, sizes = packed.sizes(x)
    samplers = packed.block.samplers
    return [whole(draw, 9, x.shape[0], 1, *size) for size in sizes[: len(samplers)]]


@pytest.mark.parametrize("kind", ["basic strided", "bottleneck", "bottleneck strided"])
@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_heads_of_whole_numbers_decide_exactly(kind, layout, draw):
    """Nine, eighteen and twenty-seven columns; 6 or 20 pairs of channels."""
    packed = make_whole(kind, layout, draw(0), sampler=blocks.heads(grid_stride=3))
    x = whole_features(packed, draw(1), (11, 6), batch=3)
    noise = noises(packed, x, draw(2))
    arguments = packed.arguments(x, [None] * len(noise), noise)
    out, masks, logits = cpu.sampled_block(*arguments, num_threads=2)
    given, at = [], 0
    for sampler, n in zip(packed.block.samplers, noise, strict=True):
        end = at + n[0].numel()
        head = sampler.head
        expected = F.conv2d(x.double(), head.weight.double(), head.bias.double(), head.stride, 1)
        assert torch.equal(logits[:, at:end].view(n.shape).double(), expected)
        chosen = expected + n >= 0
        chosen[..., ::3, ::3] = True
        assert torch.equal(masks[:, at:end].view(n.shape), chosen)
        given.append(chosen)
        at = end
    assert 0.1 < masks.float().mean() < 0.9
    assert torch.equal(out.double(), truth_of(packed, x, given))


def test_logits_are_float32_sums_of_rounded_features_and_weights(draw):
    packed = blocks.make("bottleneck", "b", sampler=blocks.heads())
    packed = blocks.Packed(packed.block, with_heads=True, dtype=NARROW)
    x = blocks.features(packed, draw(2), (11, 6))
    noise = noises(packed, x, draw(2))
    arguments = packed.arguments(x, [None, None], noise)
    _, _, logits = cpu.sampled_block(*arguments, num_threads=1)
    for i, sampler in enumerate(packed.block.samplers):
        weight, bias = to_bfloat16(sampler.head.weight), sampler.head.bias
        expected = F.conv2d(to_bfloat16(x).double(), weight.double(), bias.double(), 1, 1)
        made = logits[:, 66 * i : 66 * (i + 1)].view(expected.shape)
        torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_make_a_logit_nan_are_refused_with_the_image(layout, bad, draw):
    packed = make_whole("bottleneck strided", layout, draw(0), sampler=blocks.heads())
    with torch.no_grad():
        for sampler in packed.block.samplers:
            sampler.head.weight.abs_().add_(1.0)
    packed = blocks.Packed(packed.block, with_heads=True, dtype=NARROW)
    x = whole_features(packed, draw(6), batch=3)
    x[1, :2, 4, 3] = torch.tensor([bad, -bad])
    noise = noises(packed, x, draw(7))
    arguments = packed.arguments(x, [None] * len(noise), noise)
    with pytest.raises(ValueError, match=r"logits of image 1 hold NaN.*look for the first layer"):
        cpu.sampled_block(*arguments, num_threads=2)


def test_a_head_of_odd_channels_stays_outside_and_decides_in_float32(draw):
    source = blocks.make("basic", "b", sampler=blocks.heads()).block.eval()
    frozen = FrozenBlock(source, dtype=NARROW)
    assert not any(sampler.inside for sampler in frozen.samplers)
    x = to_bfloat16(draw(0).normal(2, 17, 13, 9))
    with torch.no_grad(), record_sampling(source) as a, record_sampling(frozen) as b:
        expected = source(x)
        for features in (x, x.to(NARROW)):
            b.decisions.clear()
            out = frozen(features)
            for one, two in zip(a.decisions, b.decisions, strict=True):
                assert torch.equal(one.mask, two.mask)
                assert torch.equal(one.probability, two.probability)
            assert (out - expected).norm() < 0.01 * expected.norm()


def test_heads_of_odd_channels_are_not_packed(draw):
    packed = blocks.make("basic", "b", sampler=blocks.heads())
    with pytest.raises(AssertionError):
        blocks.Packed(packed.block, with_heads=True, dtype=NARROW)


# The operator.


@pytest.mark.parametrize("wrong", ["x", "shortcut", "output", "params", "float32 block"])
def test_other_dtypes_are_refused(wrong, draw):
    dtype = WIDE if wrong == "float32 block" else NARROW
    packed = blocks.Packed(blocks.make("bottleneck", "b").block, dtype=dtype)
    x = blocks.features(packed, draw(0))
    arguments = list(packed.arguments(x, blocks.given_masks(packed, x, draw(1), 0.5)))
    if wrong == "x":
        arguments[0], arguments[1] = arguments[0].float(), arguments[1].float()
        message = "not the one that the block was packed for"
    else:
        index, to, message = {
            "shortcut": (1, WIDE, r"x is torch.bfloat16, shortcut torch.float32.*the same"),
            "output": (8, torch.float16, r"the output torch.float16.*either that or"),
            "params": (4, NARROW, r"params torch.bfloat16.*no frozen model with .to\(dtype\)"),
            "float32 block": (8, NARROW, r"x is torch.float32.*the output torch.bfloat16"),
        }[wrong]
        arguments[index] = to if index == 8 else arguments[index].to(to)
    with pytest.raises(TypeError, match=message):
        torch.ops.sparsight.sampled_block(*arguments)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bottleneck", "bottleneck strided", "deformable"])
def test_passes_opcheck(kind, output_dtype, draw):
    packed = make_whole(kind, "c", draw(0), sampler=blocks.heads())
    x = whole_features(packed, draw(7))
    noise = noises(packed, x, draw(8))
    arguments = packed.arguments(x, [None] * len(noise), noise, output_dtype)
    torch.library.opcheck(torch.ops.sparsight.sampled_block.default, arguments)


@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bottleneck", "basic", "deformable v2 strided"])
def test_a_frozen_block_compiles_and_exports(kind, output_dtype, draw):
    """ "basic" has an odd number of channels: its heads are layers of their own."""
    source = blocks.make(kind, "b", sampler=blocks.heads()).block.eval().requires_grad_(False)
    frozen = FrozenBlock(source, dtype=NARROW)
    frozen.output_dtype = output_dtype
    x = blocks.features(blocks.Packed(source), draw(0)).to(WIDE)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = frozen(x)
        assert expected.dtype == output_dtype
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(frozen, (x,))
        assert torch.equal(program.module()(x), expected)
