"""Laws of `DeformableConv2d`."""

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from sparsight.measure import count_macs
from sparsight.nn.deform_conv import DeformableConv2d
from sparsight.ops import sites_from_mask


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def moved(conv, random):
    """The same layer with offsets of a pixel or two."""
    with torch.no_grad():
        conv.offset.weight.normal_(std=0.2, generator=random)
        conv.offset.bias.normal_(generator=random)
    return conv


def test_repr_says_what_moves_it():
    plain = DeformableConv2d(4, 6, 3).extra_repr()
    assert plain == nn.Conv2d(4, 6, 3).extra_repr()
    moving = DeformableConv2d(4, 6, 3, guide_channels=5, offset_groups=2, is_modulated=True)
    assert moving.extra_repr() == f"{plain}, guide_channels=5, offset_groups=2, is_modulated=True"


@pytest.mark.parametrize("groups", [1, 2])
def test_it_starts_as_the_convolution_it_replaces(random, groups):
    source = nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2, groups=groups)
    conv = DeformableConv2d.from_conv(source)
    x = torch.randn(2, 8, 9, 11, generator=random)
    assert conv.weight is source.weight
    torch.testing.assert_close(conv(x), source(x))


def test_state_of_the_source_loads_but_for_the_offsets():
    source = nn.Conv2d(4, 4, 3)
    missing, unexpected = DeformableConv2d(4, 4, 3).load_state_dict(
        source.state_dict(), strict=False
    )
    assert (missing, unexpected) == (["offset.weight", "offset.bias"], [])


def test_it_equals_torchvision_with_offsets_of_a_guide(random):
    conv = moved(DeformableConv2d(8, 6, 3, 2, 1, guide_channels=5, offset_groups=2), random)
    x, guide = (torch.randn(2, c, 9, 11, generator=random) for c in (8, 5))
    expected = deform_conv2d(x, conv.offset(guide), conv.weight, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(conv(x, guide), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset_groups", [1, 2])
def test_v2_equals_torchvision_with_sigmoids_of_the_last_channels(random, offset_groups):
    options = {"offset_groups": offset_groups, "is_modulated": True}
    conv = moved(DeformableConv2d(8, 6, 3, padding=1, groups=2, **options), random)
    x = torch.randn(2, 8, 9, 11, generator=random)
    made, moves = conv.offset(x), 18 * offset_groups
    expected = deform_conv2d(
        x, made[:, :moves], conv.weight, conv.bias, padding=1, mask=made[:, moves:].sigmoid()
    )
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
    mask = torch.rand(2, 1, 9, 11, generator=random) < 0.3
    at_sites = conv(x, sites=sites_from_mask(mask))
    torch.testing.assert_close(at_sites, torch.where(mask, expected, 0.0), rtol=1e-4, atol=1e-4)


def test_v2_starts_as_half_of_the_convolution_it_replaces(random):
    source = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    conv = DeformableConv2d.from_conv(source, is_modulated=True)
    x = torch.randn(1, 4, 6, 7, generator=random)
    torch.testing.assert_close(conv(x), source(x) / 2)


def test_at_sites_it_equals_the_dense_one_and_is_zero_elsewhere(random):
    conv = moved(DeformableConv2d(8, 6, 3, padding=1), random)
    x = torch.randn(2, 8, 9, 11, generator=random)
    mask = torch.rand(2, 1, 9, 11, generator=random) < 0.3
    y = conv(x, sites=sites_from_mask(mask))
    torch.testing.assert_close(y, torch.where(mask, conv(x), 0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_modulated", [False, True])
def test_gradients_arrive_everywhere(random, is_modulated):
    conv = DeformableConv2d(4, 4, 3, padding=1, guide_channels=3, is_modulated=is_modulated)
    x, guide = (torch.randn(1, c, 5, 5, generator=random, requires_grad=True) for c in (4, 3))
    conv(x, guide).square().sum().backward()
    # With zero weights the guide does not move the offsets: its own gradient is zero.
    for tensor in (x, *conv.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
    assert not guide.grad.any()


def test_macs_of_offsets_and_taps_are_counted_at_the_sites(random):
    class AtSites(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DeformableConv2d(8, 6, 3, padding=1)

        def forward(self, x, mask):
            return self.conv(x, sites=sites_from_mask(mask))

    mask = torch.rand(2, 1, 9, 11, generator=random) < 0.3
    count = count_macs(AtSites().eval(), (torch.zeros(2, 8, 9, 11), mask))
    assert count.total == int(mask.sum()) * 9 * 8 * (6 + 18)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"padding is 'same', but numbers are needed"):
        DeformableConv2d(4, 4, 3, padding="same")
    with pytest.raises(ValueError, match=r"offset_groups is 3, but must divide the 4 input"):
        DeformableConv2d(4, 4, 3, offset_groups=3)
    with pytest.raises(ValueError, match=r"guide is None, but .*guide_channels=4; pass the map"):
        DeformableConv2d(4, 4, 3, guide_channels=4)(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"padding_mode='reflect', but only 'zeros'"):
        DeformableConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
