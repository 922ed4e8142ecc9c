"""The arithmetic of the benchmarks: what is possible, what of it was realised, where dense wins."""

import importlib.util
import math
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "bench" / "harness" / "possible.py"
SPEC = importlib.util.spec_from_file_location("bench_possible", PATH)
assert SPEC is not None and SPEC.loader is not None
possible = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(possible)


def test_possible_time_is_dense_time_times_mac_ratio_or_the_addition():
    assert possible.possible_ms(10.0, 0.3, 2.0) == pytest.approx(3.0)
    assert possible.possible_ms(10.0, 0.1, 2.0) == 2.0  # memory binds
    assert possible.possible_ms(10.0, 1.02) == pytest.approx(10.2)  # sampling costs more


@pytest.mark.parametrize("numbers", [(0.0, 0.5, 1.0), (1.0, -0.5, 1.0), (1.0, 0.5, -1.0)])
def test_impossible_times_are_refused(numbers):
    with pytest.raises(ValueError, match=r"possible_ms: dense_ms is .* required; look at"):
        possible.possible_ms(*numbers)


def test_realised_share_is_the_ratio_of_the_speed_ups():
    # Dense 10 ms, possible 3 ms: 3.33x. Ours 4 ms: 2.5x. Three quarters.
    assert possible.realised_share(10.0, 4.0, 3.0) == pytest.approx(0.75)
    assert possible.realised_share(10.0, 3.0, 3.0) == pytest.approx(1.0)


def test_geometric_mean():
    assert possible.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert possible.geometric_mean([0.9]) == pytest.approx(0.9)
    for values in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match=r"geometric_mean: got .* required"):
            possible.geometric_mean(values)


def test_crossover_lies_where_the_line_meets_the_dense_time():
    assert possible.crossover_density([0.1, 0.5, 1.0], [1.0, 3.0, 8.0], 5.5) == pytest.approx(0.75)
    assert possible.crossover_density([0.1, 0.5], [1.0, 3.0], 3.0) == pytest.approx(0.5)
    assert possible.crossover_density([0.1, 1.0], [1.0, 3.0], 4.0) == math.inf
    assert possible.crossover_density([0.1, 1.0], [5.0, 9.0], 4.0) == 0.0


def test_crossover_needs_one_time_for_each_ascending_density():
    for densities, times in (([], []), ([0.5, 0.1], [1.0, 2.0]), ([0.1], [1.0, 2.0])):
        with pytest.raises(ValueError, match=r"crossover_density: got .* required"):
            possible.crossover_density(densities, times, 1.0)


def test_share_ratio_is_one_where_time_is_proportional_to_macs():
    assert possible.share_ratio(2.0, 10.0, 20, 100) == pytest.approx(1.0)
    assert possible.share_ratio(3.0, 10.0, 20, 100) == pytest.approx(1.5)


def test_the_bound_is_the_higher_roof():
    # 1e9 multiply-adds at 100e9 a second are 10 ms.
    assert possible.bound_ms(1e9, 4.0, 100.0) == (pytest.approx(10.0), "compute")
    assert possible.bound_ms(1e9, 14.0, 100.0) == (14.0, "memory")
