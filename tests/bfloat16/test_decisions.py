"""Masks that a block in bfloat16 decides on by itself, or is given."""

import pytest
import torch
import torch.nn.functional as F

from sparsight.nn.frozen_block import FrozenBlock
from sparsight.nn.record import record_sampling
from sparsight.ops import cpu

from .rounding import (
    NARROW,
    blocks,
    make_whole,
    noises,
    to_bfloat16,
    truth_of,
    whole_features,
)


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
