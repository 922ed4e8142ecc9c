"""Laws of the pooling modules; the functions behind them are tested in ops/test_pool.py."""

import pytest
import torch
from torch import nn

from sparsight import ops
from sparsight.nn import AdaptiveSoftPool2d, SoftPool1d, SoftPool2d, SoftPool3d
from sparsight.nn.pooling import PooledConv2d

POOLS = {1: SoftPool1d, 2: SoftPool2d, 3: SoftPool3d}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 1, "padding": 1},
        {"dilation": 2, "ceil_mode": True},
        {"weights": "shared"},
        {"gradient": "detached"},
    ],
)
def test_a_module_is_its_function(rank, options):
    x = torch.randn(2, 3, *[7] * rank, requires_grad=True)
    grads = []
    for y in (
        POOLS[rank](3, **options)(x),
        getattr(ops, f"soft_pool{rank}d")(x, 3, **options),
    ):
        grads.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("output", [1, 3, 4, 7, (2, 5), (None, 3), (None, None)])
@pytest.mark.parametrize("shape", [(2, 3, 7, 12), (3, 9, 4)])
def test_adaptive_pooling_equals_each_window_on_its_own(output, shape):
    x = torch.randn(shape, dtype=torch.float64)
    y = AdaptiveSoftPool2d(output)(x)
    assert y.shape == nn.AdaptiveMaxPool2d(output)(x).shape
    height, width = shape[-2:]
    rows, columns = y.shape[-2:]
    for i in range(rows):
        for j in range(columns):
            window = x[
                ...,
                i * height // rows : -(-(i + 1) * height // rows),
                j * width // columns : -(-(j + 1) * width // columns),
            ].flatten(-2)
            expected = (window.softmax(-1) * window).sum(-1)
            torch.testing.assert_close(y[..., i, j], expected)


@pytest.mark.parametrize("output", [2, (3, 4)])
def test_adaptive_pooling_passes_gradcheck(output):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(AdaptiveSoftPool2d(output), x)


@pytest.mark.parametrize("output", [2, 3])
def test_adaptive_pooling_exports(output):
    module, x = AdaptiveSoftPool2d(output), torch.randn(1, 2, 4, 6)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_settings_are_shown():
    assert repr(SoftPool2d(2)) == "SoftPool2d(kernel_size=2, stride=2, padding=0)"
    text = repr(SoftPool3d(3, dilation=2, ceil_mode=True, weights="shared", gradient="detached"))
    assert text.endswith("dilation=2, ceil_mode=True, weights='shared', gradient='detached')")
    assert repr(AdaptiveSoftPool2d((None, 2))) == "AdaptiveSoftPool2d(output_size=(None, 2))"


def test_a_pooled_convolution_shares_parameters_and_mode():
    conv = nn.Conv2d(2, 3, 3, stride=2, bias=False).eval()
    pooled = PooledConv2d.from_conv(conv, kind="soft")
    assert pooled.weight is conv.weight
    assert pooled.bias is None
    assert not pooled.training
    assert pooled.source_stride == (2, 2)
    x = torch.randn(1, 2, 8, 9)
    full = nn.functional.conv2d(x, conv.weight)
    assert torch.equal(pooled(x), ops.soft_pool2d(full, 2, ceil_mode=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SoftPool2d(2, weights="sum"), "SoftPool2d: weights is 'sum'"),
        (lambda: SoftPool1d(2, gradient="x"), "SoftPool1d: gradient is 'x'"),
        (lambda: AdaptiveSoftPool2d(0), "output_size is 0"),
        (lambda: AdaptiveSoftPool2d((1, 2, 3)), "output_size is "),
        (lambda: AdaptiveSoftPool2d(2)(torch.zeros(4, 4)), "x has shape"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
