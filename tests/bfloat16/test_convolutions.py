"""Single convolutions in bfloat16: what is packed, and what is read."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from sparsight.nn.frozen_conv import FrozenConv2d
from sparsight.ops import cpu
from sparsight.ops.block import OffsetSpec, StageSpec, pack_block

from .rounding import (
    DTYPES,
    NARROW,
    ZEROS,
    as_output,
    check_weights_are_read_back,
    run_single,
    single,
    to_bfloat16,
    whole,
)


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
