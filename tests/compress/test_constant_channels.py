"""Constants of channels: where they go, and which norm stands behind which convolution."""

import torch
from torch import nn

from sparsight.compress.constant_channels import fold_constants, norms_behind
from sparsight.models import resnet_cifar


def test_the_norm_behind_a_convolution_is_found():
    model = resnet_cifar(8).eval()
    behind = norms_behind(model, torch.zeros(1, 3, 8, 8))
    assert behind["conv1"] == "bn1" and behind["layer2.0.conv2"] == "layer2.0.bn2"
    assert len(behind) == 7  # not the linear layer


def test_only_what_is_constant_is_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)).eval()
    model[0].weight.data[1] = 0
    bias = model[1].bias.detach().clone()
    image = torch.randn(2, 3, 4, 4)
    assert fold_constants(model, image, {"1": [0, 1]}) == []
    expected = bias + model[1].weight[:, 1, 0, 0] * model[0].bias[1]
    torch.testing.assert_close(model[1].bias.detach(), expected.detach())


def test_constants_of_a_flattened_map_are_summed_over_its_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2)).eval()
    model[0].weight.data[1] = 0
    image = torch.randn(2, 3, 2, 2)
    expected = model(image)
    fold_constants(model, image, {"2": [4, 5, 6, 7]})
    model[2].weight.data[:, 4:] = 0
    torch.testing.assert_close(model(image), expected)
