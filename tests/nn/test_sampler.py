"""Samplers: the hard mask is the relaxed one thresholded, and its law is sigmoid of the logits."""

import copy
import math

import pytest
import torch
from torch import nn

from sparsight.nn import RBFInterpolation, Sampler, SamplingDecision

NOISES = ["white", "blue", "none"]


def random_head(sampler):
    nn.init.normal_(sampler.head.weight)
    return sampler


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 47)])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_decision_has_the_size_of_the_gated_convolution(noise, size, stride):
    x = torch.randn(3, 4, *size)
    expected = nn.Conv2d(4, 1, 1, stride=stride)(x).shape
    sampler = random_head(Sampler(4, stride=stride, noise=noise))
    for training in (True, False):
        decision = sampler.train(training)(x)
        assert decision.mask.shape == decision.probability.shape == expected
        assert decision.mask.dtype == torch.bool
        assert (decision.relaxed is not None) == training


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.03])
def test_mask_is_the_relaxed_mask_thresholded(noise, temperature):
    sampler = random_head(Sampler(4, noise=noise)).train()
    sampler.temperature = temperature
    decision = sampler(torch.randn(2, 4, 30, 31))
    assert torch.equal(decision.mask, decision.relaxed >= 0.5)
    assert 0 < decision.mask.float().mean() < 1
    assert decision.relaxed.min() >= 0 and decision.relaxed.max() <= 1


@pytest.mark.parametrize(
    ("noise", "grid_stride", "bias"),
    [
        ("white", None, -1.5),
        ("white", None, 3.0),
        ("white", 3, 0.0),
        ("blue", None, 0.0),
        ("blue", 3, -1.5),
        ("blue", 3, 3.0),
    ],
)
def test_density_is_sigmoid_of_the_bias_off_the_grid_and_one_on_it(noise, grid_stride, bias):
    """Weight 0: 5-sigma binomial bound per pixel over 800 seeds."""
    num_seeds = 800
    sampler = Sampler(2, noise=noise, bias=bias, grid_stride=grid_stride).eval()
    logits = sampler.head(torch.randn(1, 2, 7, 6))
    counts = torch.zeros(7, 6)
    for seed in range(num_seeds):
        sampler.seed = seed
        counts += sampler.decide(logits).mask[0, 0]
    expected = torch.full((7, 6), 1 / (1 + math.exp(-bias)))
    if grid_stride is not None:
        expected[::grid_stride, ::grid_stride] = 1
    bound = 5 * (expected * (1 - expected) / num_seeds).sqrt()
    assert ((counts / num_seeds - expected).abs() <= bound).all()


def test_probability_is_sigmoid_of_the_logits_without_noise_or_grid():
    sampler = random_head(Sampler(4, grid_stride=2)).train()
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(sampler(x).probability, torch.sigmoid(sampler.head(x)))


def test_published_start():
    sampler = Sampler(4).eval()
    assert sampler.head.weight.abs().max() == 0 and sampler.temperature == 1.0
    probability = sampler(torch.randn(1, 4, 5, 5)).probability
    assert torch.allclose(probability, torch.tensor(0.9526), atol=1e-4)


@pytest.mark.parametrize("noise", NOISES)
def test_same_input_same_mask_whatever_torch_draws_and_whatever_the_temperature(noise):
    sampler = random_head(Sampler(4, noise=noise)).eval()
    x = torch.randn(2, 4, 20, 20)
    first = sampler(x).mask
    torch.rand(7)
    sampler.temperature = 0.1
    assert torch.equal(first, sampler(x).mask)
    assert torch.equal(first, copy.deepcopy(sampler)(x).mask)
    assert torch.equal(first[:1], sampler(x[:1]).mask)


@pytest.mark.parametrize("attribute", ["seed", "layer"])
@pytest.mark.parametrize("noise", ["white", "blue"])
def test_seed_and_layer_change_the_mask(noise, attribute):
    sampler = Sampler(4, noise=noise, bias=0.0).eval()
    x = torch.randn(1, 4, 20, 20)
    first = sampler(x).mask
    setattr(sampler, attribute, 1)
    assert not torch.equal(first, sampler(x).mask)


