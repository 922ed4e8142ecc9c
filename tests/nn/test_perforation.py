"""Perforation: a pattern of the map's size alone, computed where it says and copied elsewhere."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import sparsight
from sparsight.measure import count_macs
from sparsight.nn import NearestInterpolation, PerforatedSampler, SampledConv2d, record_sampling
from sparsight.nn.perforation import perforation_mask

PATTERNS = ["grid", "uniform"]
SIZES = [(1, 1), (8, 8), (17, 30), (60, 80)]


def blocks(cls, stride=1):
    torch.manual_seed(0)
    planes = 16 if cls is BasicBlock else 4
    down = nn.Sequential(nn.Conv2d(8, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    return nn.Sequential(cls(8, planes, stride, down), cls(16, planes)).eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rate", [0.1, 1 / 3, 0.5, 1.0])
def test_the_share_kept_is_that_of_the_source(size, rate):
    """floor(rate * H * W) positions; of a grid floor(sqrt(rate) * side) rows and columns."""
    height, width = size
    uniform = perforation_mask("uniform", rate=rate, size=size, seed=3, layer=1)
    assert int(uniform.sum()) == max(1, math.floor(rate * height * width + 1e-9))
    grid = perforation_mask("grid", rate=rate, size=size, seed=3, layer=1)
    sides = [max(1, math.floor(math.sqrt(rate) * side + 1e-9)) for side in size]
    assert [int(grid.any(1).sum()), int(grid.any(0).sum())] == sides
    assert int(grid.sum()) == math.prod(sides)


def test_a_grid_is_regular_and_starts_at_random():
    gaps, starts = set(), set()
    for layer in range(20):
        grid = perforation_mask("grid", rate=0.25, size=(40, 40), seed=0, layer=layer)
        rows = grid.any(1).nonzero().flatten()
        gaps |= set(rows.diff().tolist())
        starts.add(int(rows[0]))
    assert gaps == {2} and starts == {0, 1}
    uneven = perforation_mask("grid", rate=0.5, size=(40, 40), seed=0, layer=0)
    assert set(uneven.any(1).nonzero().flatten().diff().tolist()) == {1, 2}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_and_seeds_differ_and_images_do_not(pattern):
    sampler = PerforatedSampler(3, rate=0.3, pattern=pattern)
    masks = []
    for sampler.layer, sampler.seed in ((0, 0), (1, 0), (0, 1)):
        mask = sampler(torch.randn(2, 3, 23, 31)).mask
        assert torch.equal(mask[0], mask[1])
        assert torch.equal(mask, sampler(torch.randn(2, 3, 23, 31)).mask)
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("training", [True, False])
def test_the_decision_is_hard_and_has_no_gradient(training):
    decision = PerforatedSampler(3).train(training)(torch.randn(1, 3, 9, 9, requires_grad=True))
    assert decision.mask.dtype == torch.bool and decision.relaxed is None
    assert torch.equal(decision.probability, decision.mask.float())
    assert not decision.probability.requires_grad


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 4, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "valid", "stride": (2, 1)},
        {"kernel_size": 1, "stride": 3},
    ],
)
def test_the_mask_fits_any_convolution(geometry):
    conv = nn.Conv2d(3, 5, **geometry)
    stride = conv.stride
    sampled = SampledConv2d.from_conv(
        conv, sampler=PerforatedSampler(3, stride=stride), interpolation=NearestInterpolation()
    )
    for size in ((9, 9), (12, 17)):
        x = torch.randn(2, 3, *size)
        assert sampled(x).shape == conv(x).shape


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_perforated_model_freezes_and_counts_alike(cls, layout, pattern):
    model = sparsight.sparsify(
        blocks(cls, stride=2),
        layout=layout,
        sampler=partial(PerforatedSampler, rate=0.4, pattern=pattern),
        interpolation=NearestInterpolation,
    )
    x = torch.randn(2, 8, 21, 26)
    frozen = sparsight.freeze(model, example=x)
    with torch.no_grad(), record_sampling(model) as a, record_sampling(frozen) as b:
        torch.testing.assert_close(frozen(x), model(x), atol=1e-5, rtol=1e-5)
    assert [(d.name, d.macs) for d in a.decisions] == [(d.name, d.macs) for d in b.decisions]
    for before, after in zip(a.decisions, b.decisions, strict=True):
        assert torch.equal(before.mask, after.mask)
        assert torch.equal(before.probability, after.probability)
    counted = count_macs(model, x)
    assert counted.layers == count_macs(frozen, x).layers


def test_a_copy_costs_nothing_so_that_macs_are_the_rate():
    """Figurnov et al.: the cost is the rate times the dense one, interpolation included."""
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).eval()
    model = sparsight.sparsify(
        conv,
        where=lambda name, module: name == "0",
        sampler=partial(PerforatedSampler, rate=0.25),
        interpolation=NearestInterpolation,
    )
    counted = count_macs(model, torch.zeros(1, 4, 20, 20))
    assert counted.total == counted.dense // 4


def test_rate_one_is_the_source():
    source = blocks(BasicBlock)
    model = sparsight.sparsify(
        source, sampler=partial(PerforatedSampler, rate=1.0), interpolation=NearestInterpolation
    )
    x = torch.randn(1, 8, 9, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x))


@pytest.mark.parametrize("rate", [0, -0.1, 1.1])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match=r"PerforatedSampler: rate is .*\(0, 1\]"):
        PerforatedSampler(3, rate=rate)
    sampler = PerforatedSampler(3)
    sampler.rate = rate
    with pytest.raises(ValueError, match=r"PerforatedSampler: rate is"):
        sampler(torch.zeros(1, 3, 5, 5))


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="pattern is 'impact', but must be 'grid' or 'uniform'"):
        PerforatedSampler(3, pattern="impact")
    with pytest.raises(ValueError, match=r"features have shape \(3, 5, 5\).*x\[None\]"):
        PerforatedSampler(3)(torch.zeros(3, 5, 5))
