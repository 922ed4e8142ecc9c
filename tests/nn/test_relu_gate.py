"""ReLU gating: what is computed is multiplied by the map whose zeros say what is not."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck

from sparsight.nn import (
    RBFInterpolation,
    ReLUGate,
    SampledBlock,
    SampledConv2d,
    ZeroFill,
    record_sampling,
    sampling_loss,
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_decision_is_the_map_and_its_zeros(kernel_size, training):
    gate = ReLUGate(4, kernel_size=kernel_size, stride=2).train(training)
    x = torch.randn(3, 4, 15, 18)
    expected = F.relu(gate.norm(F.conv2d(x, gate.conv.weight, None, 2, kernel_size // 2)))
    decision = gate(x)
    torch.testing.assert_close(decision.relaxed, expected)
    assert torch.equal(decision.mask, decision.relaxed > 0)
    assert torch.equal(decision.probability, decision.mask.float())
    assert torch.equal(decision.weights, decision.relaxed)


def test_half_is_open_at_first_and_the_bias_moves_it():
    """Batch norm: a unit normal before the ReLU, so that Phi(bias) of the positions are open."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 40, 40)
    for bias, share in ((0.0, 0.5), (1.0, 0.841), (-1.0, 0.159)):
        density = ReLUGate(8, bias=bias).train()(x).mask.float().mean()
        assert density == pytest.approx(share, abs=0.02)


def test_the_output_is_the_product():
    """LCCL: relu(bn(conv(x))) times relu(bn(cheap conv(x))), zeros where the second is zero."""
    torch.manual_seed(0)
    block = Bottleneck(16, 4).eval()
    sampled = SampledBlock(block, layout="c", sampler=ReLUGate, interpolation=ZeroFill).eval()
    x = torch.randn(2, 16, 9, 10)
    with torch.no_grad():
        g = [gate(x).relaxed for gate in sampled.samplers]
        h = g[0] * F.relu(block.bn1(block.conv1(x)))
        h = g[1] * F.relu(block.bn2(block.conv2(h)))
        expected = F.relu(g[2] * block.bn3(block.conv3(h)) + x)
        torch.testing.assert_close(sampled(x), expected)


def test_the_loss_is_the_density_and_pulls_as_an_l1_norm():
    torch.manual_seed(0)
    conv = SampledConv2d(4, 6, 1, sampler=ReLUGate(4), interpolation=ZeroFill())
    x = torch.randn(2, 4, 12, 12)
    with record_sampling(conv) as record:
        conv(x)
        loss = sampling_loss(record)
    decision = record.decisions[0]
    assert loss.item() == pytest.approx(decision.mask.float().mean().item())
    loss.backward()
    gate = conv.sampler
    expected = torch.autograd.grad(gate(x).relaxed.mean(), gate.norm.bias)[0]
    torch.testing.assert_close(gate.norm.bias.grad, expected)
    assert expected > 0  # descending closes gates


def test_a_gate_with_an_interpolation_is_refused():
    with pytest.raises(ValueError, match=r"SampledConv2d: the sampler is a ReLUGate.*ZeroFill\(\)"):
        SampledConv2d(4, 6, 1, sampler=ReLUGate(4), interpolation=RBFInterpolation())
    with pytest.raises(ValueError, match=r"SampledBlock: the sampler is a ReLUGate"):
        SampledBlock(Bottleneck(16, 4), sampler=ReLUGate, interpolation=RBFInterpolation)


@pytest.mark.parametrize(
    "geometry", [{"kernel_size": 3}, {"kernel_size": 2, "padding": 1}, {"kernel_size": 4}]
)
def test_a_convolution_that_the_map_does_not_fit_is_refused(geometry):
    make = partial(SampledConv2d.from_conv, sampler=ReLUGate(4), interpolation=ZeroFill())
    with pytest.raises(ValueError, match=r"ReLUGate\.align_to: .*padding of half the kernel"):
        make(nn.Conv2d(4, 6, **geometry))
    make(nn.Conv2d(4, 6, 3, padding=2, dilation=2))(torch.randn(1, 4, 9, 9))
    make(nn.Conv2d(4, 6, 2, padding="same"))


def test_kernel_sizes_that_are_not_cheap_are_refused():
    with pytest.raises(ValueError, match="kernel_size is 5, but must be 1 or 3"):
        ReLUGate(4, kernel_size=5)
