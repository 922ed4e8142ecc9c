"""SampledConv2d: the plain convolution at the sites, whatever its hyper-parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsight.nn import (
    DeformableConv2d,
    RBFInterpolation,
    SampledConv2d,
    Sampler,
    SamplingDecision,
    ZeroFill,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

OPTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": (2, 1)},
    {"kernel_size": 7, "stride": 2, "padding": 3},
    {"kernel_size": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
    {"kernel_size": (5, 2), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "dilation": (1, 2)},
]


def convert(conv, *, fill=None, **options):
    sampler = Sampler(conv.in_channels, stride=conv.stride, **options)
    fill = RBFInterpolation() if fill is None else fill
    return SampledConv2d.from_conv(conv, sampler=sampler, interpolation=fill)


def make_conv(options):
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, **options).eval()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(9, 10), (16, 33)])
def test_full_mask_equals_dense(options, size):
    conv = make_conv(options)
    x = torch.randn(3, 4, *size)
    assert torch.equal(convert(conv, grid_stride=1, bias=-1e4)(x), conv(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sites_are_the_convolution_and_holes_the_interpolation(options):
    conv = make_conv(options)
    sampled = convert(conv, bias=0.0, grid_stride=None)
    x = torch.randn(2, 4, 13, 12)
    mask = sampled.sampler(x).mask
    out, dense = sampled(x), conv(x)
    where = mask.expand_as(dense)
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(out[where], dense[where])
    assert torch.equal(out, sampled.interpolation(dense, mask))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_empty_mask_gives_zero(options):
    sampled = convert(make_conv(options), bias=-1e4, grid_stride=None)
    assert not sampled(torch.randn(2, 4, 13, 12)).any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gated_macs_equal_a_count_of_multiplications(options):
    """Count through autograd: d(output)/d(weight of ones) would miss padding, so count by shape."""
    conv = make_conv(options)
    _, out_channels, height, width = conv(torch.zeros(1, 4, 13, 12)).shape
    macs = height * width * conv.weight.numel()
    assert conv.weight.shape[0] == out_channels
    assert convert(conv).gated_macs(0, height, width) == macs


def test_is_a_drop_in():
    conv = make_conv({"kernel_size": 3, "padding": 1})
    sampled = convert(conv)
    assert isinstance(sampled, nn.Conv2d) and not sampled.training
    assert sampled.weight is conv.weight and sampled.bias is conv.bias
    keys = sampled.load_state_dict(conv.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {
        "sampler.head.weight",
        "sampler.head.bias",
        "interpolation.width",
    }


def test_a_shared_decision_is_used_in_place_of_the_sampler():
    conv = make_conv({"kernel_size": 1})
    sampled = SampledConv2d.from_conv(conv, sampler=None, interpolation=ZeroFill())
    x = torch.randn(1, 4, 6, 6)
    mask = torch.rand(1, 1, 6, 6) < 0.5
    decision = SamplingDecision(mask, mask.float(), None)
    assert torch.equal(sampled(x, decision), torch.where(mask, conv(x), 0.0))
    assert sampled.samplers_named() == []
    with pytest.raises(ValueError, match=r"decision is None and the layer has no sampler.*pass"):
        sampled(x)


def test_training_blends_with_the_relaxed_mask():
    conv = make_conv({"kernel_size": 3, "padding": 1})
    sampled = convert(conv, bias=0.0, grid_stride=None).train()
    x = torch.randn(1, 4, 9, 9)
    torch.manual_seed(1)
    relaxed = sampled.sampler(x).relaxed
    torch.manual_seed(1)
    assert torch.equal(sampled(x), sampled.interpolation(conv(x), relaxed))


def test_every_parameter_gets_a_gradient():
    sampled = convert(make_conv({"kernel_size": 3, "padding": 1}), bias=0.0).train()
    sampled(torch.randn(1, 4, 9, 9)).square().sum().backward()
    for name, parameter in sampled.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_decision_of_another_size_is_refused():
    sampled = convert(make_conv({"kernel_size": 3, "stride": 2, "padding": 1}))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 9, 9\).*output resolution"):
        sampled(torch.zeros(1, 4, 9, 9), SamplingDecision(mask, mask.float(), None))


def test_other_padding_modes_are_refused():
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match=r"padding_mode='circular'.*keep this layer dense"):
        convert(conv)


def test_a_sampler_of_another_stride_is_refused():
    with pytest.raises(ValueError, match=r"stride \(2, 2\)"):
        SampledConv2d.from_conv(
            nn.Conv2d(4, 4, 3, stride=2), sampler=Sampler(4), interpolation=ZeroFill()
        )


def test_there_is_one_decision():
    with pytest.raises(IndexError, match=r"one decision"):
        convert(make_conv({"kernel_size": 1})).gated_macs(1, 2, 2)


@pytest.mark.parametrize("options", OPTIONS[:-2:2], ids=str)
def test_compiles_without_a_graph_break(options):
    sampled = convert(make_conv(options), bias=0.0)
    x = torch.randn(1, 4, 11, 12)
    compiled = torch.compile(sampled, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), sampled(x))


def test_trains_to_sample_where_it_matters():
    """Only the bright left half of the target varies; a cost must empty the right half first."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=1)
    x = torch.randn(2, 2, 8, 16)
    x[:, 1] = 1.0
    x[..., 8:] = 0.0
    target = F.conv2d(x, torch.randn(4, 2, 3, 3), padding=1)
    sampled = convert(conv, bias=1.0, grid_stride=None).train()
    optimiser = torch.optim.Adam(sampled.parameters(), lr=0.05)
    losses = []
    for step in range(80):
        sampled.sampler.temperature = max(0.05, 0.96**step)
        decision = sampled.sampler(x)
        loss = F.mse_loss(sampled(x, decision), target)
        optimiser.zero_grad()
        (loss + 2.0 * decision.probability.mean()).backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    probability = sampled.eval().sampler(x).probability
    assert probability[..., :7].mean() > probability[..., 9:].mean() + 0.3


def test_a_deformable_convolution_is_refused_alone():
    with pytest.raises(ValueError, match=r"is a DeformableConv2d.*sample the residual block"):
        convert(DeformableConv2d(4, 8, 3, padding=1))
