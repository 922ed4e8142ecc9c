import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from sparsight.models import semantic_fpn
from sparsight.nn import DeformableConv2d


def small(**keywords) -> nn.Module:
    return semantic_fpn("resnet18", num_classes=5, fpn_channels=16, head_channels=8, **keywords)


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (31, 8), (1, 1)])
def test_logits_have_the_size_of_the_input(size):
    model = small().eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert set(out) == {"out"}
    assert out["out"].shape == (2, 5, *size)
    assert out["out"].isfinite().all()


def test_an_image_does_not_depend_on_its_batch():
    model = small().eval()
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        together = model(images)["out"]
        alone = torch.cat([model(image[None])["out"] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_levels_are_summed_at_stride_four():
    """Kirillov et al. 2019, section 3.1: one convolution per doubling, one at the finest level."""
    model = small()
    assert [len(branch) for branch in model.branches] == [1, 1, 2, 3]
    recorded = []
    model.classifier.register_forward_hook(lambda m, args, out: recorded.append(out.shape))
    model.eval()(torch.zeros(1, 3, 64, 96))
    assert recorded == [(1, 5, 16, 24)]


def test_a_passed_backbone_is_used_and_left_as_it_was():
    backbone = resnet18(weights=None)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = semantic_fpn(backbone, num_classes=5, fpn_channels=16, head_channels=8)
    assert model.backbone.layer1[0].conv1.weight is backbone.layer1[0].conv1.weight
    assert backbone.training
    assert model.backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_classification_weights_load_into_the_backbone():
    source = resnet18(weights=None)
    model = small()
    result = model.backbone.load_state_dict(source.state_dict(), strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == {"fc.weight", "fc.bias"}


def test_a_dilated_backbone_keeps_stride_eight():
    model = semantic_fpn(
        "resnet50", num_classes=2, is_dilated=True, fpn_channels=8, head_channels=8
    ).eval()
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == [16, 8, 8, 8]
    assert model.backbone.layer3[1].conv2.dilation == (2, 2)
    assert model.backbone.layer4[1].conv2.dilation == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "vgg16", "num_classes": 2}, "backbone='vgg16'.*resnet18.*or a module"),
        (
            {"backbone": "resnet18", "num_classes": 2, "is_dilated": True},
            "is_dilated=True with backbone='resnet18'.*basic block has no dilation.*resnet50",
        ),
        ({"backbone": "resnet18", "num_classes": 0}, "num_classes=0; at least one class"),
        ({"backbone": nn.Linear(1, 1), "num_classes": 2}, "Linear has no conv1.*layer4.*wrap"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    backbone = arguments.pop("backbone")
    with pytest.raises(ValueError, match=message):
        semantic_fpn(backbone, **arguments)


@pytest.mark.slow
def test_a_deformable_backbone_starts_where_the_plain_one_is():
    torch.manual_seed(0)
    model = semantic_fpn(
        "resnet50",
        num_classes=3,
        is_dilated=True,
        is_deformable=True,
        fpn_channels=8,
        head_channels=8,
    ).eval()
    plain = semantic_fpn(
        "resnet50", num_classes=3, is_dilated=True, fpn_channels=8, head_channels=8
    ).eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(".conv2.offset." in key for key in missing.unexpected_keys)
    moving = [m for m in model.modules() if isinstance(m, DeformableConv2d)]
    assert len(moving) == 4 + 6 + 3
    assert {m.dilation for m in moving} == {(1, 1), (2, 2), (4, 4)}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)["out"], plain(x)["out"], atol=1e-4, rtol=1e-3)


def test_what_a_backbone_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"is_deformable=True with backbone='resnet18'"):
        semantic_fpn("resnet18", num_classes=3, is_deformable=True)
    with pytest.raises(ValueError, match=r"is_dilated=True with backbone='resnet34'"):
        semantic_fpn("resnet34", num_classes=3, is_dilated=True)
    with pytest.raises(ValueError, match="came with a backbone module"):
        semantic_fpn(torch.nn.Identity(), num_classes=3, is_dilated=True)


def test_resnext_is_a_backbone():
    model = semantic_fpn("resnext50_32x4d", num_classes=3, fpn_channels=8, head_channels=8).eval()
    assert model.backbone.layer1[0].conv2.groups == 32
    assert model(torch.zeros(1, 3, 32, 32))["out"].shape == (1, 3, 32, 32)
