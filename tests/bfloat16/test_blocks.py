"""Blocks in bfloat16 equal their truth, rounding by rounding."""

import copy

import pytest
import torch
from torch import Tensor

from sparsight.nn import AveragePoolInterpolation, RBFInterpolation, ZeroFill
from sparsight.ops import reference

from .rounding import (
    DTYPES,
    NARROW,
    RELATIVE_NORM_OF_MEANS,
    WIDE,
    as_output,
    blocks,
    check_narrow,
    fill,
    make_whole,
    rounded_block,
    run,
    to_bfloat16,
    truth_of,
    whole_features,
)

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
