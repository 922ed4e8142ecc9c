from dataclasses import dataclass
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

from sparsight.convert import freeze, sparsify
from sparsight.measure import count_macs
from sparsight.models import faster_rcnn
from sparsight.models.faster_rcnn import load_torchvision_weights
from sparsight.nn import DeformableBlock, DeformableConv2d, SampledBlock, record_sampling

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SMALL = {"num_classes": 3, "min_size": 64, "max_size": 96, "head_channels": 16}


def small(backbone="resnet18", **keywords) -> nn.Module:
    torch.manual_seed(0)
    return faster_rcnn(backbone, **(SMALL | {"fpn_channels": 8} | keywords))


def tiny_bottlenecks(**keywords) -> nn.Module:
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8, **keywords)


@pytest.fixture(scope="module")
def published(narrow_resnet18) -> nn.Module:
    """Torchvision's own, around a small backbone and a small head."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    return FasterRCNN(
        backbone,
        box_head=TwoMLPHead(256 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, 5),
    )


def with_shapes_of_published(num_classes=5, **keywords) -> nn.Module:
    return faster_rcnn("resnet18", num_classes=num_classes, head_channels=16, **keywords)


def test_names_and_shapes_are_torchvisions():
    with torch.device("meta"):
        published = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
        model = faster_rcnn("resnet50", num_classes=5)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in published.state_dict().items()}
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)


@pytest.mark.parametrize("count", range(6))
def test_as_many_layers_learn_as_in_torchvision(count):
    with torch.device("meta"):
        theirs = resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            norm_layer=nn.BatchNorm2d,
            trainable_layers=count,
        )
        ours = faster_rcnn("resnet18", num_classes=2, trainable_layers=count).backbone
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }


def test_norms_are_frozen_on_request():
    for is_frozen, kind in ((True, FrozenBatchNorm2d), (False, nn.BatchNorm2d)):
        body = small(is_norm_frozen=is_frozen).backbone.body
        assert type(body.bn1) is type(body.layer4[1].bn2) is kind


@pytest.mark.parametrize(
    "make",
    [lambda: "resnet18", partial(tiny_bottlenecks, groups=4), tiny_bottlenecks],
    ids=["basic", "groups", "bottleneck"],
)
def test_deformable_stages_start_as_plain_ones(make):
    plain = small(make()).backbone.eval()
    moving = small(make(), deformable=True).backbone.eval()
    found = moving.load_state_dict(plain.state_dict(), strict=False)
    assert found.unexpected_keys == []
    blocks = [
        name.removesuffix(".conv2")
        for name, m in moving.named_modules()
        if isinstance(m, DeformableConv2d)
    ]
    num_guided = sum(isinstance(m, DeformableBlock) for m in moving.modules())
    assert num_guided == (3 if make() == "resnet18" else len(blocks))
    expected = [
        f"body.{stage}.{i}"
        for stage in ("layer2", "layer3", "layer4")
        for i in range(len(getattr(plain.body, stage)))
    ]
    assert blocks == expected
    assert found.missing_keys == [
        f"{name}.conv2.offset.{kind}" for name in expected for kind in ("weight", "bias")
    ]
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(moving(image).values(), plain(image).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_offsets_learn():
    model = small(deformable=True).train()
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    losses = model([torch.rand(3, 64, 64)] * 2, targets * 2)
    assert set(losses) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    sum(losses.values()).backward()
    gradient = model.backbone.body.layer3[0].conv2.offset.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@dataclass
class Stage:
    """Selects residual blocks by the paper's stage names."""

    names: tuple[str, ...]

    def __call__(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, resnet.BasicBlock | DeformableBlock) and any(
            f".{stage}." in f".{name}." for stage in self.names
        )


@pytest.mark.parametrize("deformable", [False, True])
def test_a_detector_is_sampled_frozen_and_counted(deformable):
    """The law of freeze: the same detections; and count_macs gives both the same rows."""
    # At full width: heads and interpolation cost more than an eighth of the channels saves.
    wide = resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2])
    dense = small(wide, deformable=deformable).eval()
    images = [torch.rand(3, 64, 80)]
    sampled = sparsify(dense).eval()
    blocks = [m for m in sampled.modules() if isinstance(m, SampledBlock)]
    assert len(blocks) == 8
    for block in blocks:
        for sampler in block.samplers:
            nn.init.constant_(sampler.head.bias, 0.0)
    frozen = freeze(sampled, example=images)
    with torch.no_grad(), record_sampling(sampled) as record:
        expected = sampled(images)[0]
    arrived = frozen(images)[0]
    assert 0.3 < record.decisions[4].mask.float().mean() < 0.7
    for key, value in expected.items():
        torch.testing.assert_close(arrived[key], value, rtol=2e-3, atol=2e-3)
    counted = count_macs(sampled, images)
    again = count_macs(frozen, images)
    body = [
        sum(row.total for row in count.layers if row.name.startswith("backbone.body."))
        for count in (counted, again)
    ]
    assert body[0] == body[1] > 0
    assert counted.total < counted.dense


