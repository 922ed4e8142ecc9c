"""Frozen gated layers: the same products, computed where the gate is open only."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import sparsight
from sparsight.measure import count_macs
from sparsight.nn import (
    DeformableBlock,
    ReLUGate,
    SampledBlock,
    SampledConv2d,
    Sampler,
    ZeroFill,
    record_sampling,
)
from sparsight.nn.frozen_gated import FrozenGatedLayer, is_gated, refusal_of_gates


def model(cls, layout, stride=2):
    torch.manual_seed(0)
    planes = 16 if cls is BasicBlock else 4
    down = nn.Sequential(nn.Conv2d(8, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    net = nn.Sequential(cls(8, planes, stride, down), cls(16, planes))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    gated = sparsight.sparsify(net, layout=layout, sampler=ReLUGate, interpolation=ZeroFill)
    with torch.no_grad():
        gated.train()(torch.randn(4, 8, 20, 20))  # statistics of the gates' norms
    return gated.eval()


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_frozen_equals_its_source_and_counts_alike(cls, layout):
    gated, x = model(cls, layout), torch.randn(2, 8, 21, 26)
    frozen = sparsight.freeze(gated, example=x)
    assert all(isinstance(layer, FrozenGatedLayer) for layer in frozen)
    with torch.no_grad(), record_sampling(gated) as a, record_sampling(frozen) as b:
        torch.testing.assert_close(frozen(x), gated(x), atol=1e-5, rtol=1e-5)
    assert [(d.name, d.macs) for d in a.decisions] == [(d.name, d.macs) for d in b.decisions]
    for before, after in zip(a.decisions, b.decisions, strict=True):
        assert torch.equal(before.mask, after.mask)
        assert 0 < before.mask.float().mean() < 1
    counted, counted_frozen = count_macs(gated, x), count_macs(frozen, x)
    assert (counted.total, counted.dense) == (counted_frozen.total, counted_frozen.dense)
    assert counted.layers == counted_frozen.layers


def test_a_convolution_alone():
    conv = SampledConv2d(6, 5, 3, padding=1, sampler=ReLUGate(6), interpolation=ZeroFill()).eval()
    frozen, x = FrozenGatedLayer(conv), torch.randn(2, 6, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), conv(x), atol=1e-5, rtol=1e-5)
        assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))


def test_what_the_gate_closes_is_not_read():
    """Weights of infinity are harmless where nothing is computed."""
    conv = SampledConv2d(6, 5, 1, sampler=ReLUGate(6), interpolation=ZeroFill()).eval()
    nn.init.constant_(conv.sampler.norm.bias, -1e3)
    nn.init.constant_(conv.weight, torch.inf)
    with torch.no_grad():
        assert (FrozenGatedLayer(conv)(torch.randn(1, 6, 4, 4)) == 0).all()


def test_a_gated_layer_has_no_dense_form():
    gated, x = model(BasicBlock, "b"), torch.randn(1, 8, 12, 12)
    with pytest.raises(sparsight.convert.ConversionError, match="its gate scales what is computed"):
        sparsight.freeze(gated, example=x, choose={"0": "dense"})
    measured = sparsight.freeze(gated, example=x, choose="measured")
    assert all(isinstance(layer, FrozenGatedLayer) for layer in measured)


def test_what_cannot_be_frozen_says_why():
    mixed = model(Bottleneck, "b")[1]
    assert is_gated(mixed) and refusal_of_gates(mixed) is None
    mixed.samplers[1] = Sampler(16)
    assert "others are not" in refusal_of_gates(mixed)
    with pytest.raises(ValueError, match="FrozenGatedLayer: the layer cannot be frozen because"):
        FrozenGatedLayer(mixed)
    moving = SampledBlock(
        DeformableBlock(Bottleneck(16, 4)), sampler=ReLUGate, interpolation=ZeroFill
    )
    assert refusal_of_gates(moving) == "it is gated and deformable at once"


def test_a_frozen_layer_is_frozen():
    gated, x = model(BasicBlock, "b"), torch.randn(1, 8, 12, 12)
    frozen = sparsight.freeze(gated, example=x)
    with pytest.raises(RuntimeError, match=r"FrozenGatedLayer\.train"):
        frozen.train()
    with pytest.raises(sparsight.convert.ConversionError, match="frozen already"):
        sparsight.freeze(frozen, example=x)
    with pytest.raises(RuntimeError, match="gradient"):
        frozen(x.requires_grad_())
