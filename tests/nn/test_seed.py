"""Seeding a frozen model equals freezing a seeded one."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sparsight.convert import freeze, sparsify
from sparsight.models import resnet_cifar
from sparsight.nn import (
    PerforatedSampler,
    RBFInterpolation,
    SampledBlock,
    SampledConv2d,
    Sampler,
    record_sampling,
    set_seed,
)
from sparsight.nn.frozen_block import FrozenBlock


def make_block(cls=BasicBlock, layout="b", sampler=Sampler, **settings) -> SampledBlock:
    torch.manual_seed(0)
    block = cls(8 * cls.expansion, 8).eval()

    def make(in_channels, *, stride):
        return sampler(in_channels, stride=stride, **settings)

    sampled = SampledBlock(block, layout=layout, sampler=make, interpolation=RBFInterpolation)
    for i, (_, own) in enumerate(sampled.samplers_named()):
        if isinstance(own, Sampler):
            nn.init.normal_(own.head.weight, std=0.1)
            nn.init.constant_(own.head.bias, 0.0)
        own.layer = i
    return sampled.eval()


def masks_and_output(model, x):
    with torch.no_grad(), record_sampling(model) as record:
        output = model(x)
    return [decision.mask for decision in record.decisions], output


@pytest.mark.parametrize("noise", ["white", "blue"])
@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_seeding_a_frozen_block_equals_freezing_a_seeded_one(cls, layout, noise):
    source = make_block(cls, layout, noise=noise)
    frozen = FrozenBlock(source)
    x = torch.randn(2, 8 * cls.expansion, 13, 10)
    before, _ = masks_and_output(frozen, x)  # and the noise of seed 0 is kept from here on
    for seed in (7, 2**40 + 7, -1, 0):
        num_samplers = len(source.samplers_named())
        assert set_seed(source, seed) == set_seed(frozen, seed) == num_samplers
        masks, output = masks_and_output(frozen, x)
        expected_masks, expected = masks_and_output(FrozenBlock(source), x)
        assert torch.equal(output, expected)
        for mask, wanted, old in zip(masks, expected_masks, before, strict=True):
            assert torch.equal(mask, wanted)
            assert torch.equal(mask, old) == (seed == 0)


def test_seeding_a_frozen_network_equals_freezing_a_seeded_one():
    torch.manual_seed(0)
    model = sparsify(
        resnet_cifar(8), sampler=lambda c, *, stride: Sampler(c, stride=stride, bias=0)
    )
    x = torch.randn(2, 3, 32, 32)
    frozen = freeze(model, example=x)
    before, _ = masks_and_output(frozen, x)
    assert set_seed(model, 9) == set_seed(frozen, 9) == 6
    masks, output = masks_and_output(frozen, x)
    expected_masks, expected = masks_and_output(freeze(model, example=x), x)
    assert torch.equal(output, expected)
    assert all(torch.equal(*pair) for pair in zip(masks, expected_masks, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(masks, before, strict=True))


def test_a_head_that_runs_outside_the_kernel_is_seeded_too():
    """A convolution without padding: the sampler's border keeps its head out of the kernel."""
    torch.manual_seed(0)
    sampler = Sampler(8, bias=0.0)
    source = SampledConv2d(8, 4, 3, sampler=sampler, interpolation=RBFInterpolation()).eval()
    sampler.align_to(source)
    frozen = FrozenBlock(source)
    assert not frozen.samplers[0].inside
    x = torch.randn(2, 8, 12, 9)
    before, _ = masks_and_output(frozen, x)
    assert set_seed(source, 3) == set_seed(frozen, 3) == 1
    masks, output = masks_and_output(frozen, x)
    expected_masks, expected = masks_and_output(FrozenBlock(source), x)
    assert torch.equal(output, expected) and torch.equal(masks[0], expected_masks[0])
    assert not torch.equal(masks[0], before[0])


def test_a_compiled_block_follows_the_seed():
    frozen = FrozenBlock(make_block())
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        first = compiled(x)
        assert set_seed(compiled, 5) == 2
        second = compiled(x)
        assert torch.equal(second, frozen(x)) and not torch.equal(second, first)


def test_a_copy_has_a_seed_of_its_own():
    frozen = FrozenBlock(make_block())
    x = torch.randn(1, 8, 9, 9)
    expected = frozen(x)
    other = copy.deepcopy(frozen)
    set_seed(other, 5)
    assert torch.equal(frozen(x), expected) and not torch.equal(other(x), expected)


def test_what_draws_nothing_is_not_counted_and_patterns_stay():
    x = torch.randn(1, 8, 9, 9)
    for settings in ({"noise": "none"}, {"sampler": PerforatedSampler}):
        source = make_block(**settings)
        frozen = FrozenBlock(source)
        expected = frozen(x)
        assert set_seed(source, 3) == set_seed(frozen, 3) == 0
        assert torch.equal(frozen(x), expected)
    assert set_seed(FrozenBlock(make_block(), computed="dense"), 3) == 0
    assert set_seed(nn.Conv2d(3, 4, 1), 3) == 0


def test_repr_tells_the_seed():
    frozen = FrozenBlock(make_block())
    set_seed(frozen, 41)
    assert repr(frozen).count("seed=41") == 2 and "seed=0" not in repr(frozen)


@pytest.mark.parametrize("seed", [1.0, "1", True, None])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match=r"set_seed: seed is .*, but must be an integer"):
        set_seed(make_block(), seed)
