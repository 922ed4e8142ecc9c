"""Interpolations: identity on sites, convex combination in holes, zero where nothing is seen."""

import math

import pytest
import torch

from sparsight.nn import (
    AveragePoolInterpolation,
    ConvInterpolation,
    NearestInterpolation,
    RBFInterpolation,
    ZeroFill,
)

EXACT = [RBFInterpolation, ConvInterpolation, AveragePoolInterpolation, NearestInterpolation]
PUBLISHED = [lambda: RBFInterpolation(eps=1e-5), lambda: ConvInterpolation(eps=1e-5)]
ALL = [*EXACT, *PUBLISHED, ZeroFill]
DENSITIES = [0.0, 0.02, 0.3, 1.0]


def case(density, height=15, width=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 5, height, width, generator=generator)
    mask = torch.rand(2, 1, height, width, generator=generator) < density
    return features, mask


def loop_interpolate(features, mask, kernel, eps):
    """The formula, position by position, in float64."""
    features, mask, kernel = features.double(), mask.double(), kernel.double()
    radius = kernel.shape[0] // 2
    batch, _, height, width = features.shape
    out = torch.zeros_like(features)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                total, value = eps, torch.zeros(features.shape[1], dtype=torch.float64)
                for v in range(max(0, y - radius), min(height, y + radius + 1)):
                    for u in range(max(0, x - radius), min(width, x + radius + 1)):
                        weight = kernel[v - y + radius, u - x + radius] * mask[b, 0, v, u]
                        total = total + weight
                        value = value + weight * features[b, :, v, u]
                filled = value / total if total > 0 else value
                m = mask[b, 0, y, x]
                out[b, :, y, x] = m * features[b, :, y, x] + (1 - m) * filled
    return out


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("soft", [False, True])
def test_sites_are_kept_exactly(make, density, soft):
    features, mask = case(density)
    filled = make()(features, mask.float() if soft else mask)
    where = mask.expand_as(features)
    assert torch.equal(filled[where], features[where])


@pytest.mark.parametrize("make", ALL)
def test_holes_that_see_no_site_are_zero(make):
    features, mask = case(0.0, height=20)
    mask[:, :, 0, 0] = True
    filled = make()(features, mask)
    assert (filled[:, :, 4:] == 0).all() and (filled[:, :, :, 4:] == 0).all()


@pytest.mark.parametrize("make", EXACT)
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_holes_are_convex_combinations(make, density):
    features, mask = case(density)
    interpolation = make()
    assert interpolation.preserves_constants
    filled = interpolation(features, mask)
    sites = torch.where(mask, features, torch.nan)
    low = sites.nan_to_num(torch.inf).amin((2, 3), keepdim=True)
    high = sites.nan_to_num(-torch.inf).amax((2, 3), keepdim=True)
    seen = torch.nn.functional.max_pool2d(mask.float(), 7, 1, 3) > 0
    inside = (filled >= low - 1e-5) & (filled <= high + 1e-5)
    assert (inside | ~seen).all()
    ones = interpolation(torch.ones_like(features), mask)
    assert torch.allclose(ones, seen.float().expand_as(ones), atol=1e-6)


@pytest.mark.parametrize("make", PUBLISHED)
def test_published_normalisation_shrinks(make):
    interpolation = make()
    assert not interpolation.preserves_constants
    features, mask = case(0.02)
    assert interpolation(torch.ones_like(features), mask).min() < 0.999


def test_published_rbf_returns_what_the_paper_code_does_at_its_initial_width():
    """0.2 % of the feature at distance 2; nearly all at distance 1 (spec, section 3)."""
    mask = torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    mask[..., 3] = True
    filled = RBFInterpolation(eps=1e-5)(torch.ones(1, 1, 1, 7), mask)[0, 0, 0].tolist()
    assert math.isclose(filled[4], 0.9994, abs_tol=1e-3)
    assert math.isclose(filled[5], 0.0022, abs_tol=2e-4)
    assert (RBFInterpolation()(torch.ones(1, 1, 1, 7), mask) == 1).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("window", [3, 7])
