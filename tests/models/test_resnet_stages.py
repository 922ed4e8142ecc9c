import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from sparsight.models.resnet_stages import ResNetStages, is_resnet, probe_stages


def tiny() -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1, 1])


def test_maps_are_the_outputs_of_the_stages():
    resnet = tiny().eval()
    image, x = torch.randn(1, 3, 40, 33), None
    with torch.no_grad():
        maps = ResNetStages(resnet)(image)
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(image))))
        for found, stage in zip(
            maps, (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4), strict=True
        ):
            x = stage(x)
            assert torch.equal(found, x)


def test_probing_leaves_no_trace():
    stages = ResNetStages(tiny())
    stages.layer1.eval()
    before = {name: value.clone() for name, value in stages.state_dict().items()}
    assert probe_stages(stages) == ([64, 128, 256, 512], [4, 8, 16, 32])
    assert stages.training and stages.layer2.training and not stages.layer1.training
    for name, value in stages.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_lacks_a_part_is_refused_in_the_callers_name():
    resnet = tiny()
    assert is_resnet(resnet)
    del resnet.layer4
    assert not is_resnet(resnet)
    with pytest.raises(ValueError, match=r"mine: backbone ResNet has no layer4; .*wrap"):
        ResNetStages(resnet, caller="mine")
    assert not is_resnet(nn.Linear(1, 1))
