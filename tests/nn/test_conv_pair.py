"""Pairs of convolutions, dense, sampled and frozen, in the variants that networks have."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

import sparsight
from sparsight.convert import ConversionError
from sparsight.nn import ConvPair, PerforatedSampler, ReLUGate, SampledBlock, Sampler, ZeroFill
from sparsight.nn.frozen_block import FrozenBlock
from sparsight.nn.frozen_gated import FrozenGatedLayer

TOLERANCE = 1e-5  # relative to the largest output
# FRRN's residual unit, its projection, its two-stream unit; RefineNet's residual unit; ResNet's.
VARIANTS = {
    "frrn": ConvPair(6, 6),
    "frrn projection": ConvPair(8, 6),
    "frrn two streams": ConvPair(8, 6, has_shortcut=False, is_activated=True),
    "refinenet": ConvPair(6, 6, norm=None, biases=(True, False), is_preactivated=True),
    "resnet": ConvPair(6, 6, is_activated=True),
    "everything": ConvPair(8, 6, biases=(True, True), is_preactivated=True, is_activated=True),
}


def drawn(name: str) -> ConvPair:
    """A pair whose norms do something, in eval mode."""
    torch.manual_seed(0)
    pair = VARIANTS[name]
    for module in pair.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return pair.eval()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def sampled(name: str, bias: float, **options) -> SampledBlock:
    make = partial(Sampler, bias=bias, grid_stride=None)
    return sparsight.sparsify(drawn(name), **({"sampler": make} | options)).eval()


def input_of(pair: ConvPair) -> torch.Tensor:
    return torch.randn(2, pair.conv1.in_channels, 11, 9)


def test_the_comparison_can_fail():
    assert not close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]))


def test_a_residual_block_of_torchvision_is_one_of_them():
    block, pair = BasicBlock(6, 6).eval(), ConvPair(6, 6, is_activated=True).eval()
    pair.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 5, 7)
    with torch.no_grad():
        assert torch.equal(pair(x), block(x))


def test_the_input_is_not_changed():
    pair, x = ConvPair(4, 4, norm=None, is_preactivated=True), torch.randn(1, 4, 5, 5)
    before = x.clone()
    expected = x + pair.conv2(F.relu(pair.conv1(F.relu(x))))
    assert torch.equal(pair(x), expected) and torch.equal(x, before)


def test_a_pair_without_norms_has_only_its_convolutions_in_its_state():
    keys = drawn("refinenet").state_dict().keys()
    assert list(keys) == ["conv1.weight", "conv1.bias", "conv2.weight"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", ["a", "b"])
def test_full_masks_equal_the_source_whose_state_loads(name, layout):
    source = drawn(name)
    model = sparsight.sparsify(source, layout=layout, sampler=partial(Sampler, bias=1e4)).eval()
    assert isinstance(model, SampledBlock)
    missing = model.load_state_dict(source.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith(("samplers.", "interpolations.")) for key in missing.missing_keys)
    x = input_of(source)
    with torch.no_grad():
        assert close(model(x), source(x))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("bias", [1e4, 0.0, -2.0, -1e4])
def test_frozen_equals_sampled_at_every_density(name, bias):
    model = sampled(name, bias)
    x = input_of(drawn(name))
    frozen = sparsight.freeze(model, example=x)
    assert isinstance(frozen, FrozenBlock)
    with torch.no_grad(), sparsight.record_sampling(model) as made:
        expected = model(x)
    with torch.no_grad(), sparsight.record_sampling(frozen) as found:
        assert close(frozen(x), expected)
    for a, b in zip(made.decisions, found.decisions, strict=True):
        assert torch.equal(a.mask, b.mask) and a.macs == b.macs


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_frozen_dense_equals_the_source(name):
    model = sampled(name, -1.0)
    x = input_of(drawn(name))
    frozen = sparsight.freeze(model, example=x, choose=lambda name, module: "dense")
    with torch.no_grad():
        assert close(frozen(x), drawn(name)(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_head_outside_the_kernel_reads_what_the_branch_reads(name):
    """A fixed pattern, and a head with a border of its own, are evaluated by the sampler's code."""
    for sampler in (partial(PerforatedSampler, rate=0.4), partial(_Bordered, grid_stride=None)):
        model = sampled(name, 0.0, sampler=sampler)
        x = input_of(drawn(name))
        frozen = sparsight.freeze(model, example=x)
        with torch.no_grad():
            assert close(frozen(x), model(x))


class _Bordered(Sampler):
    """A subclass, which the kernel does not know."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, bias=0.0, **keywords)
        nn.init.normal_(self.head.weight, std=0.3)


@pytest.mark.parametrize("name", VARIANTS)
def test_gated_pairs_freeze(name):
    model = sampled(name, 0.0, sampler=partial(ReLUGate, bias=0.1), interpolation=ZeroFill)
    for module in model.modules():
        if isinstance(module, ReLUGate):
            nn.init.normal_(module.conv.weight)
    x = input_of(drawn(name))
    frozen = sparsight.freeze(model, example=x)
    assert isinstance(frozen, FrozenGatedLayer)
    with torch.no_grad():
        assert close(frozen(x), model(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_weights_input_and_samplers(name):
    model = sampled(name, 0.0).train()
    x = input_of(drawn(name)).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_counted_multiply_adds_are_those_of_the_sites():
    model = sampled("frrn projection", 0.0, interpolation=ZeroFill())
    x = input_of(drawn("frrn projection"))
    for network in (model, sparsight.freeze(model, example=x)):
        with torch.no_grad(), sparsight.record_sampling(network) as record:
            network(x)
        first, second = (int(d.mask.sum()) for d in record.decisions)
        heads = 2 * 9 * 8 * 2 * 99
        shortcut = 8 * 6 * 2 * 99
        expected = first * 9 * 8 * 6 + second * 9 * 6 * 6 + heads + shortcut
        counted = sparsight.measure.count_macs(network, x)
        assert counted.total == expected
        assert counted.dense == 2 * 99 * (9 * 8 * 6 + 9 * 6 * 6 + 8 * 6)


def test_what_is_no_pair_any_more_is_refused():
    pair = ConvPair(4, 4)
    pair.relu = nn.GELU()
    with pytest.raises(ConversionError, match="its activation is GELU"):
        sparsight.sparsify(pair)
    pair = ConvPair(4, 4, norm=partial(nn.GroupNorm, 2))
    with pytest.raises(ConversionError, match="bn1: a GroupNorm is not BatchNorm2d"):
        sparsight.sparsify(pair)