def test_rbf_and_conv_equal_the_formula(window, eps, soft):
    features, mask = case(0.15, height=6, width=9)
    if soft:
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1))
    squares = (torch.arange(window).double() - window // 2) ** 2
    distance = squares[:, None] + squares[None, :]
    width = 0.9
    gaussian = width**2 / (2 * math.pi) * torch.exp(-0.5 * width**2 * distance)
    rbf = RBFInterpolation(window=window, width=width, eps=eps)
    conv = ConvInterpolation(window=window, eps=eps)
    with torch.no_grad():
        conv.weight.normal_()
    for module, kernel in ((rbf, gaussian), (conv, conv.weight.detach().abs())):
        expected = loop_interpolate(features, mask, kernel, eps or 0.0)
        assert torch.allclose(module(features, mask).double(), expected, atol=2e-5)


def test_average_is_the_mean_of_the_sites_in_the_window():
    features, mask = case(0.3, height=8, width=9)
    expected = loop_interpolate(features, mask, torch.ones(5, 5), 0.0)
    filled = AveragePoolInterpolation(window=5)(features, mask)
    assert torch.allclose(filled.double(), expected, atol=1e-5)


@pytest.mark.parametrize("window", [3, 7, 11])
def test_nearest_is_the_nearest_site_first_in_raster_order(window):
    features, mask = case(0.05, height=16, width=17)
    filled = NearestInterpolation(window=window)(features, mask)
    radius = window // 2
    for b in range(2):
        sites = mask[b, 0].nonzero().tolist()
        for y in range(16):
            for x in range(17):
                near = [
                    ((v - y) ** 2 + (u - x) ** 2, v, u)
                    for v, u in sites
                    if max(abs(v - y), abs(u - x)) <= radius
                ]
                if near:
                    _, v, u = min(near)
                    assert torch.equal(filled[b, :, y, x], features[b, :, v, u])


def test_soft_nearest_blends_with_the_nearest_position_above_one_half():
    features = torch.tensor([10.0, 20.0, 30.0]).view(1, 1, 1, 3)
    mask = torch.tensor([0.75, 0.25, 0.1]).view(1, 1, 1, 3).requires_grad_()
    filled = NearestInterpolation()(features, mask)
    assert filled.flatten().tolist() == pytest.approx([10.0, 12.5, 12.0])
    filled.sum().backward()
    assert mask.grad.flatten().tolist() == pytest.approx([0.0, 10.0, 20.0])


@pytest.mark.parametrize("make", ALL)
def test_features_off_the_sites_are_never_read(make):
    features, mask = case(0.3)
    poisoned = torch.where(mask, features, torch.nan)
    assert torch.equal(make()(features, mask), make()(poisoned, mask))


@pytest.mark.parametrize("make", ALL)
def test_gradcheck_with_a_soft_mask(make):
    torch.manual_seed(0)
    interpolation = make().double()
    features = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 1, 4, 3, dtype=torch.float64) * 0.4 + 0.05
    mask[..., 2, 1] = 0.9
    mask.requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in interpolation.parameters()]
    names = [n for n, _ in interpolation.named_parameters()]

    def run(features, mask, *values):
        return torch.func.functional_call(
            interpolation, dict(zip(names, values, strict=True)), (features, mask)
        )

    assert torch.autograd.gradcheck(run, (features, mask, *parameters))


@pytest.mark.parametrize("make", [*EXACT[:2], *PUBLISHED])
def test_hard_mask_has_a_gradient_for_features_and_kernel(make):
    interpolation = make()
    features, mask = case(0.3)
    features.requires_grad_()
    interpolation(features, mask).square().sum().backward()
    (parameter,) = interpolation.parameters()
    assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    holes = ~mask.expand_as(features)
    assert (features.grad[holes] == 0).all() and (features.grad[~holes] != 0).any()


def test_zero_weight_of_a_learned_kernel_has_a_finite_gradient():
    interpolation = ConvInterpolation(window=3)
    with torch.no_grad():
        interpolation.weight[0, 0] = 0.0
    features, mask = case(0.3)
    interpolation(features, mask).sum().backward()
    assert interpolation.weight.grad.isfinite().all()


def test_sign_of_the_width_does_not_matter():
    features, mask = case(0.1)
    expected = RBFInterpolation(width=0.7)(features, mask)
    assert torch.equal(RBFInterpolation(width=-0.7)(features, mask), expected)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1)])
def test_tiny_maps(make, size):
    features, mask = case(1.0, *size)
    assert torch.equal(make()(features, mask), features)
    assert (make()(features, ~mask) == 0).all()


@pytest.mark.parametrize("make", ALL)
def test_bfloat16_model_stays_close(make):
    features, mask = case(0.3)
    expected = make()(features.bfloat16().float(), mask)
    filled = make().bfloat16()(features.bfloat16(), mask)
    assert filled.dtype == torch.bfloat16
    assert torch.allclose(filled.float(), expected, atol=0.05)


@pytest.mark.parametrize("make", ALL)
def test_mask_of_another_size_is_refused(make):
    features, mask = case(0.3)
    with pytest.raises(ValueError, match=r"mask"):
        make()(features, mask[..., :-1])


@pytest.mark.parametrize("window", [0, 2, -3, 3.0])
def test_bad_window_is_refused(window):
    for kind in EXACT:
        with pytest.raises(ValueError, match=r"window is .*odd integer.*pass 7"):
            kind(window=window)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_bad_eps_is_refused(eps):
    for kind in (RBFInterpolation, ConvInterpolation):
        with pytest.raises(ValueError, match=r"eps is .*pass None"):
            kind(eps=eps)


@pytest.mark.parametrize("width", [0.0, math.nan, math.inf])
def test_bad_width_is_refused(width):
    with pytest.raises(ValueError, match=r"width is .*for example 3.0"):
        RBFInterpolation(width=width)