def test_training_mask_follows_torchs_generator():
    sampler = Sampler(4, bias=0.0).train()
    x = torch.randn(1, 4, 20, 20)
    torch.manual_seed(0)
    first = sampler(x).mask
    assert not torch.equal(first, sampler(x).mask)
    torch.manual_seed(0)
    assert torch.equal(first, sampler(x).mask)


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradient_reaches_the_head_through_the_relaxed_mask(straight_through):
    sampler = random_head(Sampler(4, bias=0.0, straight_through=straight_through)).train()
    x = torch.randn(1, 4, 12, 12, requires_grad=True)
    torch.manual_seed(0)
    decision = sampler(x)
    decision.relaxed.square().sum().backward()
    assert sampler.head.weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0
    if straight_through:
        assert set(decision.relaxed.unique().tolist()) == {0.0, 1.0}
    else:
        assert decision.relaxed.unique().numel() > 100


def test_straight_through_has_the_soft_gradient():
    soft = random_head(Sampler(4, bias=0.0)).train()
    hard = copy.deepcopy(soft)
    hard.straight_through = True
    x, direction = torch.randn(1, 4, 12, 12), torch.randn(1, 1, 12, 12)
    for sampler in (soft, hard):
        torch.manual_seed(0)
        (sampler(x).relaxed * direction).sum().backward()
    assert torch.equal(soft.head.weight.grad, hard.head.weight.grad)


def test_grid_gets_no_gradient_from_the_relaxed_mask():
    sampler = Sampler(4, grid_stride=1).train()
    decision = sampler(torch.randn(1, 4, 5, 5))
    assert (decision.relaxed == 1).all()
    decision.relaxed.sum().backward()
    assert sampler.head.bias.grad == 0


def test_forward_keeps_no_state():
    sampler = Sampler(4, noise="blue").train()
    before = {k: v for k, v in vars(sampler).items() if not k.startswith("_")}
    keys = set(vars(sampler))
    sampler(torch.randn(1, 4, 5, 5))
    assert set(vars(sampler)) == keys
    assert {k: v for k, v in vars(sampler).items() if not k.startswith("_")} == before


@pytest.mark.parametrize("noise", NOISES)
def test_state_holds_the_head_only(noise):
    assert set(Sampler(4, noise=noise).state_dict()) == {"head.weight", "head.bias"}


def test_half_precision_model_keeps_the_tile():
    """A float tile would lose ranks in bfloat16."""
    sampler = Sampler(4, noise="blue", bias=0.0, grid_stride=None).eval()
    x = torch.randn(1, 4, 64, 64)
    expected = sampler(x).mask
    assert torch.equal(sampler.bfloat16()(x.bfloat16()).mask, expected)
    assert sampler(x.bfloat16()).probability.dtype == torch.float32


