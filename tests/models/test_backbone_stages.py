import sys
from functools import partial

import pytest
import torch
from torchvision.models import mobilenet_v2
from torchvision.models.resnet import BasicBlock, ResNet

from sparsight.models.backbone_stages import LastFour, stages_of
from sparsight.models.mobilenet_stages import MobileNetV2Stages
from sparsight.models.resnet_stages import ResNetStages, probe_stages

build = partial(stages_of, "f", names=("resnet18", "mobilenet_v2"), is_norm_frozen=False)


@pytest.mark.usefixtures("narrow_resnet18")
def test_names_and_modules_of_torchvision_give_its_stages():
    assert isinstance(build("resnet18"), ResNetStages)
    assert isinstance(build("mobilenet_v2"), MobileNetV2Stages)
    resnet = ResNet(BasicBlock, [1, 1, 1, 1])
    assert build(resnet).layer4 is resnet.layer4
    mobile = mobilenet_v2(weights=None, width_mult=0.25)
    assert build(mobile).features[3] is mobile.features[3]


def test_norms_of_a_name_may_be_constants():
    with torch.device("meta"):
        for name in ("resnet34", "mobilenet_v2"):
            stages = stages_of("f", name, names=(name,), is_norm_frozen=True)
            kinds = {type(m).__name__ for m in stages.modules() if "Norm2d" in type(m).__name__}
            assert kinds == {"FrozenBatchNorm2d"}


def test_a_name_of_timm_gives_the_last_four_maps():
    pytest.importorskip("timm")
    stages = build("timm:resnet10t")
    assert isinstance(stages, LastFour)
    assert probe_stages(stages) == ([64, 128, 256, 512], [4, 8, 16, 32])


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"f: backbone='timm:resnet10t', but timm is not installed; .*sparsight\[timm\]"
    with pytest.raises(ModuleNotFoundError, match=message):
        build("timm:resnet10t")


def test_what_timm_does_not_have_or_what_has_no_four_strides_is_refused():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"f: backbone='timm:nothing'; .*\(Unknown model"):
        build("timm:nothing")
    message = r"f: backbone timm:vit_tiny_patch16_224 does not return a list of maps \(Input height"
    with pytest.raises(ValueError, match=message):
        build("timm:vit_tiny_patch16_224")


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"f: backbone='vgg'; one of 'resnet18', .*'timm:NAME' or"):
        build("vgg")
