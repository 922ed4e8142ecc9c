"""LASSO on second moments chooses what scikit-learn's chooses on the rows themselves."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from sparsight.compress.lasso import LassoSelection, channel_moments


def regression(num_channels=6, window=4, outputs=5, rows=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, num_channels * window, generator=g).double()
    x += x @ torch.randn(x.shape[1], x.shape[1], generator=g).double() * 0.1
    weight = torch.randn(outputs, num_channels * window, generator=g).double()
    weight *= torch.rand(num_channels, generator=g).double().repeat_interleave(window) + 0.1
    return x, weight, x @ weight.T


def moments(x, weight, y, unit):
    return channel_moments(x.T @ x / len(x), x.T @ y / len(x), weight, unit, int(unit.max()) + 1)


def contributions(x, weight, unit):
    """(rows * outputs, channels): what each channel adds to every output."""
    parts = [x[:, unit == u] @ weight[:, unit == u].T for u in range(int(unit.max()) + 1)]
    return torch.stack([part.flatten() for part in parts], 1)


def test_moments_are_those_of_the_stacked_contributions():
    x, weight, y = regression()
    unit = torch.arange(6).repeat_interleave(4)
    quadratic, linear = moments(x, weight, y, unit)
    z = contributions(x, weight, unit)
    torch.testing.assert_close(quadratic, z.T @ z / len(x))
    torch.testing.assert_close(linear, z.T @ y.flatten() / len(x))


def test_columns_of_no_unit_and_units_in_any_order():
    x, weight, y = regression()
    unit = torch.tensor([2, -1, 0, 1] * 6)
    quadratic, linear = moments(x, weight, y, unit)
    z = contributions(x, weight, unit)
    torch.testing.assert_close(quadratic, z.T @ z / len(x))
    torch.testing.assert_close(linear, z.T @ y.flatten() / len(x))


@pytest.mark.parametrize("num_kept", [1, 3, 7, 11])
def test_same_channels_as_on_the_rows(num_kept):
    x, weight, y = regression(num_channels=12, seed=num_kept)
    unit = torch.arange(12).repeat_interleave(4)
    z, target = contributions(x, weight, unit).numpy(), y.flatten().numpy()
    sets = []
    for alpha in np.geomspace(1e-4, 10, 400):  # every set on the path, densely sampled
        beta = Lasso(alpha, fit_intercept=False, tol=1e-8, max_iter=10000).fit(z, target).coef_
        order = np.argsort(-np.abs(beta), kind="stable")
        if num_kept <= (beta != 0).sum() <= num_kept + max(1, num_kept // 10):
            sets.append(sorted(order[:num_kept].tolist()))
    assert LassoSelection(*moments(x, weight, y, unit)).keep(num_kept).tolist() in sets


def test_a_copy_is_dropped_before_anything_else():
    x, weight, _ = regression(num_channels=5)
    unit = torch.arange(5).repeat_interleave(4)
    x[:, unit == 4] = x[:, unit == 1]  # and so are their shares of the filters
    weight[:, unit == 4] = 0.1 * weight[:, unit == 1]
    kept = LassoSelection(*moments(x, weight, x @ weight.T, unit)).keep(4)
    assert kept.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("normalise", [False, True])
def test_any_count_can_be_asked_for(normalise):
    x, weight, y = regression(num_channels=9)
    selection = LassoSelection(
        *moments(x, weight, y, torch.arange(9).repeat_interleave(4)), normalise=normalise
    )
    for count in range(1, 10):
        kept = selection.keep(count)
        assert len(kept) == count
        assert kept.tolist() == sorted(set(kept.tolist()))


def test_dead_channels_fill_up_a_count_that_lasso_cannot_reach():
    x, weight, _ = regression(num_channels=4)
    unit = torch.arange(4).repeat_interleave(4)
    x[:, unit >= 2] = 0
    kept = LassoSelection(*moments(x, weight, x @ weight.T, unit)).keep(3)
    assert kept[:2].tolist() == [0, 1]
    assert len(kept) == 3
    nothing = LassoSelection(torch.zeros(4, 4).double(), torch.zeros(4).double())
    assert nothing.keep(2).tolist() == [0, 1]
