"""Large maps, which are written past the caches."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight.ops import cpu
from sparsight.ops.block import StageSpec, pack_block

from .rounding import (
    DTYPES,
    NARROW,
    WIDE,
    ZEROS,
    as_output,
    to_bfloat16,
    whole,
)


def shifted(shape, dtype) -> Tensor:
    """Channels-last and 16 bytes off a cache line, where the kernels do not stream."""
    elements, skip = math.prod(shape), 16 // dtype.itemsize
    memory = torch.full((elements + 2 * 64,), torch.nan, dtype=dtype)
    start = (-memory.data_ptr() // dtype.itemsize) % (64 // dtype.itemsize) + skip
    batch, channels, height, width = shape
    view = memory[start : start + elements].view(batch, height, width, channels)
    return view.permute(0, 3, 1, 2)


STREAMED_BYTES = 16 << 20  # an image; csrc/sampled_block.cpp


def large_case(draw, dtype, output_dtype, out_channels, groups, density, log_kernel):
    """One 1x1 convolution with shortcut and ReLU onto two maps that are just large enough."""
    row_bytes = 256 * out_channels * output_dtype.itemsize
    size, in_channels = (-(-STREAMED_BYTES // row_bytes), 256), 6
    weight = whole(draw, 2, out_channels, in_channels // groups, 1, 1)
    stage = StageSpec(weight, whole(draw, 9, out_channels), 0, False, groups=groups)
    masks = [replace(ZEROS, log_kernel=log_kernel)]
    x = whole(draw, 15, 2, in_channels, *size).to(dtype)
    shortcut = whole(draw, 9, 2, out_channels, 1, 256).to(dtype).expand(-1, -1, size[0], -1)
    given = draw.mask(2, *size, density)
    packed = pack_block(masks, [stage], relu=True, dtype=dtype)
    shape = [2, out_channels, *size]
    arguments = (x, shortcut, [None], [given], *packed, shape, size[0] * size[1])
    truth = F.conv2d(x.float(), weight, stage.bias, groups=groups)  # exact in float32 too
    if dtype == NARROW and not given.all():
        truth = to_bfloat16(truth)
    return arguments, (torch.where(given, truth, 0.0) + shortcut.float()).relu()


@pytest.mark.parametrize(
    ("dtype", "output_dtype"), [(NARROW, NARROW), (NARROW, WIDE), (WIDE, WIDE)]
)
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(("out_channels", "groups"), [(256, 1), (256, 2), (224, 1), (200, 2)])
def test_large_maps_are_exact(out_channels, groups, density, dtype, output_dtype, draw):
    """224 and 200 channels are no whole lines of a filled map."""
    arguments, truth = large_case(draw(0), dtype, output_dtype, out_channels, groups, density, None)
    truth = as_output(truth, output_dtype)
    for num_threads in (1, 3):
        made, _, _ = cpu.sampled_block(*arguments, output_dtype, num_threads=num_threads)
        assert made[0].nbytes >= STREAMED_BYTES
        assert torch.equal(made.float(), truth)
        made.fill_(torch.nan)  # the next call may be given this memory


@pytest.mark.parametrize("output_dtype", DTYPES)
def test_a_large_filled_map_is_the_same_past_the_caches(output_dtype, draw, rbf_log_kernel):
    log_kernel = rbf_log_kernel(7, 0.7)
    arguments, _ = large_case(draw(0), NARROW, output_dtype, 256, 1, 0.3, log_kernel)
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


def test_a_network_of_many_large_maps_finds_them_all_again():
    cpu.drop_buffers()
    shapes = [(1, channels, 80, 256) for channels in range(16, 48)]
    made = [cpu._new_map(shape, torch.float32) for shape in shapes]
    places = {x.data_ptr() for x in made}
    del made
    again = [cpu._new_map(shape, torch.float32) for shape in shapes]
    assert {x.data_ptr() for x in again} == places
    del again
    many = [cpu._new_map((1, 16, 80, 256), torch.float32) for _ in range(70)]
    one = many[0].nbytes
    cpu.drop_buffers()
    del many
    assert cpu.drop_buffers() == 64 * one  # the oldest are gone
