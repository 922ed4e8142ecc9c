"""Backbones at stride 8: torchvision's weights, torchvision's outputs, the size of the map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet as zoo
from torchvision.models import vgg16

from sparsight.models.stride8_trunks import (
    ResNetTrunk,
    VGG16Trunk,
    load_trunk_weights,
    named_trunk,
    trunk_of,
)


@pytest.fixture(scope="module")
def vgg():
    """torchvision's VGG-16 without its classifier's 124 M weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = vgg16(weights=None)
    model.features = vgg16_features()
    return model


def vgg16_features() -> nn.Module:
    from torchvision.models.vgg import cfgs, make_layers

    return make_layers(cfgs["D"])


def test_weights_of_torchvisions_vgg_load_by_name(vgg):
    trunk = VGG16Trunk()
    names = set(trunk.state_dict())
    assert names == {name for name in vgg.state_dict() if name.startswith("features.")}
    trunk.features.load_state_dict(vgg.features.state_dict())
    assert sum(p.numel() for p in trunk.parameters()) == 14_714_688


def test_vgg_is_torchvisions_up_to_the_fourth_pooling_and_dilated_behind(vgg):
    trunk = VGG16Trunk()
    trunk.features.load_state_dict(vgg.features.state_dict())
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        x = vgg.features[:23](image)  # up to relu4_3
        assert torch.equal(trunk.features[:23](image), x)
        x = F.max_pool2d(x, 3, 1, 1)
        for i in (24, 26, 28):
            conv = vgg.features[i]
            x = F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2).clamp(min=0)
        assert torch.equal(trunk(image), x)
    assert x.shape == (1, 512, 4, 6)


def test_all_convolutions_of_vgg_but_the_first_may_be_sampled():
    with torch.device("meta"):
        trunk = VGG16Trunk()
    convs = [f"features.{i}" for i, m in enumerate(trunk.features) if isinstance(m, nn.Conv2d)]
    assert trunk.convs_to_sample() == convs[1:] and len(convs) == 13


def test_a_dilated_resnet_is_torchvisions():
    torch.manual_seed(0)
    own = zoo.resnet50(weights=None).eval()
    expected = zoo.resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    expected.load_state_dict(own.state_dict())
    trunk = ResNetTrunk(own).eval()
    image = torch.randn(1, 3, 33, 40)
    x = image
    with torch.no_grad():
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(expected, name)(x)
        found = trunk(image)
    torch.testing.assert_close(found, x)
    assert found.shape == (1, 2048, 5, 5) and trunk.out_channels == 2048


@pytest.mark.parametrize(("num_stages", "channels"), [(2, 128), (3, 256), (4, 512)])
def test_basic_blocks_are_dilated_too(num_stages, channels):
    trunk = named_trunk("resnet18", num_stages=num_stages).eval()
    with torch.no_grad():
        assert trunk(torch.zeros(1, 3, 64, 40)).shape == (1, channels, 8, 5)
    assert trunk.out_channels == channels
    dilations = {
        name: module.dilation[0]
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1)
    }
    expected = {}
    if num_stages > 2:
        expected |= {"layer3.1.conv1": 2, "layer3.1.conv2": 2}
    if num_stages > 3:
        expected |= {f"layer4.0.conv{i}": 2 for i in (1, 2)}
        expected |= {f"layer4.1.conv{i}": 4 for i in (1, 2)}
    assert dilations == expected


def test_files_of_torchvisions_weights_load(tmp_path, vgg):
    source = zoo.resnet18(weights=None)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    trunk = named_trunk("resnet18", num_stages=3, is_norm_frozen=True)
    load_trunk_weights(trunk, tmp_path / "resnet18.pth")
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    features = {f"features.{k}": v for k, v in vgg.features.state_dict().items()}
    torch.save(features | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.pth")
    other = VGG16Trunk()
    load_trunk_weights(other, tmp_path / "vgg16.pth")
    assert torch.equal(other.features[28].weight, vgg.features[28].weight)
    with pytest.raises(ValueError, match=r"does not fit the VGG16Trunk: features.0.weight is miss"):
        load_trunk_weights(other, tmp_path / "resnet18.pth")


def test_a_module_is_taken_as_it_is():
    source = zoo.resnet18(weights=None)
    trunk, channels = trunk_of(source, num_stages=3)
    assert trunk.layer3[0].conv1 is source.layer3[0].conv1 and channels == 256
    mine = nn.Conv2d(3, 7, 8, stride=8)
    assert trunk_of(mine) == (mine, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "alexnet"}, "backbone='alexnet'; one of vgg16, resnet18.* or a module"),
        ({"name": "resnet18", "num_stages": 5}, "num_stages=5; 2, 3 or 4 is required"),
        ({"name": "vgg16", "num_stages": 3}, "VGG has neither residual stages nor norms"),
        ({"name": "vgg16", "is_norm_frozen": True}, "VGG has neither residual stages nor norms"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        named_trunk(**arguments)
    with pytest.raises(ValueError, match=r"backbone Identity has no out_channels"):
        trunk_of(nn.Identity())
