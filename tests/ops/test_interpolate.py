"""Laws of `interpolate`, through the public door; the instruction sets are in test_cpu.py."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from sparsight.ops import cpu, interpolate, reference

DTYPES = [torch.float32, torch.float64]
DENSITIES = [0.0, "one", 0.01, 0.1, 0.5, 1.0]


def close(dtype):
    """assert_close arguments: a mean of at most 225 features."""
    return {"rtol": 0.0, "atol": 3e-6 if dtype == torch.float32 else 1e-12}


def seen_sites(mask, window):
    """How many sites each position sees: (B, 1, H, W)."""
    return F.conv2d(mask.double(), torch.ones(1, 1, window, window).double(), padding=window // 2)


def windowed_extremes(features, mask, window):
    """Smallest and largest site in the window of every position; +-inf where there is none."""
    high = F.max_pool2d(torch.where(mask, features, -math.inf), window, 1, window // 2)
    low = -F.max_pool2d(torch.where(mask, -features, -math.inf), window, 1, window // 2)
    return low, high


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("density", DENSITIES)
def test_sites_keep_their_features_bit_for_bit(draw, rbf_log_kernel, density, eps, dtype):
    d = draw(0)
    features, mask = d.normal(2, 17, 9, 12).to(dtype), d.mask(2, 9, 12, density)
    y = interpolate(features, mask, rbf_log_kernel(7, 3.0, dtype), eps=eps)
    at_sites = mask.expand_as(y)
    assert torch.equal(y[at_sites], features[at_sites])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("density", DENSITIES)
def test_holes_are_convex_combinations_of_the_sites_they_see(
    draw, rbf_log_kernel, density, width, dtype
):
    d = draw(1)
    features, mask = d.normal(2, 5, 13, 11).to(dtype), d.mask(2, 13, 11, density)
    y = interpolate(features, mask, rbf_log_kernel(7, width, dtype))
    low, high = windowed_extremes(features, mask, 7)
    slack = close(dtype)["atol"]
    seen = (seen_sites(mask, 7) > 0).expand_as(y)
    assert (y[seen] >= low[seen] - slack).all()
    assert (y[seen] <= high[seen] + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [0.1, 3.0, 30.0])
def test_constant_features_stay_constant_where_a_site_is_seen(draw, rbf_log_kernel, width, dtype):
    mask = draw(2).mask(3, 15, 14, 0.1)
    y = interpolate(torch.full((3, 4, 15, 14), 7.25, dtype=dtype), mask, rbf_log_kernel(7, width))
    seen = (seen_sites(mask, 7) > 0).expand_as(y)
    assert seen.any()
    assert not seen.all()
    torch.testing.assert_close(y[seen], torch.full_like(y[seen], 7.25), **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("density", [0.0, "one", 0.01])
def test_holes_that_see_no_site_are_zero(draw, rbf_log_kernel, density, eps, dtype):
    d = draw(3)
    features, mask = d.normal(2, 3, 16, 17).to(dtype), d.mask(2, 16, 17, density)
    y = interpolate(features, mask, rbf_log_kernel(7, 3.0, dtype), eps=eps)
    blind = (seen_sites(mask, 7) == 0).expand_as(y)
    assert blind.any()
    assert torch.equal(y[blind], torch.zeros_like(y[blind]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("width", [0.5, 1.0, 3.0])
def test_eps_equals_the_published_formula(draw, rbf_log_kernel, width, hard, dtype):
    """conv(Y M) / (conv(M) + 1e-5) with the Gaussian lam^2 / 2 pi exp(-lam^2 d^2 / 2)."""
    d = draw(4)
    channels = 6
    features = d.normal(2, channels, 12, 10).double()
    mask = d.mask(2, 12, 10, 0.2) if hard else d.uniform(2, 1, 12, 10).double()
    log_kernel = rbf_log_kernel(7, width, torch.float64) + math.log(width**2 / (2 * math.pi))
    kernel = log_kernel.exp().expand(channels, 1, 7, 7)
    soft = mask.double()
    above = F.conv2d(features * soft, kernel, padding=3, groups=channels)
    below = F.conv2d(soft, kernel[:1], padding=3)
    published = soft * features + (1 - soft) * above / (below + 1e-5)
    y = interpolate(
        features.to(dtype),
        mask if hard else mask.to(dtype),
        log_kernel.to(dtype),
        eps=1e-5,
    )
    # float32 rounds log_kernel by half an ULP of its largest entry, 81, before the exponential.
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(y.double(), published, rtol=0.0, atol=tolerance)


def test_published_formula_loses_far_sites_and_the_exact_one_does_not(rbf_log_kernel):
    features = torch.zeros(1, 1, 1, 7)
    features[..., 0] = 1.0
    mask = torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    mask[..., 0] = True
    log_kernel = rbf_log_kernel(7, 3.0) + math.log(9 / (2 * math.pi))
    exact = interpolate(features, mask, log_kernel).flatten()
    published = interpolate(features, mask, log_kernel, eps=1e-5).flatten()
    torch.testing.assert_close(exact, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    assert published[2] < 0.0025
    assert published[3] < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True])
def test_a_huge_width_takes_the_nearest_site(draw, rbf_log_kernel, soft, dtype):
    """lam = 30: the kernel itself is exp(-450 d^2), far below the smallest float32."""
    d = draw(5)
    height, width = 11, 13
    features, mask = d.normal(1, 3, height, width).to(dtype), d.mask(1, height, width, 0.08)
    given = mask.to(dtype) if soft else mask
    y = interpolate(features, given, rbf_log_kernel(7, 30.0, dtype))
    sites = mask[0, 0].nonzero()
    for p in (~mask[0, 0]).nonzero():
        offset = sites - p
        inside = offset.abs().amax(1) <= 3
        if not inside.any():
            assert (y[0, :, p[0], p[1]] == 0).all()
            continue
        squared = (offset**2).sum(1)
        nearest = sites[inside & (squared == squared[inside].min())]
        expected = features[0, :, nearest[:, 0], nearest[:, 1]].mean(1)  # ties share
        torch.testing.assert_close(y[0, :, p[0], p[1]], expected, **close(dtype))


@pytest.mark.parametrize("soft", [False, True])
def test_a_kernel_of_any_size_is_normalised_away(draw, rbf_log_kernel, soft):
    d = draw(6)
    features = d.normal(1, 8, 9, 9)
    mask = d.uniform(1, 1, 9, 9) if soft else d.mask(1, 9, 9, 0.2)
    log_kernel = rbf_log_kernel(5, 1.0)
    y = interpolate(features, mask, log_kernel)
    for offset in (-1000.0, 1000.0):
        torch.testing.assert_close(
            interpolate(features, mask, log_kernel + offset), y, rtol=0.0, atol=1e-3
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_filling_then_1x1_equals_1x1_then_filling_where_every_hole_sees_a_site(
    draw, rbf_log_kernel, bias, dtype
):
    d = draw(7)
    features, mask = d.normal(2, 16, 12, 15).to(dtype), d.mask(2, 12, 15, 0.2)
    mask[..., ::5, ::5] = True
    assert (seen_sites(mask, 7) > 0).all()
    weight = d.normal(8, 16, 1, 1).to(dtype) / 4
    shift = d.normal(8).to(dtype) if bias else None
    kernel = rbf_log_kernel(7, 1.5, dtype)
    first = F.conv2d(interpolate(features, mask, kernel), weight, shift)
    last = interpolate(F.conv2d(features, weight, shift), mask, kernel)
    torch.testing.assert_close(
        first, last, rtol=0.0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


def test_filling_then_1x1_differs_from_1x1_then_filling_at_uncovered_holes(rbf_log_kernel):
    """Why the law needs its condition: the bias reaches a hole that sees no site only one way."""
    features = torch.zeros(1, 1, 1, 9)
    mask = torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 0] = True
    weight, bias = torch.ones(1, 1, 1, 1), torch.ones(1)
    kernel = rbf_log_kernel(3, 1.0)
    first = F.conv2d(interpolate(features, mask, kernel), weight, bias)
    last = interpolate(F.conv2d(features, weight, bias), mask, kernel)
    assert first[..., 8].item() == 1.0
    assert last[..., 8].item() == 0.0


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 4)])
@pytest.mark.parametrize("density", [0.0, "one", 0.5, 1.0])
def test_window_larger_than_the_map(draw, rbf_log_kernel, density, size, eps):
    d = draw(8)
    features, mask = d.normal(3, 4, *size), d.mask(3, *size, density)
    kernel = rbf_log_kernel(15, 0.7)
    y = interpolate(features, mask, kernel, eps=eps)
    truth = reference.interpolate(features.double(), mask, kernel.double(), eps)
    torch.testing.assert_close(y.double(), truth, rtol=0.0, atol=1e-5)
    if density == 0.0:
        assert not y.any()


def test_window_larger_than_the_kernel_limit_runs_the_reference(draw, rbf_log_kernel):
    d = draw(9)
    features, mask = d.normal(1, 4, 10, 9), d.mask(1, 10, 9, 0.1)
    kernel = rbf_log_kernel(cpu.MAX_WINDOW + 2, 0.5)
    y = interpolate(features, mask, kernel)
    truth = reference.interpolate(features.double(), mask, kernel.double(), None)
    torch.testing.assert_close(y.double(), truth, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("density", DENSITIES)
def test_float_mask_of_zeros_and_ones_equals_the_bool_mask(
    draw, rbf_log_kernel, density, eps, dtype
):
    d = draw(10)
    features, mask = d.normal(2, 9, 10, 8).to(dtype), d.mask(2, 10, 8, density)
    kernel = rbf_log_kernel(7, 1.3, dtype)
    torch.testing.assert_close(
        interpolate(features, mask.to(dtype), kernel, eps=eps),
        interpolate(features, mask, kernel, eps=eps),
        **close(dtype),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_nan_off_the_sites_never_leaks_with_a_bool_mask(draw, rbf_log_kernel, eps, dtype):
    d = draw(11)
    clean, mask = d.normal(2, 17, 9, 9).to(dtype), d.mask(2, 9, 9, 0.3)
    kernel = rbf_log_kernel(7, 1.0)
    poisoned = torch.where(mask, clean, torch.nan)
    assert torch.equal(
        interpolate(poisoned, mask, kernel, eps=eps), interpolate(clean, mask, kernel, eps=eps)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_off_the_sites_never_leaks_into_gradients(draw, rbf_log_kernel, dtype):
    d = draw(12)
    clean, mask = d.normal(2, 5, 9, 9).to(dtype), d.mask(2, 9, 9, 0.3)
    grads = []
    for values in (clean, torch.where(mask, clean, torch.nan)):
        features = values.requires_grad_()
        kernel = rbf_log_kernel(7, 1.0, dtype).requires_grad_()
        interpolate(features, mask, kernel).square().sum().backward()
        grads.append((features.grad, kernel.grad))
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    assert not grads[0][0][~mask.expand_as(clean)].any()


def test_nan_at_a_site_reaches_the_holes_that_see_it_and_no_others(rbf_log_kernel):
    features = torch.ones(1, 2, 1, 9)
    features[..., 4] = torch.nan
    mask = torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    mask[..., [0, 4, 8]] = True
    y = interpolate(features, mask, rbf_log_kernel(3, 1.0))
    assert y[0, 0, 0].isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_a_tap_of_weight_zero_is_not_seen(draw):
    """log_kernel = -inf: a hole that sees sites through such taps only is uncovered, so 0."""
    kernel = torch.full((3, 3), -math.inf)
    kernel[1, 0] = 0.0  # only the left neighbour counts
    mask = torch.tensor([True, False, False, True]).view(1, 1, 1, 4)
    for given in (mask, mask.float()):
        y = interpolate(torch.tensor([3.0, 0.0, 0.0, 5.0]).view(1, 1, 1, 4), given, kernel)
        assert y.flatten().tolist() == [3.0, 3.0, 0.0, 5.0]


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 9, 7), (2, 1, 9, 7), (2, 8, 1, 1)])
def test_output_is_channels_last_whatever_the_input(draw, layouts, rbf_log_kernel, shape, hard):
    d = draw(13)
    x, kernel = d.normal(*shape), rbf_log_kernel(3, 1.0)
    b, _, h, w = shape
    mask = d.mask(b, h, w, 0.5) if hard else d.uniform(b, 1, h, w)
    outs = [interpolate(place(x), mask, kernel) for place in layouts.values()]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outs)
    assert all(torch.equal(y, outs[0]) for y in outs)


@pytest.mark.parametrize("hard", [True, False])
def test_strided_masks_and_kernels_are_read_right(draw, hard):
    d = draw(14)
    features = d.normal(2, 4, 6, 5)
    wide = d.uniform(2, 1, 6, 10)
    wide = wide < 0.4 if hard else wide
    kernel = d.normal(5, 10)[:, ::2]
    mask = wide[..., ::2]
    assert torch.equal(
        interpolate(features, mask, kernel),
        interpolate(features, mask.contiguous(), kernel.contiguous()),
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_half_precision_is_computed_in_float32(draw, rbf_log_kernel, eps, hard, dtype, bound):
    d = draw(15)
    features = d.normal(2, 5, 8, 9).to(dtype)
    mask = d.mask(2, 8, 9, 0.3) if hard else d.uniform(2, 1, 8, 9)
    kernel = rbf_log_kernel(7, 3.0)
    y = interpolate(features, mask, kernel, eps=eps)
    assert y.dtype == dtype
    truth = reference.interpolate(
        features.double(), mask if hard else mask.double(), kernel.double(), eps
    )
    assert (y.double() - truth).abs().max() < bound
    assert torch.equal(y, interpolate(features.float(), mask, kernel, eps=eps).to(dtype))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("density", ["one", 0.4])
def test_gradcheck_of_every_input(draw, density, eps, hard):
    d = draw(16)
    features = d.normal(2, 2, 4, 3).double().requires_grad_()
    log_kernel = d.normal(3, 3).double().requires_grad_()
    mask = d.mask(2, 4, 3, density)
    if hard:
        torch.autograd.gradcheck(
            lambda x, k: interpolate(x, mask, k, eps=eps), (features, log_kernel)
        )
    else:
        soft = (0.05 + 0.9 * d.uniform(2, 1, 4, 3).double()).requires_grad_()
        torch.autograd.gradcheck(
            lambda x, m, k: interpolate(x, m, k, eps=eps), (features, soft, log_kernel)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3.0, 6.0, 30.0])
def test_gradients_stay_finite_where_a_float_mask_is_exactly_zero(
    draw, rbf_log_kernel, width, dtype
):
    """dI/dM at M = 0 is exp(lam^2 d^2 / 2): unbounded, it overflows, and inf * 0 is NaN."""
    d = draw(17)
    features = d.normal(1, 8, 6, 6).to(dtype).requires_grad_()
    mask = d.mask(1, 6, 6, 0.15).to(dtype).requires_grad_()
    kernel = rbf_log_kernel(7, width, dtype).requires_grad_()
    interpolate(features, mask, kernel).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (features, mask, kernel))


def test_only_the_wanted_gradients_are_made(draw, rbf_log_kernel):
    d = draw(18)
    features, mask = d.normal(1, 2, 4, 4).requires_grad_(), d.uniform(1, 1, 4, 4)
    interpolate(features, mask, rbf_log_kernel(3, 1.0)).sum().backward()
    assert features.grad is not None
    assert mask.grad is None
    with torch.inference_mode():
        assert not interpolate(features, mask, rbf_log_kernel(3, 1.0)).requires_grad


def test_concurrent_calls_are_bit_equal_to_serial_ones(draw, random_fill_case):
    cases = [random_fill_case(draw(seed)) for seed in range(100, 116)]

    def run(case):
        return interpolate(case.features, case.mask, case.log_kernel, eps=case.eps)

    serial = [run(case) for case in cases]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for y, expected, case in zip(pool.map(run, cases), serial, cases, strict=True):
                assert torch.equal(y, expected), str(case)


GOOD = {
    "features": torch.ones(2, 3, 5, 4),
    "mask": torch.ones(2, 1, 5, 4, dtype=torch.bool),
    "log_kernel": torch.zeros(3, 3),
}

BAD_INPUTS = {
    "features rank": (
        {"features": torch.ones(3, 5, 4)},
        ValueError,
        r"interpolate: features have shape \(3, 5, 4\).*unsqueeze\(0\)",
    ),
    "features dtype": (
        {"features": torch.ones(2, 3, 5, 4).int()},
        TypeError,
        r"features have dtype torch\.int32; floating point is needed: call \.float\(\)",
    ),
    "mask size": (
        {"mask": torch.ones(2, 1, 4, 5, dtype=torch.bool)},
        ValueError,
        r"mask has shape \(2, 1, 4, 5\).*\(2, 1, 5, 4\) is needed",
    ),
    "mask channels": (
        {"mask": torch.ones(2, 3, 5, 4, dtype=torch.bool)},
        ValueError,
        r"mask has shape \(2, 3, 5, 4\).*one channel",
    ),
    "mask dtype": (
        {"mask": torch.ones(2, 1, 5, 4).to(torch.uint8)},
        TypeError,
        r"mask has dtype torch\.uint8; bool or floating point is needed.*>= 0\.5",
    ),
    "log_kernel rank": (
        {"log_kernel": torch.zeros(9)},
        ValueError,
        r"log_kernel has shape \(9,\); \(K, K\) with K odd",
    ),
    "log_kernel not square": (
        {"log_kernel": torch.zeros(3, 5)},
        ValueError,
        r"log_kernel has shape \(3, 5\); \(K, K\) with K odd",
    ),
    "log_kernel even": (
        {"log_kernel": torch.zeros(4, 4)},
        ValueError,
        r"log_kernel has shape \(4, 4\); .*K odd is needed",
    ),
    "log_kernel dtype": (
        {"log_kernel": torch.zeros(3, 3).long()},
        TypeError,
        r"log_kernel has dtype torch\.int64; floating point is needed",
    ),
    "mask device": (
        {"mask": GOOD["mask"].to("meta")},
        ValueError,
        r"features are on cpu, mask on meta.*one device is needed: move them together",
    ),
    "log_kernel device": (
        {"log_kernel": GOOD["log_kernel"].to("meta")},
        ValueError,
        r"log_kernel on meta; one device is needed",
    ),
    "eps zero": ({"eps": 0.0}, ValueError, r"eps is 0\.0; None or a positive number.*1e-5"),
    "eps negative": ({"eps": -1e-5}, ValueError, r"eps is -1e-05; None or a positive number"),
    "eps nan": ({"eps": math.nan}, ValueError, r"eps is nan; None or a positive number"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_with_its_name_and_a_way_out(name):
    changes, error, message = BAD_INPUTS[name]
    arguments = {**GOOD, "eps": None, **changes}
    with pytest.raises(error, match=message):
        interpolate(
            arguments["features"],
            arguments["mask"],
            arguments["log_kernel"],
            eps=arguments["eps"],
        )


@pytest.mark.parametrize("width", [0.5, 3.0, 9.0])
def test_a_window_that_nearly_vanishes_is_divided_exactly(
    rbf_log_kernel, assert_within_bound, width
):
    """Masks down to 1e-37 beside a narrow kernel: the weights still sum to one."""
    torch.manual_seed(0)
    features = torch.randn(2, 5, 9, 11)
    mask = 10 ** (-37 * torch.rand(2, 1, 9, 11))
    kernel = rbf_log_kernel(7, width)
    for given in (mask, mask * (torch.rand_like(mask) < 0.1)):
        truth = reference.interpolate(features.double(), given.double(), kernel.double(), None)
        twin = reference.interpolate(features, given, kernel, None)
        y = interpolate(features, given, kernel)
        assert_within_bound("interpolate", y, truth, twin, features.abs().max().item(), width)


@pytest.mark.skipif(not cpu.has_bfloat16(), reason="no AVX-512 BF16 on this CPU or build")
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("channels", [1, 15, 16, 70])
def test_bfloat16_maps_give_what_their_float32_gives_rounded(rbf_log_kernel, channels, eps):
    """Forward and backward read and write bfloat16 rows; every sum is float32."""
    torch.manual_seed(0)
    features = torch.randn(2, channels, 9, 11).bfloat16()
    mask, kernel = torch.rand(2, 1, 9, 11), rbf_log_kernel(7, 1.5)
    grad = torch.randn(2, channels, 9, 11).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        given = (features.to(dtype), mask, kernel)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
        y = interpolate(*leaves, eps=eps)
        y.backward(grad.to(dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    narrow, wide = results
    assert torch.equal(narrow[0], wide[0].bfloat16())
    assert torch.equal(narrow[1], wide[1].bfloat16())
    assert narrow[2].dtype == narrow[3].dtype == torch.float32
    assert torch.equal(narrow[2], wide[2]) and torch.equal(narrow[3], wide[3])
