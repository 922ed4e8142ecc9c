"""Least squares from moments is torch's least squares on the rows, and never makes it worse."""

import pytest
import torch

from sparsight.compress.reconstruct import Moments, refit, squared_error


def rows(n=200, d=12, o=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + 3
    weight = torch.randn(o, d, generator=g)
    y = x @ weight.T + 0.3 * torch.randn(n, o, generator=g) - 1
    return x, y, weight


def moments_of(x, y):
    moments = Moments.zeros(x.shape[1], y.shape[1])
    for part in range(0, len(x), 64):
        moments.add(x[part : part + 64], y[part : part + 64])
    return moments


@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_least_squares_on_the_rows(has_bias):
    x, y, weight = rows()
    kept = torch.tensor([0, 2, 3, 7, 11])
    fitted, bias = refit(moments_of(x, y), weight, kept, has_bias=has_bias)
    inputs = x[:, kept].double()
    if has_bias:
        inputs = torch.cat([inputs, torch.ones(len(x), 1).double()], 1)
    expected = torch.linalg.lstsq(inputs, y.double()).solution.T
    torch.testing.assert_close(fitted, expected[:, :5], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bias, expected[:, 5] if has_bias else bias * 0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("has_bias", [False, True])
def test_error_is_that_of_the_rows(has_bias):
    x, y, weight = rows()
    kept = torch.tensor([1, 4, 5])
    part = weight[:, kept].double()
    residual = y.double() - x[:, kept].double() @ part.T
    if has_bias:
        residual = residual - residual.mean(0)
    error = squared_error(moments_of(x, y), part, kept, has_bias=has_bias)
    torch.testing.assert_close(error, residual.square().mean(0))


@pytest.mark.parametrize("n", [3, 8, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_error_never_rises(n, has_bias):
    """Fewer rows than columns included: what they leave open stays as it was."""
    x, y, weight = rows(n=n)
    x[:, 5] = 0  # a dead column
    kept = torch.tensor([0, 1, 5, 6, 8, 9])
    moments = moments_of(x, y)
    fitted, _ = refit(moments, weight, kept, has_bias=has_bias)
    before = squared_error(moments, weight[:, kept], kept, has_bias=has_bias)
    after = squared_error(moments, fitted, kept, has_bias=has_bias)
    assert (after <= before * (1 + 1e-9) + 1e-9).all()
    assert after.sum() < before.sum()
    torch.testing.assert_close(fitted[:, 2], weight[:, 5].double())


def test_the_batches_do_not_matter():
    x, y, _ = rows()
    whole = Moments.zeros(12, 5)
    whole.add(x, y)
    for one, other in zip(
        whole.averaged(is_centred=True), moments_of(x, y).averaged(is_centred=True), strict=True
    ):
        torch.testing.assert_close(one, other)
