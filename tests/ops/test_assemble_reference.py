"""The reference of the assembling module against its definition, cell by cell, and autograd."""

import math
from fractions import Fraction

import pytest
import torch

from sparsight.ops import assemble_reference as reference


def random_case(d):
    """Score maps and windows that lie inside, across and outside of them."""
    k, size = d.one_of(1, 2, 3, 5, 7), d.one_of(1, 2, 4, 6, 7, 9, 21)
    images, height, width = d.one_of(1, 2, 3), d.one_of(1, 4, 9, 13), d.one_of(1, 5, 8, 17)
    maps = d.normal(images, k * k, height, width)
    count = d.one_of(0, 1, 2, 9, 30)
    return maps, random_windows(d, count, images, height, width, size), size


def random_windows(d, count, images, height, width, size):
    """The image, and corners from wholly before the map to wholly behind it."""
    rows = [
        [
            d.one_of(*range(images)),
            d.one_of(*range(-size - 1, height + 2)),
            d.one_of(*range(-size - 1, width + 2)),
        ]
        for _ in range(count)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(count, 3)


def written_out(maps, windows, size, centred):
    """The definition in a loop over windows and cells, in exact arithmetic where it rounds."""
    _, channels, height, width = maps.shape
    k = math.isqrt(channels)
    half = Fraction(1, 2) if centred else 0
    g = [math.floor((i + half) * k / size) for i in range(size)]
    out = torch.zeros(len(windows), size, size, dtype=maps.dtype)
    for w, (image, top, left) in enumerate(windows.tolist()):
        for i in range(size):
            for j in range(size):
                y, x = top + i, left + j
                if 0 <= y < height and 0 <= x < width:
                    out[w, i, j] = maps[image, g[i] * k + g[j], y, x]
    return out


@pytest.mark.parametrize("centred", [True, False])
def test_equals_the_definition_written_out(draw, centred):
    for seed in range(20):
        maps, windows, size = random_case(draw(seed))
        made = reference.assemble_windows(maps, windows, size, centred)
        assert torch.equal(made, written_out(maps, windows, size, centred))


def test_bins_are_those_of_the_paper_and_of_its_successor():
    def sizes(m, k, centred):
        return torch.bincount(reference.bins_of(m, k, centred), minlength=k).tolist()

    assert sizes(21, 5, True) == [4, 4, 5, 4, 4]
    assert sizes(21, 5, False) == [5, 4, 4, 4, 4]
    for centred in (True, False):
        assert sizes(21, 3, centred) == [7, 7, 7]
        assert sizes(21, 7, centred) == [3] * 7
        assert sizes(21, 1, centred) == [21]
        # Fewer cells than bins: some maps are never read.
        assert sorted(sizes(2, 5, centred)) == [0, 0, 0, 1, 1]


def test_centred_bins_are_the_same_from_either_side_for_odd_k():
    for k in (1, 3, 5, 7, 9):
        for m in range(1, 40):
            g = reference.bins_of(m, k, True)
            assert torch.equal(g.flip(0), k - 1 - g), (m, k)
    assert not torch.equal(
        reference.bins_of(21, 5, False).flip(0), 4 - reference.bins_of(21, 5, False)
    )


def test_what_is_inside_is_what_is_copied(draw):
    for seed in range(20, 30):
        maps, windows, size = random_case(draw(seed))
        inside = reference.windows_inside(windows, size, *maps.shape[2:])
        made = reference.assemble_windows(torch.ones_like(maps), windows, size, True)
        assert torch.equal(inside, made == 1)


def test_places_that_overflow_are_outside():
    far = torch.iinfo(torch.int64)
    windows = torch.tensor([[0, far.min, 0], [0, 0, far.max], [0, far.max, far.min]])
    assert not reference.windows_inside(windows, 3, 4, 5).any()
    assert not reference.assemble_windows(torch.ones(1, 4, 4, 5), windows, 3, True).any()


@pytest.mark.parametrize("image", [-1, 2])
def test_a_window_of_no_image_is_zero_and_sends_nothing(image):
    windows = torch.tensor([[image, 0, 0]])
    assert not reference.assemble_windows(torch.ones(2, 4, 4, 5), windows, 3, True).any()
    grad = torch.ones(1, 3, 3)
    assert not reference.assemble_windows_backward(grad, windows, (2, 4, 4, 5), True).any()


@pytest.mark.parametrize("centred", [True, False])
def test_its_gradient_is_that_of_autograd(draw, centred):
    for seed in range(40, 60):
        d = draw(seed)
        maps, windows, size = random_case(d)
        maps = maps.double().requires_grad_()
        made = reference.assemble_windows(maps, windows, size, centred)
        grad = d.normal(*made.shape).double()
        (expected,) = torch.autograd.grad(made, maps, grad)
        sent = reference.assemble_windows_backward(grad, windows, maps.shape, centred)
        torch.testing.assert_close(sent, expected, rtol=0, atol=1e-12)
        # What lies outside is not looked at, whatever it is.
        inside = reference.windows_inside(windows, size, *maps.shape[2:])
        poisoned = torch.where(inside, grad, torch.nan)
        again = reference.assemble_windows_backward(poisoned, windows, maps.shape, centred)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)


def test_empty_maps_are_outside_of_every_window():
    windows = torch.tensor([[0, 0, 0]])
    for shape in ((1, 4, 0, 5), (1, 4, 5, 0), (0, 4, 5, 5)):
        made = reference.assemble_windows(torch.ones(shape), windows, 3, True)
        assert torch.equal(made, torch.zeros(1, 3, 3))
        assert reference.assemble_windows_backward(made, windows, shape, True).shape == shape