def test_the_last_three_stages_alone_can_be_sampled():
    sampled = sparsify(small(), where=Stage(("layer2", "layer3", "layer4")))
    names = [name for name, m in sampled.named_modules() if isinstance(m, SampledBlock)]
    assert len(names) == 6
    assert not any("layer1" in name for name in names)


def perturbed(state):
    generator = torch.Generator().manual_seed(3)
    return {
        name: value + 0.1 * torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_detectors_weights_load(tmp_path, published, suffix):
    state = perturbed(published.state_dict())
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    model = with_shapes_of_published(is_norm_frozen=True)
    assert load_torchvision_weights(model, path) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    other = with_shapes_of_published(num_classes=4, deformable=True)
    kept = load_torchvision_weights(other, path)
    assert all(".offset." in name or name.startswith("roi_heads.box_predictor") for name in kept)
    assert len(kept) == 4 + 2 * 6
    assert torch.equal(other.rpn.head.conv[0][0].weight, state["rpn.head.conv.0.0.weight"])


def test_names_and_epsilon_of_the_published_file_are_understood(tmp_path, published):
    """COCO_V1: names of before torchvision 0.13, and norms trained with epsilon 0."""
    state = perturbed(published.state_dict())
    old = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if name.startswith("backbone.fpn"):
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        old[name] = value
    assert "backbone.fpn.inner_blocks.3.bias" in old
    torch.save(old, tmp_path / "old.pth")
    model = with_shapes_of_published(is_norm_frozen=True)
    assert load_torchvision_weights(model, tmp_path / "old.pth") == []
    norm = model.backbone.body.layer2[0].bn2
    torch.testing.assert_close(
        norm.running_var + norm.eps, state["backbone.body.layer2.0.bn2.running_var"]
    )
    assert torch.equal(
        model.backbone.fpn.inner_blocks[0][0].weight, state["backbone.fpn.inner_blocks.0.0.weight"]
    )


def test_a_classifiers_weights_load_into_the_body(tmp_path):
    source = resnet.resnet18(weights=None)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    for is_frozen in (True, False):
        model = small(is_norm_frozen=is_frozen)
        kept = load_torchvision_weights(model, tmp_path / "resnet18.pth")
        assert not any(name.startswith("backbone.body") for name in kept)
        assert any(name.startswith("backbone.fpn") for name in kept)
        assert torch.equal(
            model.backbone.body.layer4[1].conv2.weight, source.layer4[1].conv2.weight
        )


def test_what_does_not_fit_is_named(tmp_path):
    model = small()
    with pytest.raises(FileNotFoundError, match=r"'.*gone\.pth' does not exist.*COCO_V1"):
        load_torchvision_weights(model, tmp_path / "gone.pth")
    deeper = {"layer1.2.conv1.weight": torch.zeros(8, 8, 3, 3)}  # as a ResNet-34 has
    torch.save(model.backbone.body.state_dict() | deeper, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not fit.*are unknown \(.*layer1\.2\.conv1"):
        load_torchvision_weights(model, tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"holds no state_dict \(its 'epoch' is a int"):
        load_torchvision_weights(model, tmp_path / "state.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"holds no state_dict \(it holds more than tensors"):
        load_torchvision_weights(model, tmp_path / "module.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors' holds no state_dict"):
        load_torchvision_weights(model, tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    ("backbone", "keywords", "message"),
    [
        ("vgg16", {}, "backbone='vgg16'; one of resnet18.*or a module"),
        ("resnet18", {"num_classes": 1}, "num_classes=1; at least 2.*background"),
        ("resnet18", {"trainable_layers": 6}, "trainable_layers=6; 0 to 5"),
        (nn.Linear(1, 1), {}, "Linear has no stage 'layer1'"),
    ],
)
def test_bad_arguments_are_named(backbone, keywords, message):
    with pytest.raises(ValueError, match=message):
        small(backbone, **keywords)
