"""Layers, their sums and their order; never how long something takes."""

import math

import pytest
import torch
import torchvision
from torch import nn

import sparsight
from sparsight.measure import count_macs, profile
from sparsight.measure.profiler import ELSEWHERE


class Net(nn.Module):
    """A layer called twice, one never called, and a product in forward itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.twice = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.never = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.twice(self.twice(self.stem(x)))
        return y @ torch.zeros(y.shape[-1], 2)


def test_layers_in_order_and_sums():
    model, x = Net().eval(), torch.zeros(2, 3, 6, 6)
    table = profile(model, x, repeats=3, warmup=0)
    assert [row.name for row in table.layers] == ["stem", "twice.0", "twice.1", ELSEWHERE]
    assert [row.kind for row in table.layers] == ["Conv2d", "Conv2d", "ReLU", ""]
    assert [row.macs for row in table.layers] == [
        2 * 16 * 4 * 27,
        2 * 2 * 16 * 16,
        0,
        2 * 16 * 4 * 2,
    ]
    counted = count_macs(model, x)
    assert sum(row.macs for row in table.layers) == table.macs == counted.total
    assert sum(row.dense_macs for row in table.layers) == table.dense_macs == counted.dense
    assert table.num_samples == 3
    assert all(math.isfinite(row.time_ms) for row in table.layers)
    assert 0 < sum(row.time_ms for row in table.layers[:-1]) < 3 * table.time_ms


def test_times_are_medians_of_calls_summed_over_a_run(monkeypatch):
    """A clock that ticks once a reading: an only leaf called once lasts one tick, twice two."""
    from sparsight.measure import profiler

    ticks = iter(range(10**6))
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: next(ticks) / 1e3)
    model = Net().eval()
    table = profile(model, torch.zeros(1, 3, 6, 6), repeats=3, warmup=1)
    times = {row.name: row.time_ms for row in table.layers}
    assert times["stem"] == pytest.approx(1)
    assert times["twice.0"] == pytest.approx(2)
    assert table.time_ms == pytest.approx(2 * 5 + 1)
    assert sum(times.values()) == pytest.approx(table.time_ms)


def test_a_model_of_one_layer():
    table = profile(nn.Conv2d(3, 4, 1).eval(), torch.zeros(1, 3, 5, 5), repeats=1)
    assert [(row.name, row.macs) for row in table.layers] == [("", 300), (ELSEWHERE, 0)]


def test_sampled_blocks_are_layers():
    model = sparsight.sparsify(torchvision.models.resnet18(num_classes=3)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("head.bias"):
            nn.init.zeros_(parameter)
    x = torch.randn(1, 3, 64, 64)
    table = profile(model, x, repeats=1, warmup=0)
    rows = {row.name: row for row in table.layers}
    assert "layer1.0" in rows
    assert not any(name.startswith("layer1.0.") for name in rows)
    counted = [row for row in count_macs(model, x).layers if row.name.startswith("layer2.0.")]
    block = rows["layer2.0"]
    assert block.macs == sum(row.total for row in counted)
    gated = [row for row in counted if row.dense and row.positions]
    expected = sum(row.total for row in gated) / sum(row.dense for row in gated)
    assert block.density == pytest.approx(expected)
    assert 0 < block.density < 1
    assert rows["conv1"].density == 1
    assert all(not module._forward_hooks for module in model.modules())


def test_table():
    table = profile(Net().eval(), torch.zeros(1, 3, 6, 6), repeats=2, warmup=0)
    lines = str(table).splitlines()
    assert len(lines) == 2 + len(table.layers)
    assert lines[0].split() == ["layer", "kind", "density", "dense", "MMACs", "MMACs", "ms"]
    assert lines[-1].endswith("(median of 2)")


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"profile: repeats is 0"):
        profile(Net().eval(), torch.zeros(1, 3, 6, 6), repeats=0)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        profile(Net().train(), torch.zeros(1, 3, 6, 6))
