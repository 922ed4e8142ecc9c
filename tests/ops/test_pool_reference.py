"""The reference of SoftPool against arithmetic written out, max_pool and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsight.ops import pool_reference as reference

MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def random_numbers(d, rank):
    """Kernel, stride, padding, dilation and ceil_mode that max_pool takes, and an input size."""
    kernel = [d.one_of(1, 2, 3, 4) for _ in range(rank)]
    stride = [d.one_of(1, 2, 3) for _ in range(rank)]
    padding = [d.one_of(*range(k // 2 + 1)) for k in kernel]
    dilation = [d.one_of(1, 1, 2) for _ in range(rank)]
    size = [d.one_of(1, 2, 5, 8) for _ in range(rank)]
    return size, (kernel, stride, padding, dilation, d.one_of(True, False))


def written_out(x, index, numbers):
    """The definition, tap by tap, of one output of one plane: y and the gradient of each tap."""
    kernel, stride, padding, dilation, _ = numbers
    taps = []
    for offset in torch.cartesian_prod(*(torch.arange(k) for k in kernel)).view(-1, len(kernel)):
        axes = zip(index, offset.tolist(), stride, padding, dilation, strict=True)
        place = tuple(i * s - p + t * d for i, t, s, p, d in axes)
        if all(0 <= n < size for n, size in zip(place, x.shape, strict=True)):
            taps.append((place, x[place].item()))
    total = sum(math.exp(v) for _, v in taps)
    y = sum(math.exp(v) * v for _, v in taps) / total if taps else -math.inf
    return y, {place: math.exp(v) / total * (1 + v - y) for place, v in taps}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equals_the_definition_written_out(draw, rank):
    checked = 0
    for seed in range(25):
        d = draw(seed)
        size, numbers = random_numbers(d, rank)
        out = reference.output_size(size, *numbers)
        if min(out) < 1:
            continue
        x = d.normal(1, 1, *size).double()
        y = reference.soft_pool(x, *numbers)
        index = tuple(int(d.one_of(*range(n))) for n in out)
        grad = torch.zeros_like(y)
        grad[(0, 0, *index)] = 1.0
        sent = reference.soft_pool_backward(grad, x, *numbers, False)[0, 0]
        expected, slopes = written_out(x[0, 0], index, numbers)
        assert y[(0, 0, *index)].item() == pytest.approx(expected, rel=1e-12)
        for place, slope in slopes.items():
            assert sent[place].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
            sent[place] = 0.0
        assert not sent.any()
        checked += 1
    assert checked > 10


def test_the_published_example():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 4)
    numbers = ([4], [4], [0], [1], False)
    y = reference.soft_pool(x, *numbers)
    assert y.item() == pytest.approx(3.4926527, abs=1e-7)
    ones = torch.ones_like(y)
    exact = reference.soft_pool_backward(ones, x, *numbers, False).flatten()
    weights = reference.soft_pool_backward(ones, x, *numbers, True).flatten()
    expected = torch.tensor([-0.0478524, -0.0429319, 0.1201818, 0.9706024]).double()
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(weights, x.flatten().softmax(0))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_are_those_of_max_pool_and_so_are_refusals(draw, rank):
    refused = 0
    for seed in range(150):
        size, numbers = random_numbers(draw(seed), rank)
        out = reference.output_size(size, *numbers)
        x = torch.zeros(2, 3, *size)
        if min(out) < 1:
            with pytest.raises(RuntimeError):
                MAX_POOL[rank](x, *numbers)
            refused += 1
        else:
            assert list(MAX_POOL[rank](x, *numbers).shape[2:]) == out
            assert list(reference.soft_pool(x, *numbers).shape[2:]) == out
    assert refused


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("detached", [False, True])
def test_backward_equals_autograd_of_the_forward(draw, rank, detached):
    for seed in range(30):
        d = draw(seed)
        size, numbers = random_numbers(d, rank)
        if min(reference.output_size(size, *numbers)) < 1:
            continue
        x = d.normal(2, 2, *size).double().requires_grad_()
        y = reference.soft_pool(x, *numbers)
        finite = y.isfinite()
        grad = torch.where(finite, d.normal(*y.shape).double(), 0.0)
        if detached:
            # The weights of one channel, held constant: the shared form of one channel.
            y = torch.cat([reference.shared_soft_pool(c, *numbers, True) for c in x.split(1, 1)], 1)
        y = torch.where(finite, y, 0.0)
        (expected,) = torch.autograd.grad(y, x, grad)
        made = reference.soft_pool_backward(grad, x.detach(), *numbers, detached)
        torch.testing.assert_close(made, expected)


def test_a_window_of_padding_only_is_minus_infinity_as_for_max_pool():
    x = torch.ones(1, 1, 1, 1)
    numbers = ([2, 2], [1, 1], [1, 1], [2, 2], False)
    assert F.max_pool2d(x, *numbers).tolist() == [[[[-math.inf]]]]
    y = reference.soft_pool(x, *numbers)
    assert y.tolist() == [[[[-math.inf]]]]
    assert reference.soft_pool_backward(torch.ones_like(y), x, *numbers, False).item() == 0.0


def test_shared_weights_are_those_of_the_listing(draw):
    """The blog post's listing: sum of exp over channels, the ratio of two average poolings."""
    x = draw(0).normal(2, 5, 8, 6).double()
    e = x.exp().sum(1, keepdim=True)
    listing = F.avg_pool2d(x * e, 2) / F.avg_pool2d(e, 2)
    shared = reference.shared_soft_pool(x, [2, 2], [2, 2], [0, 0], [1, 1], False, False)
    torch.testing.assert_close(shared, listing)


def test_shared_weights_of_the_published_example():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]])
    shared = reference.shared_soft_pool(x, [4], [4], [0], [1], False, False)
    assert shared.flatten().tolist() == pytest.approx([2.5, 2.5])


@pytest.mark.parametrize("detached", [False, True])
def test_shared_weights_pass_gradcheck(draw, detached):
    x = draw(1).normal(1, 3, 5, 5).double().requires_grad_()

    def pool(x):
        return reference.shared_soft_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], True, detached)

    if not detached:
        assert torch.autograd.gradcheck(pool, x)
        return
    # A weighted sum whose weights are constant: linear, with a gradient that sums to one a window.
    y = pool(x)
    (sent,) = torch.autograd.grad(y.sum(), x)
    assert sent.sum().item() == pytest.approx(y.numel())
    assert (sent > 0).all()
