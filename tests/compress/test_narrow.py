"""Narrowing single layers, and shaping a fresh model like a pruned one."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from sparsight.compress import find_channel_groups
from sparsight.compress.channel_group import keep_all_channels
from sparsight.compress.narrow import keep_indices, narrow, shapes_of


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_kept_outputs_are_those_of_the_wide_layer(kind, groups):
    torch.manual_seed(0)
    layer = kind(4, 6, 1, groups=groups)
    size = [1] * (layer.weight.ndim - 2)
    x = torch.randn(2, 4, *size)
    expected = layer(x)[:, 3:]
    keep_indices(layer, "out", [3, 4, 5])
    # a grouped one has lost the first half of its input as well
    torch.testing.assert_close(layer(x if groups == 1 else x[:, 2:]), expected)


def test_kept_inputs_are_read_alone():
    torch.manual_seed(0)
    for layer, shape in [
        (nn.Conv2d(4, 3, 3), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 3, 2), (2, 4, 5, 5)),
        (nn.Linear(4, 3), (2, 4)),
    ]:
        x = torch.randn(shape)
        x[:, [0, 2]] = 0
        expected = layer(x)
        keep_indices(layer, "in", [1, 3])
        torch.testing.assert_close(layer(x[:, [1, 3]]), expected)


def test_norms_keep_their_statistics():
    norm = nn.BatchNorm2d(4)
    norm.running_mean = torch.arange(4.0)
    keep_indices(norm, "norm", [1, 3])
    assert norm.running_mean.tolist() == [1, 3] and norm.num_features == 2
    norm = nn.GroupNorm(2, 6)
    keep_indices(norm, "norm", [3, 4, 5])
    assert (norm.num_groups, norm.num_channels, norm.weight.numel()) == (1, 3, 3)
    frozen = torchvision.ops.FrozenBatchNorm2d(3)
    keep_indices(frozen, "norm", [2])
    assert frozen(torch.zeros(1, 1, 2, 2)).shape == (1, 1, 2, 2)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(4, 8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 6, 2),
        nn.Flatten(),
        nn.Linear(6 * 25, 2),
    ).eval()


def test_a_fresh_model_takes_the_widths_and_weights_of_a_pruned_one():
    torch.manual_seed(0)
    pruned, image = small(), torch.randn(1, 3, 8, 8)
    groups = [group for group in find_channel_groups(pruned, image) if group.removable]
    assert len(groups) == 2
    keep_all_channels(pruned, [(g, torch.arange(1, g.channels)) for g in groups])
    fresh = small()
    narrow(fresh, shapes_of(pruned))
    fresh.load_state_dict(pruned.state_dict())
    assert str(fresh) == str(pruned)
    assert torch.equal(fresh(image), pruned(image))
    again = small()
    narrow(again, pruned.state_dict())
    assert str(again) == str(pruned)


def test_no_shapes_change_nothing():
    model = small()
    before = copy.deepcopy(model.state_dict())
    narrow(model, shapes_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"9.weight": [1]}, "does not have"),
        ({"0.weight": [9, 3, 3, 3]}, "has .8, 3, 3, 3."),
        ({"0.weight": [8, 3, 1, 1]}, "fewer channels"),
        ({"0.weight": [0, 3, 3, 3]}, "fewer channels"),
        ({"1.weight": [7]}, "whole groups"),
        ({"6.weight": [2]}, "fewer channels"),
    ],
)
def test_shapes_out_of_reach_are_refused(shapes, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        narrow(model, shapes)
    assert str(model) == str(small())
