"""Widths: multiples that suit the kernels, and the least damage for the multiply-adds saved."""

import itertools

import pytest
from torch import nn

from sparsight.compress.layer_widths import (
    LayerCost,
    candidate_widths,
    count_cost,
    full_cost,
    spread_widths,
)


@pytest.mark.parametrize(
    ("units", "channels", "round_to", "expected"),
    [
        (16, 16, 16, [2, 4, 6, 8, 10, 12, 14, 16]),
        (32, 32, 16, [*range(4, 33, 4)]),
        (256, 256, 16, [*range(16, 257, 16)]),
        (60, 60, 8, [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60]),
        (5, 5, 16, [1, 2, 3, 4, 5]),
        (5, 5, 1, [1, 2, 3, 4, 5]),
        (32, 128, 16, [4, 8, 12, 16, 20, 24, 28, 32]),  # blocks of four channels
        (1, 64, 16, [1]),
    ],
)
def test_candidates(units, channels, round_to, expected):
    assert candidate_widths(units, channels, round_to) == expected


def two_layers():
    """a -> conv -> b -> conv: the second one's cost is a product of both widths."""
    return [
        LayerCost(10, out=[("a", 1)], fixed_in=3),
        LayerCost(10, out=[("b", 1)], inputs=[("a", 1)]),
        LayerCost(2, inputs=[("b", 4)], fixed_out=7),
    ]


def test_cost_is_the_product_of_both_sides():
    assert count_cost(two_layers(), {"a": 4, "b": 6}) == 10 * 4 * 3 + 10 * 4 * 6 + 2 * 24 * 7


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_close_to_the_best_of_all_widths(share):
    layers = two_layers()
    damage = {
        "a": {w: (8 - w) ** 2 / 64 for w in range(1, 9)},
        "b": {w: 0.3 * (12 - w) ** 3 / 1728 for w in range(1, 13)},
    }
    total = count_cost(layers, {"a": 8, "b": 12})
    widths = spread_widths(layers, damage, max_cost=share * total)
    assert widths is not None
    assert count_cost(layers, widths) <= share * total
    best = min(
        damage["a"][a] + damage["b"][b]
        for a, b in itertools.product(range(1, 9), range(1, 13))
        if count_cost(layers, {"a": a, "b": b}) <= share * total
    )
    assert damage["a"][widths["a"]] + damage["b"][widths["b"]] <= 1.5 * best + 0.01


def test_a_dear_step_is_passed_over_for_what_lies_behind_it():
    layers = [LayerCost(1, out=[("a", 1)], fixed_in=1)]
    damage = {"a": {1: 0.2, 3: 0.19, 4: 0.0}}
    assert spread_widths(layers, damage, max_cost=2) == {"a": 1}
    assert spread_widths(layers, damage, max_cost=3) == {"a": 3}, "what was too much is given back"


def test_out_of_reach_is_none():
    layers = [LayerCost(1, out=[("a", 1)], fixed_in=1)]
    assert spread_widths(layers, {"a": {2: 0.1, 4: 0.0}}, max_cost=1) is None


@pytest.mark.parametrize(
    ("layer", "per_position"),
    [
        (nn.Linear(6, 4), 24),
        (nn.Conv2d(6, 4, (3, 2), groups=2), 3 * 2 * 3 * 4),
        (nn.ConvTranspose2d(6, 4, 2, groups=2), 2 * 2 * 3 * 4),
    ],
)
def test_a_layer_at_full_width(layer, per_position):
    assert full_cost(layer, 5).at({}) == 5 * per_position
