"""The plain-aten deformable convolution, against torchvision's."""

import pytest
import torch
from torchvision.ops import deform_conv2d as torchvision_deform

from sparsight.ops import deform_reference, sites_from_mask
from sparsight.ops.conv import output_size

# (kernel, stride, padding, dilation)
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 2), (2, 1), (1, 2), (1, 3)),
    ((1, 1), (1, 2), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (2, 2), (2, 2)),
]
# (weight groups, offset groups, whether modulated, reach of the offsets in px)
KINDS = [(1, 1, False, 0.7), (1, 1, True, 3.0), (4, 2, True, 3.0), (2, 8, False, 30.0)]


def make_inputs(draw, geometry, kind, dtype=torch.float64):
    """x, offset, weight, bias, modulation or None; and stride, padding, dilation."""
    kernel, stride, padding, dilation = geometry
    groups, offset_groups, modulated, reach = kind
    d, size, taps = draw(0), (9, 11), kernel[0] * kernel[1]
    out = output_size(size, kernel, stride, padding, dilation)
    tensors = [
        d.normal(2, 8, *size),
        d.normal(2, 2 * offset_groups * taps, *out) * reach,
        d.normal(12, 8 // groups, *kernel),
        d.normal(12),
        d.uniform(2, offset_groups * taps, *out) if modulated else None,
    ]
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    return [None if t is None else t.to(dtype) for t in tensors], numbers


def leaves(tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def gradients(y, inputs, grad):
    return torch.autograd.grad(y, [t for t in inputs if t is not None], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_reference_equals_torchvision_with_gradients(draw, geometry, kind, dtype):
    tensors, numbers = make_inputs(draw, geometry, kind, dtype)
    ours, theirs = leaves(tensors), leaves(tensors)
    x, offset, weight, bias, modulation = theirs
    expected = torchvision_deform(x, offset, weight, bias, mask=modulation, **numbers)
    made = deform_reference.deform_conv2d(*ours, **numbers)
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(made, expected, **bound)
    grad = draw(1).normal(*expected.shape).to(dtype)
    pairs = zip(gradients(made, ours, grad), gradients(expected, theirs, grad), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, **bound)


@pytest.mark.parametrize("density", [0.0, "one", 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_written_out_gradients_equal_those_of_autograd(draw, kind, density):
    tensors, numbers = make_inputs(draw, GEOMETRIES[1], kind)
    x, offset, weight, bias, modulation = inputs = leaves(tensors)
    mask = draw(2).mask(2, *offset.shape[2:], density)
    y = deform_reference.sampled_deform_conv2d(
        x, offset, weight, bias, mask, modulation=modulation, **numbers
    )
    grad = torch.where(mask, draw(3).normal(*y.shape).double(), 0.0)
    expected = gradients(y, inputs, grad)
    sites = sites_from_mask(mask)
    made = deform_reference.sampled_deform_conv2d_backward(
        grad, *tensors[:3], tensors[4], sites.index, sites.count, **numbers
    )
    made = [*made[:3], grad.sum((0, 2, 3)), *made[3:]]
    for a, b in zip(made, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_modulation_of_nobody_has_a_scalar_gradient(draw):
    (x, offset, weight, _, _), numbers = make_inputs(draw, GEOMETRIES[0], KINDS[0])
    sites = sites_from_mask(torch.ones(2, 1, 9, 11, dtype=torch.bool))
    grad = torch.ones(2, 12, 9, 11).double()
    made = deform_reference.sampled_deform_conv2d_backward(
        grad, x, offset, weight, None, sites.index, sites.count, **numbers
    )
    assert torch.equal(made[3], torch.zeros(()).double())


def test_gradients_off_the_sites_are_zero_whatever_lies_there(draw):
    tensors, numbers = make_inputs(draw, GEOMETRIES[0], KINDS[1])
    mask = draw(4).mask(2, 9, 11, 0.3)
    tensors[1] = torch.where(mask, tensors[1], torch.nan)
    tensors[4] = torch.where(mask, tensors[4], torch.nan)
    x, offset, weight, bias, modulation = inputs = leaves(tensors)
    y = deform_reference.sampled_deform_conv2d(
        x, offset, weight, bias, mask, modulation=modulation, **numbers
    )
    for gradient in gradients(y, inputs, torch.ones_like(y)):
        assert gradient.isfinite().all()
        if gradient.shape[2:] == mask.shape[2:] and gradient.shape[1] != 8:
            assert not torch.where(mask, 0.0, gradient).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_fraction_of_far_positions(draw, dtype):
    """At x = 300 bfloat16 counts in steps of 2: the sum must be made in float32."""
    x = torch.zeros(1, 1, 1, 400)
    x[..., 301] = 1.0
    offset = torch.zeros(1, 2, 1, 400)
    offset[:, 1] = 0.25
    y = deform_reference.deform_conv2d(
        x.to(dtype), offset.to(dtype), torch.ones(1, 1, 1, 1).to(dtype)
    )
    assert y.dtype == dtype
    assert (y[..., 300].item(), y[..., 301].item()) == (0.25, 0.75)
