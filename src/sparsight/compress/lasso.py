"""Which channels a layer can do without: LASSO on second moments, bisected to a wanted count.

Letters: C channels that may be removed, D columns of the regression (C times the window), O
outputs.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["LassoSelection", "channel_moments"]

_MAX_BISECTIONS = 50


def channel_moments(
    xx: Tensor, xy: Tensor, weight: Tensor, unit_of_column: Tensor, num_units: int
) -> tuple[Tensor, Tensor]:
    """Return the quadratic form in beta of 1/2 ||Y - sum_i beta_i X_i W_i^T||^2.

    Expanding the square needs second moments only: no output of a single channel is ever stored,
    and every sampled row counts (the published code draws 400 of them to keep its regression
    small).

    Args:
        xx: (D, D) float64, moments of the columns of X.
        xy: (D, O) float64, moments of the columns with what they are to explain.
        weight: (O, D), the filters; scaled by what an error of each output costs, if that differs.
        unit_of_column: (D,) integer, the channel of each column; -1: of none.
        num_units: how many channels C there are.

    Returns:
        (C, C) and (C,): A and b of 1/2 beta^T A beta - b^T beta.

    Cost: D * D * O multiply-adds.
    """
    inside = torch.nonzero(unit_of_column >= 0).flatten()
    unit, weight = unit_of_column[inside], weight[:, inside].double()
    products = xx[inside][:, inside] * (weight.T @ weight)
    rows = products.new_zeros(num_units, len(inside)).index_add_(0, unit, products)
    quadratic = rows.new_zeros(num_units, num_units).index_add_(1, unit, rows)
    linear = (xy[inside] * weight.T).sum(1)
    return quadratic, linear.new_zeros(num_units).index_add_(0, unit, linear)


class LassoSelection:
    """Chooses channels by LASSO, for any count; the penalty is raised until so few are left.

    Minimises 1/2 beta^T A beta - b^T beta + alpha ||beta||_1 with scikit-learn's coordinate
    descent. alpha is bisected between 0 and the value at which nothing is left, until as many
    coefficients as wanted, or up to a tenth more, are not zero; the smallest of the surplus are
    dropped. The count does not fall monotonically with alpha and may jump across that band: after
    50 bisections the closest count is taken, and what it lacks is filled up with the channels of
    largest diagonal.

    Args:
        quadratic: (C, C) float64, A, symmetric and positive semidefinite; several consumers of the
            same channels add theirs up.
        linear: (C,) float64, b.
        normalise: give every channel a diagonal of one first, as the paper's constraint on the
            filters' norm does; the published code does not (default).

    Source: He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017,
    arXiv 1707.06168, section 3.1; band and search as in yihui-he/channel-pruning.
    """

    def __init__(self, quadratic: Tensor, linear: Tensor, *, normalise: bool = False) -> None:
        self.strength = quadratic.diagonal().clamp_min(0)
        if normalise:
            scale = self.strength.clamp_min(self.strength.max() * 1e-12).rsqrt()
            quadratic, linear = quadratic * scale * scale[:, None], linear * scale
        # A regression with the same normal equations: R^T R = A, R^T y = b. Scikit-learn divides
        # by the number of rows; scaled so that nothing is left at alpha = 1.
        values, vectors = torch.linalg.eigh(quadratic)
        used = values > values[-1].clamp_min(0) * 1e-12
        root = values[used].sqrt()
        target = vectors[:, used].T @ linear / root
        ceiling = linear.abs().max().item()
        self.is_void = ceiling == 0 or len(root) == 0
        size = 1.0 if self.is_void else (len(root) / ceiling) ** 0.5
        self.rows = ((root * vectors[:, used]).T * size).numpy()
        self.target = (target * size).numpy()

    def keep(self, num_kept: int) -> Tensor:
        """Return the channels to keep: (num_kept,) int64, ascending; `num_kept` is 1 to C."""
        num_units = len(self.strength)
        assert 1 <= num_kept <= num_units
        if num_kept == num_units:
            return torch.arange(num_units)
        if self.is_void:
            return _largest(self.strength, num_kept)
        beta = self._bisect(num_kept)
        if int((beta != 0).sum()) >= num_kept:
            return _largest(beta.abs(), num_kept)
        # What is not zero comes first, the rest by what it carries.
        carried = self.strength / self.strength.max()
        return _largest(torch.where(beta != 0, 2 + beta.abs(), carried), num_kept)

    def _bisect(self, num_kept: int) -> Tensor:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import Lasso

        solver = Lasso(fit_intercept=False, precompute=True, warm_start=True, tol=1e-5)
        low, high = 0.0, 1.0
        slack = max(1, num_kept // 10)
        closest: tuple[int, Tensor] | None = None
        for _ in range(_MAX_BISECTIONS):
            solver.alpha = (low + high) / 2
            with warnings.catch_warnings():
                # Next to no penalty on channels that are nearly collinear: only the count is read.
                warnings.simplefilter("ignore", ConvergenceWarning)
                solver.fit(self.rows, self.target)
            beta = torch.from_numpy(solver.coef_.copy())
            count = int((beta != 0).sum())
            if closest is None or _distance(count, num_kept) < closest[0]:
                closest = _distance(count, num_kept), beta
            if num_kept <= count <= num_kept + slack:
                break
            if count > num_kept:
                low = solver.alpha
            else:
                high = solver.alpha
        assert closest is not None
        return closest[1]


def _distance(count: int, wanted: int) -> int:
    """How far a count is off; too many are better than as many too few."""
    return 2 * (count - wanted) if count >= wanted else 2 * (wanted - count) + 1


def _largest(values: Tensor, count: int) -> Tensor:
    """The indices of the largest values, ascending; among equals the first."""
    return values.argsort(descending=True, stable=True)[:count].sort().values