def test_autocast_runs():
    sampler = random_head(Sampler(4)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        decision = sampler(torch.randn(1, 4, 6, 6))
    assert decision.probability.dtype == torch.float32


CONVOLUTIONS = [
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 7, "stride": 2, "padding": 3},
    {"kernel_size": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3},
    {"kernel_size": 5, "padding": 1},
    {"kernel_size": 9},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "dilation": 4, "stride": 2},
    {"kernel_size": (1, 5), "padding": (0, 2)},
    {"kernel_size": (4, 3), "padding": (3, 0), "stride": (3, 1)},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 1, "padding": 3},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_align_to_gives_the_size_and_the_centres_of_any_convolution(options):
    """A head that marks bright pixels must mark the outputs whose window is centred on them."""
    conv = nn.Conv2d(1, 1, bias=False, **options)
    sampler = Sampler(1, stride=conv.stride, noise="none", grid_stride=None, bias=-0.5).eval()
    sampler.align_to(conv)
    for size in ((17, 21), (24, 18), (9, 9)):
        x = torch.randn(2, 1, *size)
        assert sampler(x).mask.shape == conv(x).shape, size

    with torch.no_grad():
        sampler.head.weight[..., 1, 1] = 1.0
    ramp_y = torch.arange(24.0)[:, None].expand(24, 24)
    logits = (
        sampler.head(
            ramp_y[None, None]
            if sampler.border is None
            else nn.functional.pad(ramp_y[None, None], sampler.border)
        )
        + 0.5
    )[0, 0]
    column = logits.shape[1] // 2
    rows = torch.arange(logits.shape[0])
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
    padding = (
        {"same": reach // 2, "valid": 0}.get(conv.padding)
        if isinstance(conv.padding, str)
        else conv.padding[0]
    )
    centre = rows * conv.stride[0] - padding + reach / 2
    inside = (centre >= 1) & (centre <= 22)
    assert inside.any()
    assert ((logits[:, column] - centre)[inside].abs() <= 0.5).all()


def test_align_to_refuses_another_stride():
    with pytest.raises(ValueError, match=r"Sampler.align_to: .*stride \(2, 2\).*\(1, 1\).*build"):
        Sampler(1).align_to(nn.Conv2d(1, 1, 3, stride=2))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 5, 5), ValueError, r"shape \(4, 5, 5\), but .*x\[None\]"),
        (torch.zeros(1, 3, 5, 5), ValueError, r"3 channels, but the head was built for 4"),
        (torch.zeros(1, 4, 5, 5, dtype=torch.uint8), TypeError, r"torch.uint8, but a float"),
        (torch.zeros(1, 4, 5, 5).double(), TypeError, r"torch.float64 and the head torch.float32"),
        (torch.zeros(1, 4, 5, 5, device="meta"), ValueError, r"on meta and the head is on cpu"),
        (torch.full((1, 4, 5, 5), torch.nan), ValueError, r"layer 7.*logits hold NaN"),
    ],
    ids=["rank", "channels", "integer", "dtype", "device", "nan"],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_features_are_refused(x, error, message, training):
    sampler = Sampler(4).train(training)
    sampler.layer = 7
    with pytest.raises(error, match=message):
        sampler(x)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive_in_training(temperature):
    sampler = Sampler(4)
    sampler.temperature = temperature
    with pytest.raises(ValueError, match=r"temperature is .*must be positive; anneal"):
        sampler.train()(torch.zeros(1, 4, 2, 2))
    sampler.eval()(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "pink"}, r"noise is 'pink'.*'white'"),
        ({"grid_stride": 0}, r"grid_stride is 0.*None for no grid"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(4, **options)


def test_logits_of_several_channels_are_refused():
    with pytest.raises(ValueError, match=r"logits have shape \(1, 2, 3, 3\)"):
        Sampler(4).decide(torch.zeros(1, 2, 3, 3))


def test_nan_counts_as_sampled_where_it_is_not_looked_for():
    sampler = Sampler(1, bias=-1e4, grid_stride=None).eval()
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 4, 4] = torch.nan
    compiled = torch.compile(sampler, backend="eager", fullgraph=True)
    mask = compiled(x).mask[0, 0]
    assert mask.sum() == 9 and mask[3:6, 3:6].all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(noise, training):
    sampler = random_head(Sampler(4, noise=noise)).train(training)
    x = torch.randn(2, 4, 13, 9)
    compiled = torch.compile(sampler, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = sampler(x)
    torch.manual_seed(0)
    decision = compiled(x)
    assert isinstance(decision, SamplingDecision)
    assert torch.equal(decision.mask, expected.mask)
    assert torch.equal(decision.probability, expected.probability)


@pytest.mark.parametrize("noise", NOISES)
def test_exports_with_a_free_size_and_the_same_mask(noise):
    sampler = random_head(Sampler(4, noise=noise)).eval()
    height, width = (
        torch.export.Dim("height", min=2, max=512),
        torch.export.Dim("width", min=2, max=512),
    )
    program = torch.export.export(
        sampler, (torch.randn(2, 4, 13, 9),), dynamic_shapes=({2: height, 3: width},)
    )
    for size in ((13, 9), (70, 65)):
        x = torch.randn(2, 4, *size)
        assert torch.equal(program.module()(x).mask, sampler(x).mask)


def test_without_noise_a_region_below_the_threshold_fills_no_holes_in_training():
    """Relative weights would: relaxed masks of 1e-20 in a hole's whole window sum to one too."""
    features = torch.randn(1, 2, 9, 12)
    logits = torch.full((1, 1, 9, 12), -1.5)
    logits[..., :2] = 1.5
    logits.requires_grad_()
    sampler = Sampler(2, noise="none", grid_stride=None)
    sampler.temperature = 0.03
    fill = RBFInterpolation()
    trained = fill(features, sampler.train().decide(logits).weights)
    inferred = fill(features, sampler.eval().decide(logits).weights)
    torch.testing.assert_close(trained, inferred)
    assert inferred[..., 6:].abs().max() == 0  # no site within the window
    trained.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_only_without_noise_relaxed_masks_have_a_floor():
    logits = torch.tensor([-0.3, -0.1, 0.2]).view(1, 1, 1, 3).requires_grad_()
    has_small = {}
    for noise in NOISES:
        sampler = Sampler(2, noise=noise, grid_stride=None, bias=0.0).train()
        sampler.temperature = 0.03
        torch.manual_seed(0)
        relaxed = sampler.decide(logits.expand(1, 1, 64, 3)).relaxed
        has_small[noise] = bool(((relaxed > 0) & (relaxed < 1e-3)).any())
    assert has_small == {"white": True, "blue": True, "none": False}
    sampler.temperature = 1.0
    relaxed = sampler.decide(logits).relaxed
    torch.testing.assert_close(relaxed, torch.sigmoid(logits))
