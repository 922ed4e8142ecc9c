"""The table of a chain: shares of the first network, milliseconds where there are some."""

from types import SimpleNamespace

import pytest
import torch

from sparsight.measure import Latency, LatencyComparison
from sparsight.train.architecture import Architecture, build_dense
from sparsight.train.chain_table import ChainStep, chain_table, measure_frozen
from sparsight.train.checkpoint import save_checkpoint

DENSE = Architecture(
    model="resnet_cifar",
    backbone="resnet8",
    num_classes=3,
    fpn_channels=None,
    head_channels=None,
    size=(16, 16),
)


def scored(top1, macs):
    return SimpleNamespace(figures={"top1": top1, "top5": None}, macs_total=macs)


FIRST, SECOND = scored(0.927, 125.5e6), scored(0.9, 31.375e6)
TIMES = LatencyComparison(
    [Latency("dense", 4.0, 0.1, 3.9, 20, 1.0), Latency("small", 3.0, 0.2, 2.9, 20, 0.75)], 1, "cpu"
)


def test_shares_are_of_the_first_network():
    step = ChainStep.of("small", "a/b.safetensors", SECOND, first=FIRST, measured=TIMES)
    assert (step.metric, step.score, step.share) == ("top1", 0.9, 0.25)
    assert (step.latency_ms, step.iqr_ms, step.time_ratio) == (3.0, 0.2, 0.75)


def test_a_row_a_step():
    steps = [
        ChainStep.of(name, "x", score, first=FIRST, measured=TIMES)
        for name, score in (("dense", FIRST), ("small", SECOND))
    ]
    assert chain_table(steps).splitlines() == [
        "| step | top-1 | MMACs | share of dense | ms, frozen | share of the time |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 92.70 | 125.50 | 1.000 | 4.000 | 1.000 |",
        "| small | 90.00 | 31.38 | 0.250 | 3.000 | 0.750 |",
    ]


def test_without_milliseconds_there_is_no_column_for_them():
    table = chain_table([ChainStep.of("dense", "x", FIRST, first=FIRST)])
    assert "ms" not in table and table.endswith("| dense | 92.70 | 125.50 | 1.000 |")


def test_frozen_networks_are_measured_in_turns(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "a.safetensors", build_dense(DENSE), DENSE)
    files = {"one": tmp_path / "a.safetensors", "two": tmp_path / "a.safetensors"}
    measured = measure_frozen(files, torch.randn(1, 3, 16, 16))
    assert [row.name for row in measured.rows] == ["one", "two"]
    assert measured["one"].ratio == 1 and measured["two"].latency_ms > 0
    with pytest.raises(KeyError):
        measured["three"]
