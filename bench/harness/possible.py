"""What a saving of multiply-adds makes possible, and how much of it was reached: plain arithmetic.

The possible time of a block is the larger of two: the dense time times the MAC ratio (sampler heads
and interpolation counted), and the time of one in-place addition of two tensors of the block's
input size, which is what any residual block must move.
"""

import itertools
import math
from collections.abc import Sequence


def possible_ms(dense_ms: float, mac_ratio: float, addition_ms: float = 0.0) -> float:
    """Time that the MACs and the memory allow.

    Args:
        dense_ms: of the dense rival, in the same run.
        mac_ratio: MACs needed over those of the dense network.
        addition_ms: of the in-place addition; 0 for a network, whose theory is its MAC ratio.
    """
    if dense_ms <= 0 or mac_ratio < 0 or addition_ms < 0:
        raise ValueError(
            f"possible_ms: dense_ms is {dense_ms}, mac_ratio {mac_ratio} and addition_ms "
            f"{addition_ms}; a positive time and no negative numbers are required; look at what "
            "was measured."
        )
    return max(dense_ms * mac_ratio, addition_ms)


def realised_share(dense_ms: float, ours_ms: float, possible: float) -> float:
    """Realised over possible speed-up; 1 is all that was possible.

    Both speed-ups are against the same dense time, so that it cancels: possible time over ours.
    """
    realised_speedup, possible_speedup = dense_ms / ours_ms, dense_ms / possible
    return realised_speedup / possible_speedup


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product; every value must be positive."""
    if not values or min(values) <= 0:
        raise ValueError(
            f"geometric_mean: got {list(values)}, but positive numbers, at least one, are "
            "required; leave rows that were not measured out."
        )
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def crossover_density(
    densities: Sequence[float], ours_ms: Sequence[float], dense_ms: float
) -> float:
    """The density above which dense is faster, by linear interpolation between those measured.

    Args:
        densities: ascending.
        ours_ms: the sampled layer's time at each of them.
        dense_ms: the dense layer's.

    Returns:
        The smallest density at which the sampled layer needs as long as the dense one; infinity if
        it is faster at all of them, 0 if it is slower at the first already.
    """
    if len(densities) != len(ours_ms) or not densities or list(densities) != sorted(densities):
        raise ValueError(
            f"crossover_density: got densities {list(densities)} and {len(ours_ms)} times; one "
            "time for each of some ascending densities is required; sort them together."
        )
    if ours_ms[0] >= dense_ms:
        return 0.0
    points = list(zip(densities, ours_ms, strict=True))
    for (low, low_ms), (high, high_ms) in itertools.pairwise(points):
        if high_ms >= dense_ms:
            return low + (high - low) * (dense_ms - low_ms) / (high_ms - low_ms)
    return math.inf


def share_ratio(part_ms: float, whole_ms: float, part_macs: int, whole_macs: int) -> float:
    """A part's share of the time over its share of the multiply-adds; 1 is proportional."""
    return (part_ms / whole_ms) / (part_macs / whole_macs)


def bound_ms(macs: float, addition_ms: float, peak_gmacs: float) -> tuple[float, str]:
    """The roofline's time of a block, and which roof that is, "compute" or "memory".

    Args:
        macs: multiply-adds.
        addition_ms: of the in-place addition of two maps of the block's input size.
        peak_gmacs: measured, in 1e9 multiply-adds a second.
    """
    compute_ms = macs / peak_gmacs / 1e6
    return (addition_ms, "memory") if addition_ms > compute_ms else (compute_ms, "compute")
