"""Importances of filters, and which of them SFP and FPGM take."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from sparsight.compress import find_channel_groups
from sparsight.compress.filter_importance import (
    count_removed,
    distances_to_others,
    filter_norms,
    filters_of,
    group_importance,
    weakest_filters,
)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_norms_and_distances_are_those_of_numpy_and_scipy():
    filters = rows(7, 12)
    for p in (1, 2):
        expected = np.linalg.norm(filters.numpy().astype(np.float64), ord=p, axis=1)
        np.testing.assert_allclose(filter_norms(filters, p=p).numpy(), expected)
    expected = cdist(filters.numpy(), filters.numpy()).sum(1)
    np.testing.assert_allclose(distances_to_others(filters).numpy(), expected)


def published_masks(weight: np.ndarray, norm_keep: float, distance_ratio: float) -> np.ndarray:
    """FPGM's two code-books, as its paper and scripts describe them."""
    count = len(weight)
    norms = np.sqrt((weight**2).sum(1))
    small = norms.argsort()[: int(count * (1 - norm_keep))]
    left = np.setdiff1d(np.arange(count), small)
    sums = cdist(weight[left], weight[left]).sum(1)
    near = left[sums.argsort()[: int(count * distance_ratio)]]
    mask = np.zeros(count, dtype=bool)
    mask[small] = mask[near] = True
    return mask


@pytest.mark.parametrize(("norm_keep", "distance"), [(0.7, 0.0), (1.0, 0.3), (0.9, 0.2)])
@pytest.mark.parametrize("count", [13, 64])
def test_taken_filters_are_the_published_ones(norm_keep, distance, count):
    filters = rows(count, 27)
    taken = weakest_filters(filters, norm_ratio=1 - norm_keep, distance_ratio=distance)
    expected = published_masks(filters.numpy().astype(np.float64), norm_keep, distance)
    assert taken.tolist() == expected.tolist()


def test_distances_leave_out_what_the_norm_took():
    """The two small ones lie together; counted in, they would pull the median towards them."""
    filters = torch.tensor([[0.1], [0.1], [1.0], [2.0], [3.0]])
    assert weakest_filters(filters, norm_ratio=0.4, distance_ratio=0.2).tolist() == [
        True,
        True,
        False,
        True,  # of 1, 2, 3 the middle one
        False,
    ]


def test_of_equals_the_first_go():
    assert weakest_filters(torch.ones(4, 2), norm_ratio=0.5).tolist() == [True, True, False, False]
    both = weakest_filters(torch.zeros(4, 2), distance_ratio=0.25)
    assert both.tolist() == [True, False, False, False]


def test_counts_are_rounded_down_and_binary_rounding_is_not_seen():
    assert [count_removed(64, 0.3), count_removed(100, 0.29), count_removed(10, 1 - 0.9)] == [
        19,
        29,
        1,
    ]
    assert count_removed(5, 0.0) == 0


def test_filters_of_a_transposed_convolution_are_its_outputs():
    layer = nn.ConvTranspose2d(3, 5, 2)
    assert filters_of(layer).shape == (5, 12)
    assert torch.equal(filters_of(layer)[1], layer.weight[:, 1].flatten())


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.a(x) + self.norm(self.b(x)))


def test_importances_are_summed_over_the_layers_of_a_group():
    torch.manual_seed(0)
    model = Added()
    model.norm.weight.data = torch.tensor([1.0, -3.0, 2.0, 0.0])
    group = find_channel_groups(model, torch.zeros(1, 3, 2, 2))[0]
    a, b = model.a.weight.flatten(1).double(), model.b.weight.flatten(1).double()
    torch.testing.assert_close(
        group_importance(model, group, "l2"), (a.norm(dim=1) + b.norm(dim=1)).detach()
    )
    torch.testing.assert_close(
        group_importance(model, group, "geometric_median"),
        distances_to_others(a) + distances_to_others(b),
    )
    assert group_importance(model, group, "batch_norm").tolist() == [1, 3, 2, 0]
    assert group_importance(model, group, lambda m, g: torch.arange(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ("l3", "one of l1, l2, geometric_median, batch_norm, random"),
        (lambda m, g: torch.ones(3), r"\(4,\), one value per unit"),
        (lambda m, g: torch.full((4,), torch.nan), "NaN"),
        ("batch_norm", "no norm with weights"),
    ],
)
def test_wrong_importances_are_refused(importance, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    group = find_channel_groups(model, torch.zeros(1, 3, 2, 2))[0]
    with pytest.raises(ValueError, match=message):
        group_importance(model, group, importance)


def test_shares_that_leave_nothing_are_refused():
    for shares in ((1.0, 0.0), (0.5, 0.5), (-0.1, 0.2)):
        with pytest.raises(ValueError, match="below 1"):
            weakest_filters(torch.ones(4, 2), norm_ratio=shares[0], distance_ratio=shares[1])
