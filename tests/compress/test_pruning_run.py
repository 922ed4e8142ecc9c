"""The run behind `prune_channels`: memory bounds change nothing, curves never rise with width."""

import pickle

import pytest
import torch

from sparsight.compress import pruning_run
from sparsight.compress.prune_channels import prune_channels
from sparsight.compress.pruning_run import PrunedLayer, PruningReport, _damage_curve


def test_memory_bounds_do_not_change_the_result(net, pictures, monkeypatch):
    """Rows of the original read again for every layer, every regression alone, nothing replayed."""
    expected = prune_channels(net, pictures(30), speedup=1.7)
    monkeypatch.setattr(pruning_run, "_MAX_BYTES", 1)
    arrived = prune_channels(net, pictures(30), speedup=1.7)
    for one, other in zip(arrived.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


class Fit:
    def __init__(self, damage):
        self.values = damage
        self.asked = []

    def damage(self, width, *, refits):
        self.asked.append(width)
        return self.values(width)


def test_curves_are_measured_at_eight_widths_and_interpolated():
    fit = Fit(lambda width: (1 - width / 256) ** 2)
    curve = _damage_curve(fit, list(range(16, 257, 16)), refits=True)
    assert list(curve) == list(range(16, 257, 16))
    assert len(fit.asked) == 8
    for width, value in curve.items():  # a parabola's root is a line
        assert value == pytest.approx((1 - width / 256) ** 2)


def test_a_wider_layer_is_never_the_worse_one():
    curve = _damage_curve(Fit(lambda w: {2: 0.1, 4: 0.4, 6: 0.2}[w]), [2, 4, 6, 8], refits=True)
    assert curve == pytest.approx({2: 0.4, 4: 0.4, 6: 0.2, 8: 0.0})


def test_report_reads_and_pickles():
    layers = (PrunedLayer("a", 8, 4, 0.5, 0.25), PrunedLayer("b", 8, 8, 0.0, 0.0))
    report = PruningReport(200, 100, layers, (("c", "no reason"),))
    assert report.speedup == 2
    assert str(report).splitlines() == [
        "2.00x fewer multiply-adds (200 -> 100)",
        "a: 4 of 8 channels, relative error 0.5000, 0.2500 after least squares",
    ]
    assert pickle.loads(pickle.dumps(report)) == report


def test_ties_of_grouped_convolutions_are_reported_in_channels(pictures, settle):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 4, 1),
    )
    pruned = prune_channels(net.eval(), pictures(30), ratio=0.5)
    (layer,) = pruned.pruning_report.layers
    assert (layer.channels, layer.kept) == (16, 8)
    assert pruned[2].groups == 2
