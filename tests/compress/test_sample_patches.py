"""Windows at sampled positions are what the convolution reads: times the filters, its output."""

import pytest
import torch
from torch import nn

from sparsight.compress.sample_patches import draw_positions, gather_positions, gather_windows


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (2, 0)},
        {"kernel_size": 5, "stride": 2, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_windows_times_filters_are_the_output(options, memory_format):
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 6, **options).double()
    x = torch.randn(3, 4, 9, 13, generator=g).double().contiguous(memory_format=memory_format)
    out = conv(x)
    (shares,) = draw_positions([3], 20, seed=1)
    windows = gather_windows(x, conv, shares, (out.shape[2], out.shape[3]))
    expected = windows @ conv.weight.flatten(1).T
    if conv.bias is not None:
        expected = expected + conv.bias
    torch.testing.assert_close(gather_positions(out, shares), expected)


def test_positions_are_uniform_independent_and_fixed():
    shares = draw_positions([50, 30], 40, seed=3)
    again = draw_positions([50, 30], 40, seed=3)
    assert [s.shape for s in shares] == [(50, 40, 2), (30, 40, 2)]
    assert all(torch.equal(a, b) for a, b in zip(shares, again, strict=True))
    assert not torch.equal(shares[0], draw_positions([50, 30], 40, seed=4)[0])
    assert not torch.equal(shares[0][0], shares[0][1])
    counted = gather_positions(
        torch.arange(12.0).view(1, 1, 3, 4).expand(50, -1, -1, -1), shares[0]
    )
    histogram = counted.flatten().long().bincount(minlength=12)
    assert (histogram - 2000 / 12).abs().max() < 60  # five standard deviations


def test_the_last_share_stays_inside():
    shares = torch.full((1, 1, 2), 1 - 2**-54).double()
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert gather_positions(x, shares).item() == 5
