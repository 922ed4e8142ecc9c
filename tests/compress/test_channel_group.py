"""Removing units of a group: what is asked for, and what cannot be."""

import pytest
import torch
from torch import nn

from sparsight.compress import ChannelGroup, find_channel_groups, keep_channels
from sparsight.compress.channel_group import removed_units, width_of

IMAGE = torch.zeros(1, 3, 4, 4)


def found(model: nn.Module, example: object = IMAGE) -> dict[str, ChannelGroup]:
    return {group.name: group for group in find_channel_groups(model, example)}


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([0, 1], TypeError, "tensor of integers"),
        (torch.ones(8, dtype=torch.bool), TypeError, "mask.nonzero"),
        (torch.tensor([], dtype=torch.int64), ValueError, "at least one"),
        (torch.tensor([1, 1]), ValueError, "each once"),
        (torch.tensor([8]), ValueError, "8 units"),
        (torch.tensor([-1]), ValueError, "none negative"),
    ],
)
def test_wrong_indices_are_refused(keep, error, message):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    group = found(net)["0"]
    with pytest.raises(error, match=message):
        keep_channels(net, group, keep)


def test_groups_that_stay_are_refused_by_name():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=r"'1' cannot lose channels: .*output of the model"):
        keep_channels(net, found(net)["1"], torch.tensor([0]))


def test_keeping_everything_changes_nothing():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    weight = net[0].weight
    keep_channels(net, found(net)["0"], torch.arange(8))
    assert net[0].weight is weight


def test_units_that_are_not_kept_are_removed():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    group = found(net)["0"]
    assert removed_units(group, torch.tensor([5, 0, 7, 2])) == [1, 3, 4, 6]
    assert group.of("1", "in").units[3] == (3,)
    with pytest.raises(KeyError, match="has no 'in' of '0'"):
        group.of("0", "in")


def test_widths_are_those_of_the_layers():
    assert width_of(nn.Linear(3, 5), "in") == 3
    assert width_of(nn.ConvTranspose2d(3, 5, 1), "out") == 5
    assert width_of(nn.GroupNorm(2, 6), "norm") == width_of(nn.PReLU(6), "norm") == 6
