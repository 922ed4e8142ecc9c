"""Counting and timing, what a model computes and how long it takes, and fitting it to a count.

Enters: a model (ordinary, converted or frozen) or several callables, and what they take. Leaves:
dataclasses with the unit in each number's name, which print as tables, and dated report files. May
import nn, ops and convert; never train.
"""

from sparsight.measure.calibrate import CalibrationReport, calibrate
from sparsight.measure.environment import environment
from sparsight.measure.latency import Latency, LatencyComparison, measure_latency
from sparsight.measure.macs import MacCount, count_macs
from sparsight.measure.norms import measure_norms
from sparsight.measure.profiler import LayerProfile, Profile, profile
from sparsight.measure.published_macs import count_published_macs, published_size
from sparsight.measure.report import environment_block, markdown_table, write_report
from sparsight.measure.sampled_layers import LayerMacs

__all__ = [
    "CalibrationReport",
    "Latency",
    "LatencyComparison",
    "LayerMacs",
    "LayerProfile",
    "MacCount",
    "Profile",
    "calibrate",
    "count_macs",
    "count_published_macs",
    "environment",
    "environment_block",
    "markdown_table",
    "measure_latency",
    "measure_norms",
    "profile",
    "published_size",
    "write_report",
]
