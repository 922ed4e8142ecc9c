"""The reference of the assembling module against its definition, cell by cell, and autograd."""

import math
from fractions import Fraction

import pytest
import torch

from sparsight.ops import assemble_reference as reference


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


def test_equals_the_definition_written_out(draw, random_window_case):
    for seed in range(30):
        case = random_window_case(draw(seed))
        made = reference.assemble_windows(case.maps, *case.numbers())
        assert torch.equal(made, written_out(case.maps, *case.numbers())), str(case)


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


def test_what_is_inside_is_what_is_copied(draw, random_window_case):
    for seed in range(30, 45):
        case = random_window_case(draw(seed))
        inside = reference.windows_inside(case.windows, case.size, *case.maps.shape[2:])
        made = reference.assemble_windows(torch.ones_like(case.maps), *case.numbers())
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


def test_its_gradient_is_that_of_autograd(draw, random_window_case):
    for seed in range(45, 75):
        d = draw(seed)
        case = random_window_case(d)
        maps = case.maps.double().requires_grad_()
        made = reference.assemble_windows(maps, *case.numbers())
        grad = d.normal(*made.shape).double()
        (expected,) = torch.autograd.grad(made, maps, grad)
        sent = reference.assemble_windows_backward(grad, *case.backward_numbers())
        torch.testing.assert_close(sent, expected, rtol=0, atol=1e-12)
        # What lies outside is not looked at, whatever it is.
        inside = reference.windows_inside(case.windows, case.size, *maps.shape[2:])
        poisoned = torch.where(inside, grad, torch.nan)
        again = reference.assemble_windows_backward(poisoned, *case.backward_numbers())
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)


def test_empty_maps_are_outside_of_every_window():
    windows = torch.tensor([[0, 0, 0]])
    for shape in ((1, 4, 0, 5), (1, 4, 5, 0), (0, 4, 5, 5)):
        made = reference.assemble_windows(torch.ones(shape), windows, 3, True)
        assert torch.equal(made, torch.zeros(1, 3, 3))
        assert reference.assemble_windows_backward(made, windows, shape, True).shape == shape
