"""Laws of `sampled_conv2d`, through the public door; the instruction sets are in test_cpu.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from sparsight.ops import cpu, sampled_conv2d, sites_from_mask


def full_sites(batch: int, height: int, width: int):
    return sites_from_mask(torch.ones(batch, 1, height, width, dtype=torch.bool))


def run(case, **changes):
    """The public operator on a ConvCase."""
    arguments = {
        "bias": case.bias,
        "residual": case.residual,
        "activation": "relu" if case.relu else "none",
        **case.numbers,
    }
    return sampled_conv2d(
        case.x, case.weight, sites=sites_from_mask(case.mask), **{**arguments, **changes}
    )


@pytest.mark.parametrize("groups", [1, 2, 32])
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_full_mask_equals_dense(draw, assert_within_bound, stride, channels, groups):
    d = draw(0)
    x = d.normal(3, channels, 13, 11)
    weight, bias = d.normal(channels, channels // groups, 3, 3), d.normal(channels)
    truth, twin = (
        F.conv2d(x.to(t), weight.to(t), bias.to(t), stride, 1, 1, groups)
        for t in (torch.float64, torch.float32)
    )
    scale = F.conv2d(
        x.abs().double(), weight.abs().double(), bias.abs().double(), stride, 1, 1, groups
    )
    y = sampled_conv2d(
        x,
        weight,
        bias,
        sites=full_sites(3, *truth.shape[2:]),
        stride=stride,
        padding=1,
        groups=groups,
    )
    assert_within_bound("sampled_conv2d", y, truth, twin, scale)


@pytest.mark.parametrize("density", [0.0, "one", 0.01, 0.5])
def test_output_is_exactly_zero_off_the_sites(draw, conv_case, density):
    case = conv_case(
        draw(1),
        batch=3,
        in_channels=17,
        out_channels=33,
        size=(14, 9),
        kernel=(3, 3),
        padding=(1, 1),
        density=density,
        residual=True,
    )
    y = run(case)
    holes = ~case.mask.expand_as(y)
    assert torch.equal(y[holes], torch.zeros_like(y[holes]))


def test_one_site_equals_the_dense_value_there(draw, conv_case):
    case = conv_case(
        draw(2),
        batch=1,
        in_channels=5,
        out_channels=3,
        size=(6, 6),
        kernel=(3, 3),
        padding=(1, 1),
        density="one",
    )
    y = run(case)
    dense = F.conv2d(case.x, case.weight, case.bias, padding=1)
    site = case.mask[0, 0].nonzero()[0]
    torch.testing.assert_close(y[0, :, site[0], site[1]], dense[0, :, site[0], site[1]])


@pytest.mark.parametrize("shape", [(1, 8, 9, 7), (2, 1, 9, 7), (2, 8, 1, 1)])
def test_output_is_channels_last_whatever_the_input(draw, layouts, shape):
    x = draw(3).normal(*shape)
    weight = draw(4).normal(6, shape[1], 1, 1)
    outs = [
        sampled_conv2d(place(x), weight, sites=full_sites(shape[0], *shape[2:]))
        for place in layouts.values()
    ]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outs)
    assert all(torch.equal(y, outs[0]) for y in outs)


def test_integer_arguments_mean_both_axes(draw, conv_case):
    case = conv_case(
        draw(5),
        batch=1,
        in_channels=4,
        out_channels=4,
        size=(11, 11),
        kernel=(3, 3),
        stride=(2, 2),
        padding=(3, 3),
        dilation=(2, 2),
        density=0.5,
    )
    assert torch.equal(run(case), run(case, stride=2, padding=3, dilation=2))
    assert torch.equal(run(case), run(case, stride=[2, 2], padding=[3, 3], dilation=[2, 2]))


@pytest.mark.parametrize("groups", [1, 8])
def test_nan_off_the_receptive_fields_never_arrives(draw, groups):
    d = draw(6)
    x = torch.full((1, 8, 9, 9), torch.nan)
    x[:, :, 3:6, 3:6] = d.normal(1, 8, 3, 3)
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[..., 4, 4] = True
    y = sampled_conv2d(
        x, d.normal(8, 8 // groups, 3, 3), sites=sites_from_mask(mask), padding=1, groups=groups
    )
    assert y.isfinite().all()
    assert y[..., 4, 4].abs().min() > 0


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_nan_at_a_read_position_propagates_and_relu_keeps_it(draw, isa, groups, activation):
    d = draw(7)
    x = d.normal(1, 8, 5, 5)
    x[0, :, 2, 2] = torch.nan
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    sites = sites_from_mask(mask)
    weight = d.normal(8, 8 // groups, 3, 3)
    y = cpu.sampled_conv2d(
        x,
        weight,
        None,
        sites.index,
        sites.count,
        (5, 5),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=groups,
        residual=None,
        relu=activation == "relu",
        isa=isa,
    )
    reads = torch.zeros(5, 5, dtype=torch.bool)
    reads[1:4, 1:4] = True
    assert torch.equal(y.isnan(), reads.expand_as(y))


def test_nan_in_residual_survives_relu(draw, isa):
    d = draw(8)
    residual = d.normal(1, 33, 2, 2)
    residual[0, :, 1, 0] = torch.nan
    sites = full_sites(1, 2, 2)
    y = cpu.sampled_conv2d(
        d.normal(1, 3, 2, 2),
        d.normal(33, 3, 1, 1),
        None,
        sites.index,
        sites.count,
        (2, 2),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        residual=residual,
        relu=True,
        isa=isa,
    )
    assert torch.equal(y.isnan(), residual.isnan())


def test_nan_in_one_group_stays_in_that_group(draw):
    d = draw(9)
    x = d.normal(1, 6, 4, 4)
    x[0, 0] = torch.nan
    y = sampled_conv2d(x, d.normal(10, 3, 1, 1), sites=full_sites(1, 4, 4), groups=2)
    assert y[:, 5:].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)]
)
@pytest.mark.parametrize("groups", [1, 4])
def test_other_dtypes_run_the_reference_and_are_right(draw, conv_case, dtype, bound, groups):
    case = conv_case(
        draw(10),
        batch=2,
        in_channels=16,
        out_channels=8,
        size=(9, 7),
        kernel=(3, 3),
        stride=(2, 1),
        padding=(1, 1),
        density=0.5,
        groups=groups,
        residual=True,
        relu=True,
    )
    case.x, case.weight, case.bias, case.residual = (
        t.to(dtype) for t in (case.x, case.weight, case.bias, case.residual)
    )
    y = run(case)
    assert y.dtype == dtype
    error = (y.double() - case.run_reference(torch.float64)).abs() / case.scale()
    assert error.max() < bound


def test_kernel_larger_than_the_tap_limit_runs_the_reference(draw, conv_case):
    side = int(cpu.MAX_TAPS**0.5) + 1
    case = conv_case(
        draw(11),
        batch=1,
        in_channels=2,
        out_channels=3,
        size=(16, 16),
        kernel=(side, side),
        padding=(5, 5),
        density=0.5,
    )
    error = (run(case).double() - case.run_reference(torch.float64)).abs() / case.scale()
    assert error.max() < 1e-6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("density", ["one", 0.5])
def test_gradcheck_of_every_input(draw, conv_case, density, groups):
    case = conv_case(
        draw(12),
        batch=2,
        in_channels=2,
        out_channels=4,
        size=(4, 3),
        kernel=(3, 2),
        stride=(2, 1),
        padding=(1, 1),
        dilation=(1, 2),
        density=density,
        groups=groups,
    )
    sites = sites_from_mask(case.mask)
    residual = draw(13).normal(2, 4, *case.size)
    inputs = [t.double().requires_grad_() for t in (case.x, case.weight, case.bias, residual)]
    torch.autograd.gradcheck(
        lambda x, w, b, r: sampled_conv2d(x, w, b, sites=sites, residual=r, **case.numbers), inputs
    )


def test_gradcheck_with_relu_away_from_its_kink(draw):
    d = draw(14)
    x, weight, bias = (d.normal(*s).double() for s in ((1, 3, 4, 4), (5, 3, 3, 3), (5,)))
    sites = sites_from_mask(d.mask(1, 4, 4, 0.6))
    before = F.conv2d(x, weight, bias, padding=1)
    # Move every pre-activation at least 0.5 away from 0, by the residual.
    residual = torch.where(before >= 0, 0.5, -0.5).double()
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    torch.autograd.gradcheck(
        lambda x, w, b, r: sampled_conv2d(
            x, w, b, sites=sites, padding=1, residual=r, activation="relu"
        ),
        inputs,
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("density", [0.0, "one", 0.5, 1.0])
def test_float32_gradients_equal_the_float64_reference(
    draw, conv_case, assert_within_bound, density, relu
):
    case = conv_case(
        draw(15),
        batch=3,
        in_channels=8,
        out_channels=16,
        size=(9, 11),
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        density=density,
        groups=2,
        residual=True,
    )
    if relu:
        # Far from the kink no rounding error can flip the sign of a pre-activation.
        before = case.run_reference(torch.float32)
        case.residual += torch.where(before >= 0, 1.0, -1.0)
        case.relu = True
    grad = draw(16).normal(*case.run_reference(torch.float32).shape)

    def gradients(dtype, function):
        inputs = [
            t.detach().to(dtype).requires_grad_()
            for t in (case.x, case.weight, case.bias, case.residual)
        ]
        x, weight, bias, residual = inputs
        return torch.autograd.grad(
            function(x, weight, bias, residual), inputs, grad_outputs=grad.to(dtype)
        )

    def through_reference(x, weight, bias, residual):
        y = F.conv2d(x, weight, bias, **case.numbers) + residual
        return torch.where(case.mask, F.relu(y) if relu else y, 0.0)

    def through_operator(x, weight, bias, residual):
        return sampled_conv2d(
            x,
            weight,
            bias,
            sites=sites_from_mask(case.mask),
            residual=residual,
            activation="relu" if relu else "none",
            **case.numbers,
        )

    truth = gradients(torch.float64, through_reference)
    twin = gradients(torch.float32, through_reference)
    made = gradients(torch.float32, through_operator)
    for name, a, b, c in zip(("x", "weight", "bias", "residual"), made, truth, twin, strict=True):
        assert_within_bound("conv_backward", a, b, c, b.abs().max(), name)


def test_only_the_wanted_gradients_are_made(draw):
    d = draw(17)
    x, weight = d.normal(1, 3, 4, 4), d.normal(2, 3, 1, 1).requires_grad_()
    y = sampled_conv2d(x, weight, d.normal(2), sites=full_sites(1, 4, 4))
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert not sampled_conv2d(x, weight.detach(), sites=full_sites(1, 4, 4)).requires_grad


def test_concurrent_calls_are_bit_equal_to_serial_ones(draw, random_conv_case):
    cases = [random_conv_case(draw(seed)) for seed in range(100, 116)]
    serial = [run(case) for case in cases]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for y, expected, case in zip(pool.map(run, cases), serial, cases, strict=True):
                assert torch.equal(y, expected), str(case)


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_number_of_torch_threads_does_not_change_a_bit(draw, random_conv_case, num_threads):
    cases = [random_conv_case(draw(seed)) for seed in range(200, 220)]
    one = [run(case) for case in cases]
    torch.set_num_threads(num_threads)
    for case, expected in zip(cases, one, strict=True):
        assert torch.equal(run(case), expected), str(case)


def test_inputs_are_left_as_they_were(draw, conv_case):
    case = conv_case(
        draw(18),
        batch=1,
        in_channels=3,
        out_channels=3,
        size=(5, 5),
        kernel=(1, 1),
        density=0.5,
        residual=True,
    )
    before = [t.clone() for t in (case.x, case.weight, case.bias, case.residual)]
    run(case)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (case.x, case.weight, case.bias, case.residual), strict=True)
    )


GOOD_X, GOOD_WEIGHT = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3)

BAD_INPUTS = {
    "x rank": (
        {"x": GOOD_X[0]},
        ValueError,
        r"sampled_conv2d: x has shape \(4, 8, 8\); \(B, C, H, W\).*unsqueeze",
    ),
    "weight rank": (
        {"weight": torch.ones(6, 4)},
        ValueError,
        r"weight has shape \(6, 4\).*torch\.nn\.Conv2d",
    ),
    "x dtype": ({"x": GOOD_X.long()}, TypeError, r"x has dtype torch\.int64.*x\.float\(\)"),
    "weight dtype": (
        {"weight": GOOD_WEIGHT.double()},
        TypeError,
        r"weight has dtype torch\.float64 but x has torch\.float32.*weight\.to\(x\.dtype\)",
    ),
    "bias dtype": (
        {"bias": torch.ones(6).half()},
        TypeError,
        r"bias has dtype torch\.float16.*bias\.to\(x\.dtype\)",
    ),
    "residual dtype": (
        {"residual": torch.ones(2, 6, 8, 8).double()},
        TypeError,
        r"residual has dtype torch\.float64.*residual\.to\(x\.dtype\)",
    ),
    "weight device": (
        {"weight": GOOD_WEIGHT.to("meta")},
        ValueError,
        r"weight is on meta but x is on cpu.*weight\.to\(x\.device\)",
    ),
    "sites device": (
        {"x": GOOD_X.to("meta"), "weight": GOOD_WEIGHT.to("meta")},
        ValueError,
        r"sites are on cpu but x is on meta.*build them from a mask on x\.device",
    ),
    "stride": ({"stride": 0}, ValueError, r"stride is 0; an integer >= 1.*torch\.nn\.Conv2d"),
    "stride type": ({"stride": 1.5}, ValueError, r"stride is 1\.5; an integer >= 1"),
    "padding": ({"padding": -1}, ValueError, r"padding is -1; an integer >= 0"),
    "padding word": ({"padding": "same"}, ValueError, r"padding is 'same'; an integer >= 0"),
    "dilation": ({"dilation": (1, 2, 3)}, ValueError, r"dilation is \(1, 2, 3\); an integer >= 1"),
    "channels": (
        {"x": torch.ones(2, 5, 8, 8)},
        ValueError,
        r"x has 5 channels.*= 4 channels.*check in_channels and groups",
    ),
    "groups": (
        {"groups": 4, "weight": torch.ones(6, 1, 3, 3)},
        ValueError,
        r"groups is 4.*groups must divide the output channels",
    ),
    "groups zero": ({"groups": 0}, ValueError, r"groups is 0"),
    "bias shape": (
        {"bias": torch.ones(4)},
        ValueError,
        r"bias has shape \(4,\); \(6,\) is needed: one value per output channel",
    ),
    "kernel larger than the input": (
        {"x": torch.ones(2, 4, 1, 8), "padding": 0},
        ValueError,
        r"3x3 kernel .*does not fit a 1x8 input.*larger input or more padding",
    ),
    "sites resolution": (
        {"stride": 2},
        ValueError,
        r"sites describe a 8x8 grid but stride \(2, 2\) on a 8x8 input yields 4x4; "
        r"build the mask at output resolution",
    ),
    "sites batch": (
        {"sites": full_sites(1, 8, 8)},
        ValueError,
        r"sites are for 1 images but x has 2.*expand the mask",
    ),
    "residual shape": (
        {"residual": torch.ones(2, 6, 8, 7)},
        ValueError,
        r"residual has shape \(2, 6, 8, 7\); \(2, 6, 8, 8\) is needed",
    ),
    "activation": ({"activation": "gelu"}, ValueError, r"activation is 'gelu'; 'none' or 'relu'"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_with_its_name_and_a_way_out(name):
    changes, error, message = BAD_INPUTS[name]
    arguments = {
        "x": GOOD_X,
        "weight": GOOD_WEIGHT,
        "sites": full_sites(2, 8, 8),
        "padding": 1,
        **changes,
    }
    with pytest.raises(error, match=message):
        sampled_conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)
