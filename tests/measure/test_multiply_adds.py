"""Formulas of single operators, against loops and against textbook counts."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsight.measure import count_macs
from sparsight.measure.multiply_adds import (
    convolution_macs,
    interpolation_macs,
    read_footprint,
)


class Calls(nn.Module):
    """A model that calls one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def counted(function, x):
    count = count_macs(Calls(function).eval(), x)
    assert count.total == count.dense
    return count.total


@pytest.mark.parametrize(
    ("conv", "size", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (5, 7), 2 * 5 * 7 * 8 * 3 * 9),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (6, 7), 2 * 3 * 4 * 8 * 2 * 9),
        (nn.Conv2d(6, 6, 5, padding=4, dilation=2, groups=6), (8, 8), 2 * 8 * 8 * 6 * 25),
        (nn.Conv2d(6, 6, (1, 3), bias=False), (4, 5), 2 * 4 * 3 * 6 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (3, 5), 2 * 3 * 5 * 4 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (3, 5), 2 * 3 * 5 * 4 * 3 * 4),
    ],
)
def test_convolution(conv, size, expected):
    x = torch.zeros(2, conv.in_channels, *size)
    assert count_macs(conv.eval(), x).total == expected
    assert counted(lambda x: conv(x) + 1, x) == expected


def test_deformable_convolution():
    ops = pytest.importorskip("torchvision.ops")
    conv = ops.DeformConv2d(4, 6, 3, padding=1, groups=2).eval()
    x, offset = torch.zeros(2, 4, 5, 7), torch.zeros(2, 18, 5, 7)
    count = count_macs(conv, (x, offset))
    assert count.total == 2 * 5 * 7 * 6 * 2 * 9
    assert [row.kind for row in count.layers] == ["DeformConv2d"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: F.linear(x, torch.zeros(5, 4)), 3 * 2 * 4 * 5),
        (lambda x: x @ torch.zeros(4, 6), 3 * 2 * 4 * 6),
        (lambda x: torch.bmm(x, torch.zeros(3, 4, 7)), 3 * 2 * 4 * 7),
        (lambda x: torch.baddbmm(torch.zeros(3, 2, 7), x, torch.zeros(3, 4, 7)), 3 * 2 * 4 * 7),
        (lambda x: torch.addbmm(torch.zeros(2, 7), x, torch.zeros(3, 4, 7)), 3 * 2 * 4 * 7),
        (lambda x: torch.einsum("bij,kj->bik", x, torch.zeros(5, 4)), 3 * 2 * 4 * 5),
        (lambda x: torch.mv(x[0], torch.zeros(4)), 2 * 4),
        (lambda x: torch.addmv(torch.zeros(2), x[0], torch.zeros(4)), 2 * 4),
        (lambda x: torch.dot(x[0, 0], torch.zeros(4)), 4),
        (lambda x: F.relu(x) * 2 + x.mean(), 0),
    ],
)
def test_matrix_product(function, expected):
    x = torch.zeros(3, 2, 4)
    assert counted(function, x) == expected
    with torch.inference_mode():
        assert counted(function, torch.zeros(3, 2, 4)) == expected


def test_attention():
    """Projections of query, key, value and output, and the two products in between."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.zeros(3, 5, 8)
    expected = 3 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)
    was_on = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(attention, (x, x, x)).total == expected
    assert counted(lambda x: F.scaled_dot_product_attention(x, x, x), x[:, None]) == 3 * 2 * 25 * 8
    assert torch.backends.mha.get_fastpath_enabled() == was_on


def test_sampled_operators_outside_a_module():
    from sparsight import ops

    mask = torch.rand(2, 1, 5, 6) < 0.4
    x, weight = torch.zeros(2, 4, 5, 6), torch.zeros(8, 2, 3, 3)
    kernel = torch.zeros(3, 3)

    def convolve(x):
        sites = ops.sites_from_mask(mask)
        return ops.sampled_conv2d(x, weight, sites=sites, padding=1, groups=2)

    assert counted(convolve, x) == int(mask.sum()) * 8 * 2 * 9

    def deform(x):
        offset = torch.zeros(2, 18, 5, 6)
        return ops.sampled_deform_conv2d(
            x, offset, weight, sites=ops.sites_from_mask(mask), padding=1
        )

    assert counted(deform, x) == counted(convolve, x)
    expected = interpolation_macs(mask, ~mask, 3, 4)
    assert counted(lambda x: ops.interpolate(x, mask, kernel), x) == expected > 0


def test_an_unknown_operator_of_ours_is_refused():
    """Zero for an operator that multiplies would be a false saving."""
    with torch.library._scoped_library("sparsight", "FRAGMENT") as library:
        library.define("test_mystery(Tensor x) -> Tensor")
        library.impl("test_mystery", lambda x: x.clone(), "CPU")
        with pytest.raises(RuntimeError, match="sparsight::test_mystery ran outside a module"):
            counted(lambda x: torch.ops.sparsight.test_mystery(x), torch.zeros(1, 3))


def conv_record(kernel, stride, padding, dilation):
    return SimpleNamespace(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize("seed", range(12))
def test_footprint_is_what_the_convolution_reads(seed):
    """A position is in the footprint when changing it changes the output at some site."""
    random = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=random))]

    kernel, stride, dilation = (
        pick((3, 3), (1, 3), (2, 5)),
        pick((1, 1), (2, 1), (2, 2)),
        pick(1, 2),
    )
    padding = pick((0, 0), (1, 1), (2, 3))
    height, width = 9, 10
    conv = nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False, dtype=torch.float64)
    nn.init.ones_(conv.weight)
    with torch.no_grad():
        size = conv(torch.zeros(1, 1, height, width, dtype=torch.float64)).shape
    sites = torch.rand(size, generator=random) < 0.2
    read = read_footprint(sites, conv, height, width)
    x = torch.rand(1, 1, height, width, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv(x)[sites].sum(), x)
    assert torch.equal(read, gradient != 0)


def test_footprint_of_named_paddings():
    sites = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    one = conv_record((3, 3), (1, 1), "same", (1, 1))
    assert read_footprint(sites, one, 4, 4).all()
    two = conv_record((3, 3), (1, 1), "valid", (1, 1))
    assert read_footprint(sites[..., :2, :2], two, 4, 4).all()
    assert not read_footprint(torch.zeros_like(sites), one, 4, 4).any()


def test_interpolation_counts_pairs():
    """Holes at the ends of a row of five with sites in the middle; window 3."""
    mask = torch.tensor([False, True, True, False, False]).view(1, 1, 1, 5)
    # The holes see 1, 1 and 0 sites.
    assert interpolation_macs(mask, ~mask, 3, 10) == 2 * 10
    assert interpolation_macs(mask, torch.zeros_like(mask), 3, 10) == 0


def test_convolution_macs():
    conv = nn.Conv2d(6, 9, (3, 5), groups=3)
    assert convolution_macs(conv, 7) == 7 * 9 * 2 * 15
