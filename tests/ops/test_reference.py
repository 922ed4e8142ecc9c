"""The truth of the other tests, against loops that a reader can check by eye, and autograd."""

import math

import pytest
import torch

from sparsight.ops import reference


def loop_conv(x, weight, bias, mask, stride, padding, dilation, groups):
    """The definition: a sum over taps and channels at every site."""
    batch, _, height, width = x.shape
    out_channels, per_group, kernel_h, kernel_w = weight.shape
    y = torch.zeros(batch, out_channels, *mask.shape[2:], dtype=x.dtype)
    for b, _, oy, ox in mask.nonzero().tolist():
        for o in range(out_channels):
            first = o // (out_channels // groups) * per_group
            total = 0.0 if bias is None else bias[o].item()
            for c in range(per_group):
                for ky in range(kernel_h):
                    for kx in range(kernel_w):
                        iy = oy * stride[0] - padding[0] + ky * dilation[0]
                        ix = ox * stride[1] - padding[1] + kx * dilation[1]
                        if 0 <= iy < height and 0 <= ix < width:
                            total += (x[b, first + c, iy, ix] * weight[o, c, ky, kx]).item()
            y[b, o, oy, ox] = total
    return y


def loop_interpolate(features, mask, log_kernel, eps):
    """The definition: mask * Y + (1 - mask) * sum K M Y / (sum K M [+ eps])."""
    batch, channels, height, width = features.shape
    radius = log_kernel.shape[0] // 2
    y = torch.zeros_like(features)
    for b in range(batch):
        for py in range(height):
            for px in range(width):
                above, below = torch.zeros(channels, dtype=features.dtype), 0.0
                for dy in range(-radius, radius + 1):
                    for dx in range(-radius, radius + 1):
                        qy, qx = py + dy, px + dx
                        if 0 <= qy < height and 0 <= qx < width:
                            kernel = math.exp(log_kernel[dy + radius, dx + radius].item())
                            weight = kernel * float(mask[b, 0, qy, qx])
                            above += weight * features[b, :, qy, qx]
                            below += weight
                if eps is not None:
                    below += eps
                filled = above / below if below > 0 else torch.zeros_like(above)
                m = float(mask[b, 0, py, px])
                y[b, :, py, px] = m * features[b, :, py, px] + (1 - m) * filled
    return y


@pytest.mark.parametrize("density", [0.0, "one", 0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_equals_the_loops(draw, conv_case, groups, density):
    case = conv_case(
        draw(0),
        batch=2,
        in_channels=4,
        out_channels=4,
        size=(5, 4),
        kernel=(3, 2),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
        groups=groups,
        density=density,
    )
    x, weight, bias = case.x.double(), case.weight.double(), case.bias.double()
    expected = loop_conv(x, weight, bias, case.mask, **case.numbers)
    torch.testing.assert_close(case.run_reference(torch.float64), expected)


def test_residual_comes_before_relu_and_only_at_sites(draw):
    x = torch.tensor([1.0, 1.0, 1.0, 1.0]).view(1, 1, 2, 2)
    residual = torch.tensor([-3.0, 2.0, -0.5, 5.0]).view(1, 1, 2, 2)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 2, 2)
    weight = torch.ones(1, 1, 1, 1)
    plain = reference.sampled_conv2d(x, weight, None, mask, residual=residual)
    clamped = reference.sampled_conv2d(x, weight, None, mask, residual=residual, relu=True)
    assert plain.flatten().tolist() == [-2.0, 3.0, 0.5, 0.0]
    assert clamped.flatten().tolist() == [0.0, 3.0, 0.5, 0.0]


@pytest.mark.parametrize("eps", [None, 1e-5, 0.3])
@pytest.mark.parametrize("kind", ["empty", "one", "hard", "full", "soft", "soft with 0 and 1"])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_interpolate_equals_the_loops(draw, window, kind, eps):
    d = draw(1)
    features = d.normal(2, 2, 4, 5).double()
    log_kernel = d.normal(window, window).double()
    if kind.startswith("soft"):
        mask = d.uniform(2, 1, 4, 5).double()
        if kind != "soft":
            mask = torch.where(mask < 0.4, 0.0, torch.where(mask > 0.7, 1.0, mask))
    else:
        mask = d.mask(2, 4, 5, {"empty": 0.0, "one": "one", "hard": 0.4, "full": 1.0}[kind])
    torch.testing.assert_close(
        reference.interpolate(features, mask, log_kernel, eps),
        loop_interpolate(features, mask, log_kernel, eps),
    )


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("window", [1, 3, 7])
def test_written_out_gradient_equals_autograd(draw, window, hard, eps):
    d = draw(2)
    features = d.normal(2, 3, 6, 5).double().requires_grad_()
    log_kernel = d.normal(window, window).double().requires_grad_()
    mask = d.mask(2, 6, 5, 0.4) if hard else d.uniform(2, 1, 6, 5).double().requires_grad_()
    y = reference.interpolate(features, mask, log_kernel, eps)
    grad = d.normal(*y.shape).double()
    inputs = (features, log_kernel) if hard else (features, mask, log_kernel)
    expected = torch.autograd.grad(y, inputs, grad)
    made = reference.interpolate_backward(
        grad, features.detach(), mask.detach(), log_kernel.detach(), eps
    )
    if hard:
        assert made[1].shape == ()
        assert made[1].item() == 0
        made = (made[0], made[2])
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_mask_gradient_at_zero_is_the_one_sided_derivative(draw):
    """Autograd of a where() would call it 0; the formula is differentiable from above."""
    d = draw(3)
    features, grad = d.normal(1, 3, 4, 4).double(), d.normal(1, 3, 4, 4).double()
    log_kernel = d.normal(3, 3).double()
    mask = d.mask(1, 4, 4, 0.4).double()
    _, slope, _ = reference.interpolate_backward(grad, features, mask, log_kernel, None)
    covered = reference.interpolate(torch.ones_like(features), mask, log_kernel, None)
    base = (grad * reference.interpolate(features, mask, log_kernel, None)).sum()
    step = 1e-7
    checked = 0
    for y, x in (mask[0, 0] == 0).nonzero().tolist():
        around = covered[0, 0, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if (around == 0).any():
            continue  # a hole that saw nothing jumps when a site appears
        moved = mask.clone()
        moved[0, 0, y, x] = step
        after = (grad * reference.interpolate(features, moved, log_kernel, None)).sum()
        torch.testing.assert_close((after - base) / step, slope[0, 0, y, x], rtol=1e-4, atol=1e-4)
        checked += 1
    assert checked > 3


@pytest.mark.parametrize("density", [0.0, "one", 0.5, 1.0])
def test_mask_from_sites_inverts_sites_from_mask(draw, density):
    mask = draw(4).mask(3, 5, 7, density)
    index, count = reference.sites_from_mask(mask)
    assert index.dtype == count.dtype == torch.int32
    assert torch.equal(reference.mask_from_sites(index, count, 5, 7), mask)
    assert torch.equal(index.sort(1).values, torch.arange(35, dtype=torch.int32).expand(3, 35))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_goes_in_and_comes_out(draw, dtype):
    d = draw(5)
    features, mask = d.normal(1, 2, 4, 4).to(dtype), d.mask(1, 4, 4, 0.5)
    kernel = torch.zeros(3, 3, dtype=dtype)
    assert reference.interpolate(features, mask, kernel, None).dtype == dtype
    assert reference.interpolate(features, mask.to(dtype), kernel, 1e-3).dtype == dtype
    made = reference.interpolate_backward(features, features, mask.to(dtype), kernel, None)
    assert all(t.dtype == dtype and t.isfinite().all() for t in made)
    weight = d.normal(2, 2, 1, 1).to(dtype)
    assert reference.sampled_conv2d(features, weight, None, mask).dtype == dtype
